"""A chunk becomes one standard zlib stream that HDF5 reads as shuffle + gzip, plane by plane.

A deflate stream is a chain of blocks, so every byte plane can be coded as suits it, and the pieces
joined on byte boundaries: noise goes into stored blocks, planes without matches are only Huffman
coded, the zero runs of causal attentions are coded with the run-length strategy, and repeats with a
full search. The choice is made from a sample. Compiled kernels (``h5traces/_kernels/encode.c``) do
the same by the same rules, where they are installed.

Choosing takes a fifth of the time for hidden states that were float16, a quarter for those that
were bfloat16, where more places are searched for repeats, and a tenth for attentions.
``benchmarks/encoder.py`` measures the whole; figures of single steps come from single runs with
ISA-L 2.32, zlib-ng 2.3 and numpy 2.4 on two shared cores of an AMD EPYC, with synthetic activations
of Llama-2-7B's shape.
"""

from __future__ import annotations

import enum
import itertools
import math
import zlib
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.limits import Scratch
from h5traces.format.native import NATIVE

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Bytes: TypeAlias = NDArray[np.uint8]
    Counts: TypeAlias = NDArray[np.int64]
    # Parts of a stream, to be joined.
    Pieces: TypeAlias = list[bytes | memoryview]


_HEADER = b"\x78\x01"  # RFC 1950: deflate, 32 KiB window, no dictionary
_RAW_DEFLATE = -15
# A window of 512 bytes leaves few accidental matches: twice as fast as 32 KiB, and 0.2 % smaller.
_RAW_DEFLATE_SHORT_WINDOW = -9
_HEADER_NBYTES: Final = 2
_STORED_BLOCK = 65535
# Eight windows of 512 values show the entropy of a plane to about 0.03 bits. They are windows and
# not single values because equal neighbours must stay visible. A numpy call on this many values
# releases the GIL, and getting it back takes longer than the call while others encode: so there are
# few calls, for all planes together, and what only some planes need is counted when asked for.
_WINDOW = 512
_NUM_WINDOWS = 8
# A sample of 4096 random bytes shows at least 7.98 bits. Coding at 7.92 would win one per cent of
# the plane, and cost all of the speed that stored blocks have.
_NOISE_ENTROPY = 7.92
# Repeats are looked for in this many bytes from the middle of a plane: two windows of deflate.
_SPAN = 65536
# n log2 n for every count that a sample can hold: looking up is five times faster than computing.
_COUNTS = np.arange(_NUM_WINDOWS * _WINDOW + 1, dtype=np.float64)
_TIMES_LOG = _COUNTS * np.log2(np.maximum(_COUNTS, 1))
# Below this size a survey takes longer than coding, and one fact chooses: many equal neighbours are
# runs of zeros, as in causal attentions; elsewhere isal searches as fast as it only codes.
_SMALL = 24 << 10
_MIN_SMALL_PAIRS = 0.1
# Up to this size the ends of pieces may cost more than separate code tables win.
_TINY = 1024
# isal's level 1 takes accidental matches of three or four bytes, dear ones when bytes are likely
# to be equal: at 1/17 it loses 0.1 % to plain Huffman coding, at 1/10 it loses 2 %.
_MAX_COLLISION_FOR_ISAL = 1 / 17
# Where equal neighbours are no more than chance, literals are cheaper (half-zero activations: 4 %),
# until there are so many that a whole bit for each byte is what costs.
_MIN_EXCESS_PAIRS = 0.03
_MIN_PAIRS = 0.7
# With this share of zeros, runs are the masked half of causal attentions; the rest has no repeats.
_MIN_MASKED = 0.2
# Share of repeated strings from which a search may win more than one per cent.
_MIN_REPEATS = 0.0075
# Elsewhere a search is tried on this many bytes of the plane, and must win one per cent there: for
# integers, text, and entropies so low that Huffman's whole bits waste much. Hidden states and
# attentions seldom get there; the trial would cost them a third of their speed.
_MAX_ENTROPY_FOR_TRIAL = 1.1
_TRIAL = 8192
_MIN_GAIN = 0.99
# zlib-ng's level 9 crawls where few values occur: at 1 to 2 MB/s through sparse planes.
_MIN_ENTROPY_FOR_SHORT_SEARCH = 4
# Blocks of 4096 instead of 32768 symbols follow changing statistics (rows of many scales: 8 %
# smaller) and cost a second code table, 0.0008 bits per symbol for each byte value. For attentions
# they take 1.3 to 2.4 times as long and win 0.3 % at 43 tokens, 1 % from 64 tokens on; there blocks
# of 16384 get half of it at less than 1.2 times the time.
_TABLE_COST = 0.0008
_MEM_LEVEL_SHORT_BLOCKS = 6
_MEM_LEVEL_MEDIUM_BLOCKS = 8
_MEM_LEVEL_LONG_BLOCKS = 9
_LARGE = 1 << 17


@dataclass(frozen=True)
class Engines:
    """The deflate libraries to work with; None stands for one that is not installed."""

    isal_zlib: Any
    igzip_lib: Any
    zlib_ng: Any
    # Compiled kernels, which do all the work for data that they know.
    native: Any = None

    @classmethod
    def installed(cls) -> Engines:
        """The libraries that can be imported."""
        names = ("isal.isal_zlib", "isal.igzip_lib", "zlib_ng.zlib_ng")
        isal_zlib, igzip_lib, zlib_ng = map(_import_or_none, names)
        return cls(isal_zlib, igzip_lib, zlib_ng, NATIVE)

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Errors that inflating a damaged stream raises."""
        extra = (self.igzip_lib and self.igzip_lib.error, self.zlib_ng and self.zlib_ng.error)
        return (zlib.error, *filter(None, extra))

    def adler32(self, data: Bytes) -> int:
        """RFC 1950's checksum: 49 GB/s with zlib-ng, 16 with isal, 3.5 with zlib."""
        library = self.zlib_ng or self.isal_zlib or zlib
        return int(library.adler32(data))

    def inflater(self) -> Any:
        """A fresh inflater of zlib streams, which compares their checksum.

        Given a whole stream, isal takes 0.5 of the time of zlib-ng, and libdeflate 0.8.
        """
        if self.igzip_lib:
            return self.igzip_lib.IgzipDecompressor(self.igzip_lib.DECOMP_ZLIB)
        return (self.zlib_ng or zlib).decompressobj()


def _import_or_none(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


ENGINES = Engines.installed()
# Memory that no call needs afterwards.
_SCRATCH = Scratch()


def encode(raw: Buffer, *, itemsize: int) -> bytes:
    """One zlib stream of the shuffled bytes of a chunk, at most a header longer than the chunk.

    `raw` is little-endian and in C order; an `itemsize` of 1 keeps the order.
    """
    data, itemsize = _as_bytes(raw), _checked(itemsize)
    if ENGINES.native:
        ((compiled, *_),) = ENGINES.native.store(((data, itemsize, b"", -1),))
        if compiled is not None:
            return bytes(compiled)
    shuffled = shuffle(data, itemsize, out=_SCRATCH.take(data.size))
    planes = plane_view(shuffled, itemsize)
    if planes.size < _SMALL:
        pieces = _small_pieces(shuffled, itemsize)
    else:
        pieces = _pieces(shuffled, itemsize, _plans(planes))
    checksum = ENGINES.adler32(shuffled).to_bytes(4, "big")
    return b"".join((_HEADER, *pieces, checksum))


def decode(stored: Buffer, out: Buffer, *, itemsize: int) -> None:
    """Inflate a stored chunk and unshuffle it into `out`, whose size the stream must have.

    No more than ``len(out) + 1`` bytes are ever inflated.
    """
    target = _as_bytes(out)
    if not target.flags.writeable:
        msg = "the output buffer is read-only; give a writable one"
        raise ValueError(msg)
    source, itemsize = _as_bytes(stored), _checked(itemsize)
    if ENGINES.native and ENGINES.native.decode(source, target, itemsize):
        return
    unshuffle(_inflate(source, target.size), target, itemsize)


def _checked(itemsize: int) -> int:
    if itemsize < 1:
        msg = f"itemsize is {itemsize}, expected at least 1"
        raise ValueError(msg)
    return itemsize


def _as_bytes(buffer: Buffer) -> Bytes:
    view = memoryview(buffer)
    if not view.c_contiguous:
        msg = "the buffer is not contiguous in C order; copy it first"
        raise ValueError(msg)
    return np.frombuffer(view, np.uint8)


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


class _Coding(enum.Enum):
    """One way of coding bytes as deflate blocks other than stored ones."""

    DENSE = enum.auto()
    HUFFMAN = enum.auto()
    RUNS = enum.auto()
    SEARCH = enum.auto()
    LONG_SEARCH = enum.auto()
    SHORT_SEARCH = enum.auto()


@dataclass(frozen=True)
class _Plan:
    """The codings to try on some bytes, of which the smallest is kept; none means stored blocks."""

    codings: tuple[_Coding, ...]
    # zlib's parameter, which sets the length of blocks
    mem_level: int = _MEM_LEVEL_LONG_BLOCKS
    # Neighbouring planes become one piece; others need separate code tables.
    joins: bool = False


_LONG_SEARCHES = (_Coding.SEARCH, _Coding.LONG_SEARCH)
_STORED = _Plan((), joins=True)
_REPEATS = _Plan(_LONG_SEARCHES)
_CONSTANT = _Plan((_Coding.RUNS,), joins=True)
_MASKED = _Plan((_Coding.RUNS,))
_MASKED_LARGE = _Plan((_Coding.RUNS,), _MEM_LEVEL_MEDIUM_BLOCKS)
_DENSE = _Plan((_Coding.DENSE,))
_DENSE_REPEATS = _Plan((_Coding.DENSE, *_LONG_SEARCHES))
_SMALL_VARIED = _Plan((_Coding.LONG_SEARCH,))
_SMALL_RUNS = _Plan((_Coding.RUNS,))
_SMALL_WHOLE = _Plan((_Coding.LONG_SEARCH, _Coding.SEARCH))


def _small_pieces(shuffled: Bytes, itemsize: int) -> Pieces:
    """Every plane in one quick way, or the whole chunk searched where that is smaller."""
    if itemsize == 1 or shuffled.size < 2 * itemsize:
        return _piece(shuffled, _SMALL_WHOLE, final=True)
    planes = plane_view(shuffled, itemsize)
    pairs = (planes[:, 1:] == planes[:, :-1]).sum(axis=1).tolist()
    plans = [_small_plan(each, planes.shape[1] - 1) for each in pairs]
    pieces = _pieces(shuffled, itemsize, plans)
    if shuffled.size > _TINY:
        return pieces
    return min(_piece(shuffled, _SMALL_WHOLE, final=True), pieces, key=_nbytes)


def _small_plan(num_pairs: int, most: int) -> _Plan:
    if num_pairs == most:
        return _CONSTANT
    return _SMALL_RUNS if num_pairs > _MIN_SMALL_PAIRS * most else _SMALL_VARIED


def _pieces(shuffled: Bytes, itemsize: int, plans: list[_Plan]) -> Pieces:
    """The planes as raw deflate, the unshuffled tail with the last one."""
    count = shuffled.size // itemsize
    stop, pieces = 0, []
    keys = ((-1 if plan.joins else index, plan) for index, plan in enumerate(plans))
    for (_, plan), group in itertools.groupby(keys):
        start, stop = stop, stop + len(list(group))
        final = stop == itemsize
        end = shuffled.size if final else stop * count
        pieces += _piece(shuffled[start * count : end], plan, final=final)
    return pieces


def _plans(planes: Bytes) -> list[_Plan]:
    """The codings that may be smallest for every plane, from what samples show."""
    plans: list[_Plan] = []
    elements_differ = False
    for plane, facts in zip(planes, survey(planes), strict=True):
        plans.append(_plan(plane, facts, elements_differ=elements_differ))
        # Whole elements repeat, so one plane without repeats speaks for those after it.
        elements_differ = elements_differ or plans[-1] in (_STORED, _DENSE)
    return plans


def _plan(plane: Bytes, facts: _PlaneSurvey, *, elements_differ: bool) -> _Plan:
    if facts.num_values == 1:
        return _CONSTANT
    if facts.noise:
        return _REPEATS if not elements_differ and _repeats(plane, facts) else _STORED
    pairs, collision = facts.pairs, facts.collision
    excess = pairs - collision > _MIN_EXCESS_PAIRS
    masked = excess and facts.zeros > _MIN_MASKED
    if masked and facts.entropy > _MAX_ENTROPY_FOR_TRIAL and plane.size > _TRIAL:
        return _MASKED if plane.size < _LARGE else _MASKED_LARGE
    runs = excess or pairs > _MIN_PAIRS
    varied = facts.variation > _TABLE_COST * facts.num_values
    if not runs and not varied and collision < _MAX_COLLISION_FOR_ISAL:
        return _DENSE_REPEATS if not elements_differ and _repeats(plane, facts) else _DENSE
    mem_level = _MEM_LEVEL_SHORT_BLOCKS if varied else _MEM_LEVEL_LONG_BLOCKS
    simple = _Plan((_Coding.RUNS if runs else _Coding.HUFFMAN,), mem_level)
    return replace(simple, codings=simple.codings + _searches(plane, facts, simple))


def _repeats(plane: Bytes, facts: _PlaneSurvey) -> bool:
    return repeats(plane, facts.anchor) > _MIN_REPEATS


def _searches(plane: Bytes, facts: _PlaneSurvey, simple: _Plan) -> tuple[_Coding, ...]:
    """The codings that find matches, if they win on a part of the plane."""
    start = max(plane.size - _TRIAL, 0) // 2
    trial = plane[start : start + _TRIAL]
    searched = _piece(trial, replace(simple, codings=(_Coding.SEARCH,)), final=True)
    if _nbytes(searched) > _MIN_GAIN * _nbytes(_piece(trial, simple, final=True)):
        return ()
    if facts.entropy < _MIN_ENTROPY_FOR_SHORT_SEARCH:
        return (_Coding.SEARCH,)
    return _Coding.SEARCH, _Coding.SHORT_SEARCH


def _piece(data: Bytes, plan: _Plan, *, final: bool) -> Pieces:
    """The smallest coding of the plan, or stored blocks where nothing is smaller."""
    codings = (_deflated(data, coding, plan.mem_level, final=final) for coding in plan.codings)
    shortest = min(codings, key=_nbytes, default=None)
    if shortest is None or _nbytes(shortest) >= _stored_nbytes(data.size):
        return _stored(data, final=final)
    return shortest


def _nbytes(parts: Pieces) -> int:
    return sum(map(len, parts))


def _deflated(data: Bytes, coding: _Coding, mem_level: int, *, final: bool) -> Pieces:
    deflater = _deflater(coding, mem_level)
    # A sync flush ends the piece on a byte boundary without ending the stream.
    flush = zlib.Z_FINISH if final else zlib.Z_SYNC_FLUSH
    return [deflater.compress(data), deflater.flush(flush)]


def _deflater(coding: _Coding, mem_level: int) -> Any:
    """A fresh raw deflate compressor."""
    isal_zlib, library = ENGINES.isal_zlib, ENGINES.zlib_ng or zlib
    if isal_zlib and coding is _Coding.DENSE:
        return isal_zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE_SHORT_WINDOW, 9)
    if isal_zlib and coding is _Coding.LONG_SEARCH:
        return isal_zlib.compressobj(3, zlib.DEFLATED, _RAW_DEFLATE, 9)
    level, strategy = 7 if ENGINES.zlib_ng else 6, zlib.Z_DEFAULT_STRATEGY
    if coding in (_Coding.DENSE, _Coding.HUFFMAN):
        level, strategy = 1, zlib.Z_HUFFMAN_ONLY
    elif coding is _Coding.RUNS:
        level, strategy = 1, zlib.Z_RLE
    elif coding is _Coding.SHORT_SEARCH and ENGINES.zlib_ng:
        # zlib-ng's level 7 is as thorough as zlib's level 6, but sees no matches of three bytes.
        level = 9
    return library.compressobj(level, zlib.DEFLATED, _RAW_DEFLATE, mem_level, strategy)


def _stored(data: Bytes, *, final: bool) -> Pieces:
    """RFC 1951, 3.2.4: blocks of a flag, the length, its complement, and the bytes themselves."""
    parts: Pieces = []
    view = data.data
    for start in range(0, max(data.size, 1), _STORED_BLOCK):
        block = view[start : start + _STORED_BLOCK]
        last = final and start + _STORED_BLOCK >= data.size
        length = len(block).to_bytes(2, "little")
        complement = (len(block) ^ 0xFFFF).to_bytes(2, "little")
        parts += (bytes([last]) + length + complement, block)
    return parts


def _stored_nbytes(nbytes: int) -> int:
    return nbytes + 5 * max(1, -(-nbytes // _STORED_BLOCK))


@dataclass(frozen=True, eq=False)
class _PlaneSurvey:
    """What a sample of one byte plane shows."""

    # rows of bytes that were neighbours in the plane
    sample: Bytes
    # how often every byte value is in each row, and in the sample
    histograms: Counts
    counts: Counts
    # different byte values seen
    num_values: int
    # of order 0, in bits per byte, with Miller and Madow's correction
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


def survey(planes: Bytes) -> list[_PlaneSurvey]:
    """Look at a sample of every plane; the planes must not be empty."""
    sample = _sample(planes)
    histograms = _histograms(sample)
    counts = histograms.sum(axis=1)
    times_log = _TIMES_LOG[counts].sum(axis=1).tolist()
    size = sample[0].size
    surveys = []
    for index, count in enumerate(counts):
        num_values = int(np.count_nonzero(count))
        correction = (num_values - 1) / (2 * math.log(2))
        bits = float(_TIMES_LOG[size]) - times_log[index] + correction
        facts = (sample[index], histograms[index], count, num_values, bits / size)
        surveys.append(_PlaneSurvey(*facts))
    return surveys


def repeats(plane: Bytes, anchor: int) -> float:
    """Share of the eight-byte strings after every byte `anchor` that occur twice near each other.

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


def _inflate(stored: Bytes, nbytes: int) -> Bytes:
    """What a zlib stream (RFC 1950) of exactly `nbytes` holds."""
    if stored.size < _HEADER_NBYTES or not _is_header(*stored[:_HEADER_NBYTES].tolist()):
        msg = "the stored bytes are not an intact zlib stream: they begin with no header of one"
        raise ValueError(msg)
    inflater = ENGINES.inflater()
    try:
        # One byte more shows streams that hold too much, and lets others come to their end.
        data = inflater.decompress(stored, nbytes + 1)
    except ENGINES.errors as error:
        msg = f"the stored bytes are not an intact zlib stream: {error}"
        raise ValueError(msg) from error
    stray = len(inflater.unused_data)
    if len(data) > nbytes:
        msg = f"the zlib stream holds more than the expected {nbytes} bytes"
    elif not inflater.eof:
        msg = f"the zlib stream is cut off after {len(data)} of {nbytes} bytes"
    elif len(data) < nbytes:
        msg = f"the zlib stream holds {len(data)} bytes, expected {nbytes}"
    elif stray:
        msg = f"{stray} stray bytes follow the zlib stream"
    else:
        return np.frombuffer(data, np.uint8)
    raise ValueError(msg)


def _is_header(method: int, flags: int) -> bool:
    """RFC 1950, 2.2: deflate with a window of up to 32 KiB, a check sum, and no dictionary."""
    is_deflate = method & 0x0F == 8 and method >> 4 <= 7
    return is_deflate and (256 * method + flags) % 31 == 0 and not flags & 0x20
