"""Features for the classic experiments: one row of numbers per sample.

Functions of arrays (`last_token`, `row_entropy`, …), of archives (`iterate_features`, `fit_pca`),
and one that writes a file (`extract_features`).
"""

from h5traces.features.components import PrincipalComponents
from h5traces.features.extraction import FeatureReport, PcaOptions, extract_features
from h5traces.features.reductions import (
    FEATURES,
    FeatureDefinition,
    last_token,
    lookback_ratio,
    max_pooled,
    mean_pooled,
    row_entropy,
    sink_mass,
)
from h5traces.features.samples import SampleFeatures, compute_features, fit_pca, iterate_features

__all__ = [
    "FEATURES",
    "FeatureDefinition",
    "FeatureReport",
    "PcaOptions",
    "PrincipalComponents",
    "SampleFeatures",
    "compute_features",
    "extract_features",
    "fit_pca",
    "iterate_features",
    "last_token",
    "lookback_ratio",
    "max_pooled",
    "mean_pooled",
    "row_entropy",
    "sink_mass",
]
