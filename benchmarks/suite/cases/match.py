"""How well the synthetic data stand for real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from suite.synthetic import Generator, compare

if TYPE_CHECKING:
    from suite.workspace import Workspace


def run(workspace: Workspace) -> dict[str, Any]:
    """Bits per value of synthetic and of shipped real activations.

    Twice, since short attentions compress worse than long ones: the batch as it is benchmarked, and
    samples of exactly the lengths that the real ones have.
    """
    real, generator = workspace.real_samples, Generator(workspace.scale.shape)
    lengths = [len(sample["tokens"]) for sample in real]
    # Numbers far from those of the batch, so that these are other samples.
    alike = [generator.sample(10_000 + number, each) for number, each in enumerate(lengths)]
    return {
        "real_file": workspace.real_batch.name,
        "real_lengths": lengths,
        "lengths": [len(sample["tokens"]) for sample in workspace.samples],
        "as_benchmarked": compare(workspace.samples, real),
        "equal_lengths": compare(alike, real),
    }
