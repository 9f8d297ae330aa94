"""HDF5's shuffle filter puts the first bytes of all elements before all second bytes, and so on.

The bytes of one place are a *byte plane*. For float16 activations the low plane is mantissa and
nearly random, the high plane is sign, exponent and two mantissa bits. This module shuffles,
unshuffles, and looks at planes just long enough for :mod:`h5traces.storage.deflate` to choose.
Bytes behind the last whole element stay where they are, as in HDF5's own filter (``H5Zshuffle.c``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Counts: TypeAlias = NDArray[np.int64]

# Eight windows of 512 values show the entropy of a plane to about 0.03 bits. They are windows and
# not single values because equal neighbours must stay visible. A numpy call on so many values lets
# go of the GIL, and getting it back takes longer than the call while others encode: so few calls,
# for all planes together, and what only some planes need is counted when asked for.
_WINDOW = 512
_NUM_WINDOWS = 8

# A sample of 4096 random bytes shows at least 7.98 bits. Coding at 7.92 would win one per cent of
# the plane, and cost all of the speed that stored blocks have.
_NOISE_ENTROPY = 7.92

# Repeats are looked for in so many bytes from the middle of a plane: two windows of deflate.
_SPAN = 65536

# n log2 n for every count that a sample can hold: looking up is five times faster than computing.
_COUNTS = np.arange(_NUM_WINDOWS * _WINDOW + 1, dtype=np.float64)
_TIMES_LOG = _COUNTS * np.log2(np.maximum(_COUNTS, 1))


@dataclass(frozen=True, eq=False)
class PlaneSurvey:
    """What a sample of one byte plane shows.

    Attributes
    ----------
    sample
        Rows of bytes that were neighbours in the plane.
    histograms
        How often every byte value is in each row.
    counts
        How often every byte value is in the sample.
    num_values
        Number of different byte values seen.
    entropy
        Order-0 entropy in bits per byte, with Miller and Madow's correction.
    """

    sample: Bytes
    histograms: Counts
    counts: Counts
    num_values: int
    entropy: float

    @property
    def noise(self) -> bool:
        """Whether coding the plane is not worth its time."""
        return self.entropy > _NOISE_ENTROPY

    @property
    def collision(self) -> float:
        """Probability that two bytes drawn at random are equal."""
        size: int = self.sample.size
        return _squares(self.counts) / size**2

    @property
    def pairs(self) -> float:
        """Share of bytes that equal their neighbour; what exceeds `collision` are runs."""
        equal: NDArray[np.bool_] = self.sample[:, 1:] == self.sample[:, :-1]
        return int(np.count_nonzero(equal)) / max(equal.size, 1)

    @property
    def zeros(self) -> float:
        """Share of the byte zero."""
        return float(self.counts[0]) / self.sample.size

    @property
    def anchor(self) -> int:
        """The rarest byte value of those at least half as frequent as all values are in noise."""
        size = self.sample.size
        return int(np.where(512 * self.counts < size, size, self.counts).argmin())

    @property
    def variation(self) -> float:
        """Bits per byte that separate statistics for every window would save, roughly.

        It is the difference of collision entropies: one product instead of many logarithms. The
        commonest byte is left aside because runs of it cost nothing anyway.
        """
        commonest = int(self.counts.argmax())
        number, column = int(self.counts[commonest]), self.histograms[:, commonest]
        total, length = self.sample.size, self.sample.shape[1]
        others = total - number
        equal_pairs = _squares(self.counts) - number**2 - others
        equal_in_windows = _squares(self.histograms) - _squares(column) - others
        if equal_in_windows <= 0:
            return 0.0
        gain = equal_in_windows / (length - 1) / equal_pairs * (total - 1)
        return others / total * math.log2(gain)


def shuffle(raw: Bytes, itemsize: int, *, out: Bytes | None = None) -> Bytes:
    """The bytes of `raw` as HDF5's shuffle filter orders them, in `out` or a new array."""
    count = raw.size // itemsize
    shuffled = np.empty(raw.size, np.uint8) if out is None else out
    planes = plane_view(shuffled, itemsize)
    if itemsize in (2, 4):
        # Shifts and casts of whole elements are vectorised: 19 GB/s for two-byte elements, 7 for
        # four, against 3.6 for strided copies, which are as fast for eight.
        elements = raw[: count * itemsize].view(f"<u{itemsize}")
        np.copyto(planes[0], elements, casting="unsafe")
        for index in range(1, itemsize):
            np.right_shift(elements, 8 * index, out=planes[index], casting="unsafe")
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


def survey(planes: Bytes) -> list[PlaneSurvey]:
    """Look at a sample of every plane; the planes must not be empty."""
    sample = _sample(planes)
    histograms = _histograms(sample)
    counts = histograms.sum(axis=1)
    times_log = _TIMES_LOG[counts].sum(axis=1).tolist()
    return list(map(_survey_one, sample, histograms, counts, times_log))


def _survey_one(sample: Bytes, histograms: Counts, counts: Counts, times_log: float) -> PlaneSurvey:
    num_values = int(np.count_nonzero(counts))
    correction = (num_values - 1) / (2 * math.log(2))
    bits = float(_TIMES_LOG[sample.size]) - times_log + correction
    return PlaneSurvey(sample, histograms, counts, num_values, bits / sample.size)


def repeats(plane: Bytes, anchor: int) -> float:
    """Share of the eight-byte strings behind every byte `anchor` that stand twice near each other.

    Anchors move with what is repeated, so repeats are found at any distance. Chance does not repeat
    eight bytes of a plane of much entropy; of others it does, so do not ask.
    """
    start = max(plane.size - _SPAN, 0) // 2
    span = plane[start : start + _SPAN]
    places = np.flatnonzero(span[:-8] == anchor)
    every_string = np.ndarray((max(span.size - 7, 0),), "<u8", span, 0, (1,))
    strings = every_string[places + 1]
    strings.sort()
    return int(np.count_nonzero(strings[1:] == strings[:-1])) / max(strings.size, 1)


def _sample(planes: Bytes) -> Bytes:
    """Windows of every plane: a view with the axes plane, window, byte."""
    itemsize, count = planes.shape
    available = count // _WINDOW
    if available == 0:
        return planes.reshape(itemsize, 1, count)
    # An odd step visits all parts of rows whose length is a multiple of the window.
    step = -(-available // _NUM_WINDOWS) | 1
    cut = planes[:, : available * _WINDOW].reshape(itemsize, available, _WINDOW)
    return cut[:, ::step]


def _histograms(sample: Bytes) -> Counts:
    """Counts with the axes plane, window, byte value."""
    itemsize, num_windows, _ = sample.shape
    first_bins = np.arange(0, itemsize * num_windows * 256, 256).reshape(itemsize, num_windows, 1)
    bins = np.add(sample, first_bins, dtype=np.int64)
    counts = np.bincount(bins.ravel(), minlength=itemsize * num_windows * 256)
    return counts.reshape(itemsize, num_windows, 256)


def _squares(counts: Counts) -> int:
    return int(np.vdot(counts, counts))
