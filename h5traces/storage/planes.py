"""HDF5's shuffle filter puts the first bytes of all elements before all second bytes, and so on.

The bytes of one place are a *byte plane*. For float16 activations the low plane is mantissa and
nearly random, the high plane is sign, exponent and two mantissa bits. This module shuffles,
unshuffles, and looks at planes just long enough for :mod:`h5traces.storage.deflate` to choose.
Bytes behind the last whole element stay where they are, as in HDF5's own filter (``H5Zshuffle.c``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

# Eight windows of 1024 values show the entropy of a plane to about 0.02 bits. They are windows and
# not single values because equal neighbours must stay visible. A numpy call on so many values lets
# go of the GIL, and getting it back takes longer than the call while others encode: so few calls.
_WINDOW = 1024
_NUM_WINDOWS = 8

# A sample of 8192 random bytes shows at least 7.98 bits. Coding at 7.92 would win one per cent of
# the plane, and cost all of the speed that stored blocks have.
_NOISE_ENTROPY = 7.92

# n log2 n for every count that a sample can hold: looking up is five times faster than computing.
_COUNTS = np.arange(_NUM_WINDOWS * _WINDOW + 1, dtype=np.float64)
_TIMES_LOG = _COUNTS * np.log2(np.maximum(_COUNTS, 1))

_FIRST_BINS = np.arange(0, _NUM_WINDOWS * 256, 256)[:, np.newaxis]


@dataclass(frozen=True)
class PlaneSurvey:
    """What a sample of one byte plane shows.

    Attributes
    ----------
    entropy
        Order-0 entropy in bits per byte.
    collision
        Probability that two bytes drawn at random are equal.
    pairs
        Share of bytes that equal their neighbour; what exceeds `collision` are runs.
    zeros
        Share of the byte zero.
    commonest
        The commonest byte value.
    num_values
        Number of different byte values seen.
    variation
        Bits per byte that separate statistics for every window would save, the commonest byte left
        aside because runs of it cost nothing anyway. Not looked for in noise.
    """

    entropy: float
    collision: float
    pairs: float
    zeros: float
    commonest: int
    num_values: int
    variation: float

    @property
    def noise(self) -> bool:
        """Whether coding the plane is not worth its time."""
        return self.entropy > _NOISE_ENTROPY


def shuffle(raw: Bytes, itemsize: int) -> Bytes:
    """The bytes of `raw` as HDF5's shuffle filter orders them, in a new array."""
    count = raw.size // itemsize
    shuffled = np.empty(raw.size, np.uint8)
    planes = plane_view(shuffled, itemsize)
    if itemsize in (2, 4):
        # Shifts and casts of whole elements are vectorised: 19 GB/s for two-byte elements, 7 for
        # four, against 3.6 for strided copies, which are as fast for eight.
        elements = raw[: count * itemsize].view(f"<u{itemsize}")
        for index, plane in enumerate(planes):
            np.right_shift(elements, 8 * index, out=plane, casting="unsafe")
    else:
        rows = raw[: count * itemsize].reshape(count, itemsize)
        for index, plane in enumerate(planes):
            plane[...] = rows[:, index]
    shuffled[count * itemsize :] = raw[count * itemsize :]
    return shuffled


def unshuffle(shuffled: Bytes, out: Bytes, itemsize: int) -> None:
    """Write the bytes of `shuffled` into `out` in the order they had before the shuffle filter."""
    count = out.size // itemsize
    planes = plane_view(shuffled, itemsize)
    if itemsize in (2, 4):
        elements = out[: count * itemsize].view(f"<u{itemsize}")
        np.multiply(planes[-1], 256, out=elements, dtype=elements.dtype)
        for index in range(itemsize - 2, -1, -1):
            np.bitwise_or(elements, planes[index], out=elements)
            if index:
                np.left_shift(elements, 8, out=elements)
    else:
        rows = out[: count * itemsize].reshape(count, itemsize)
        for index, plane in enumerate(planes):
            rows[:, index] = plane
    out[count * itemsize :] = shuffled[count * itemsize :]


def plane_view(shuffled: Bytes, itemsize: int) -> Bytes:
    """The byte planes of shuffled bytes as the rows of a view, without the unshuffled tail."""
    count = shuffled.size // itemsize
    return shuffled[: count * itemsize].reshape(itemsize, count)


def survey(plane: Bytes) -> PlaneSurvey:
    """Look at a sample of a plane, which must not be empty."""
    sample = _sample(plane)
    histograms = _histograms(sample)
    pooled = histograms.sum(axis=0)
    entropy = _information(pooled[np.newaxis]) / sample.size
    shares = pooled / sample.size
    neighbours = sample.ravel()
    pairs = int(np.count_nonzero(neighbours[1:] == neighbours[:-1]))
    return PlaneSurvey(
        entropy=entropy,
        collision=float(shares @ shares),
        pairs=pairs / max(sample.size - 1, 1),
        zeros=float(shares[0]),
        commonest=int(pooled.argmax()),
        num_values=int(np.count_nonzero(pooled)),
        variation=0.0 if entropy > _NOISE_ENTROPY else _saving(histograms, pooled) / sample.size,
    )


def repeats(plane: Bytes, anchor: int) -> float:
    """Share of the eight-byte strings behind every byte `anchor` that stand twice in the plane.

    Anchors move with what is repeated, so repeats are found at any distance. Chance does not repeat
    eight bytes of a plane of much entropy; of others it does, so do not ask.
    """
    places = np.flatnonzero(plane[:-8] == anchor)
    every_string = np.ndarray((max(plane.size - 7, 0),), "<u8", plane, 0, (1,))
    strings = every_string[places + 1]
    strings.sort()
    return int(np.count_nonzero(strings[1:] == strings[:-1])) / max(strings.size, 1)


def _sample(plane: Bytes) -> Bytes:
    available = plane.size // _WINDOW
    if available == 0:
        return plane.reshape(1, plane.size)
    # An odd step visits all parts of rows whose length is a multiple of the window.
    step = -(-available // _NUM_WINDOWS) | 1
    cut = plane[: available * _WINDOW].reshape(available, _WINDOW)
    return np.ascontiguousarray(cut[::step])


def _histograms(sample: Bytes) -> NDArray[np.int64]:
    bins = np.add(sample, _FIRST_BINS[: len(sample)], dtype=np.int64)
    return np.bincount(bins.ravel(), minlength=256 * len(sample)).reshape(-1, 256)


def _information(histograms: NDArray[np.int64]) -> float:
    """Bits that all counted bytes hold, with Miller and Madow's correction for small samples."""
    bits = _TIMES_LOG[histograms.sum(axis=1)].sum() - _TIMES_LOG[histograms].sum()
    correction = (np.count_nonzero(histograms) - len(histograms)) / (2 * np.log(2))
    return float(bits + max(correction, 0))


def _saving(histograms: NDArray[np.int64], pooled: NDArray[np.int64]) -> float:
    """Bits that a code per window saves, without the commonest byte; `histograms` is spoilt."""
    commonest = pooled.argmax()
    histograms[:, commonest] = 0
    rest = pooled.copy()
    rest[commonest] = 0
    return _information(rest[np.newaxis]) - _information(histograms)
