"""How faithful one archive is to another: errors of states and weights, and what they change."""

from h5traces.fidelity.comparing import compare
from h5traces.fidelity.reports import (
    FidelityReport,
    KindFidelity,
    StateFidelity,
    Unmatched,
    WeightFidelity,
)

__all__ = [
    "FidelityReport",
    "KindFidelity",
    "StateFidelity",
    "Unmatched",
    "WeightFidelity",
    "compare",
]
