"""A chunk becomes one standard zlib stream that HDF5 reads as shuffle + gzip, plane by plane.

A deflate stream is a chain of blocks, so every byte plane can be coded as suits it, and the pieces
joined on byte boundaries: noise goes into stored blocks, planes without matches are only Huffman
coded, the zero runs of causal attentions are coded with the run-length strategy, and repeats with a
full search. The choice is made from a sample (:mod:`h5traces.storage.planes`).

Choosing takes a fifth of the time of float16-born hidden states, a quarter of that of bfloat16-born
ones, which are looked through for repeats at more places, and a tenth of that of attentions.
``benchmarks/encoder.py`` measures the whole; figures of single steps, here and in
:mod:`h5traces.storage.planes`, come from single runs with ISA-L 2.32, zlib-ng 2.3 and numpy 2.4 on
two shared cores of an AMD EPYC, with synthetic activations of Llama-2-7B's shape.
"""

from __future__ import annotations

import enum
import itertools
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.format.scratch import Scratch
from h5traces.storage import planes as _planes
from h5traces.storage.engines import RAW_DEFLATE, Engines
from h5traces.storage.inflate import inflate

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from h5traces.storage.planes import Bytes, PlaneSurvey

_HEADER = b"\x78\x01"  # RFC 1950: deflate, 32 KiB window, no dictionary
_STORED_BLOCK = 65535

# Below this size trying everything costs less than a third of a millisecond, and tables of codes
# are so large a part that no rule of thumb holds.
_SMALL = 8192

# isal's level 1 takes accidental matches of three or four bytes, dear ones when bytes are likely
# to be equal: at 1/17 it loses 0.1 % to plain Huffman coding, at 1/10 it loses 2 %.
_MAX_COLLISION_FOR_ISAL = 1 / 17

# A window of 512 bytes leaves few accidental matches: twice as fast as 32 KiB, and 0.2 % smaller.
_RAW_DEFLATE_SHORT_WINDOW = -9

# Where equal neighbours are no more than chance, literals are cheaper (half-zero activations: 4 %),
# until there are so many that a whole bit for each byte is what costs.
_MIN_EXCESS_PAIRS = 0.03
_MIN_PAIRS = 0.7

# Runs of so many zeros are the masked half of causal attentions, which has no repeats beside them.
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
    """The codings to try on some bytes, of which the smallest is kept; none means stored blocks.

    Attributes
    ----------
    codings
        What to try.
    mem_level
        zlib's parameter, which sets the length of blocks.
    joins
        Whether neighbouring planes become one piece; others need code tables of their own.
    """

    codings: tuple[_Coding, ...]
    mem_level: int = _MEM_LEVEL_LONG_BLOCKS
    joins: bool = False


_LONG_SEARCHES = (_Coding.SEARCH, _Coding.LONG_SEARCH)
_STORED = _Plan((), joins=True)
_REPEATS = _Plan(_LONG_SEARCHES)
_CONSTANT = _Plan((_Coding.RUNS,), joins=True)
_MASKED = _Plan((_Coding.RUNS,))
_MASKED_LARGE = _Plan((_Coding.RUNS,), _MEM_LEVEL_MEDIUM_BLOCKS)
_DENSE = _Plan((_Coding.DENSE,))
_DENSE_REPEATS = _Plan((_Coding.DENSE, *_LONG_SEARCHES))
_THOROUGH = _Plan((_Coding.HUFFMAN, _Coding.SHORT_SEARCH))


ENGINES = Engines.installed()

# For what need not outlive a call.
_SCRATCH = Scratch()


def encode(raw: Buffer, *, itemsize: int) -> bytes:
    """One zlib stream of the shuffled bytes of a chunk, at most a header longer than the chunk.

    Parameters
    ----------
    raw
        The chunk's elements, little-endian, in C order.
    itemsize
        Bytes per element, as the dataset's shuffle filter has it; 1 leaves the order as it is.
    """
    data = _as_bytes(raw)
    shuffled = _planes.shuffle(data, _checked(itemsize), out=_SCRATCH.take(data.size))
    planes = _planes.plane_view(shuffled, itemsize)
    if planes.size < _SMALL:
        pieces = _small_pieces(shuffled, itemsize)
    else:
        pieces = _pieces(shuffled, itemsize, _plans(planes))
    checksum = ENGINES.adler32(shuffled).to_bytes(4, "big")
    return b"".join((_HEADER, *pieces, checksum))


def decode(stored: Buffer, out: Buffer, *, itemsize: int) -> None:
    """Inflate a stored chunk and unshuffle it into `out`, whose size the stream must have.

    No more than ``len(out) + 1`` bytes are ever inflated.

    Raises
    ------
    ValueError
        The stream is damaged, cut off, followed by other bytes, or not of the size of `out`.
        `out` is left as it was.
    """
    target = _as_bytes(out)
    if not target.flags.writeable:
        msg = "the output buffer is read-only; give a writable one"
        raise ValueError(msg)
    shuffled = _SCRATCH.take(target.size)
    inflate(_as_bytes(stored), shuffled, ENGINES)
    _planes.unshuffle(shuffled, target, _checked(itemsize))


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


def _small_pieces(shuffled: Bytes, itemsize: int) -> list[Buffer]:
    """The smaller of the whole chunk searched and every plane coded in all ways."""
    whole = _piece(shuffled, _THOROUGH, final=True)
    if itemsize == 1 or shuffled.size < 2 * itemsize:
        return whole
    planes = _planes.plane_view(shuffled, itemsize)
    plans = [_CONSTANT if (plane == plane[0]).all() else _THOROUGH for plane in planes]
    return min(whole, _pieces(shuffled, itemsize, plans), key=_nbytes)


def _pieces(shuffled: Bytes, itemsize: int, plans: list[_Plan]) -> list[Buffer]:
    """The planes as raw deflate, the unshuffled tail with the last one."""
    count = shuffled.size // itemsize
    stop, pieces = 0, []
    for (_, plan), group in itertools.groupby(enumerate(plans), key=_grouping):
        start, stop = stop, stop + len(list(group))
        final = stop == itemsize
        end = shuffled.size if final else stop * count
        pieces += _piece(shuffled[start * count : end], plan, final=final)
    return pieces


def _grouping(numbered: tuple[int, _Plan]) -> tuple[int, _Plan]:
    index, plan = numbered
    return (-1 if plan.joins else index), plan


def _plans(planes: Bytes) -> list[_Plan]:
    """The codings that may be smallest for every plane, from what samples show."""
    plans: list[_Plan] = []
    elements_differ = False
    for plane, facts in zip(planes, _planes.survey(planes), strict=True):
        plans.append(_plan(plane, facts, elements_differ=elements_differ))
        # What repeats are whole elements, so one plane without repeats speaks for those behind it.
        elements_differ = elements_differ or plans[-1] in (_STORED, _DENSE)
    return plans


def _plan(plane: Bytes, facts: PlaneSurvey, *, elements_differ: bool) -> _Plan:
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


def _repeats(plane: Bytes, facts: PlaneSurvey) -> bool:
    return _planes.repeats(plane, facts.anchor) > _MIN_REPEATS


def _searches(plane: Bytes, facts: PlaneSurvey, simple: _Plan) -> tuple[_Coding, ...]:
    """The codings that find matches, if they win on a part of the plane."""
    start = max(plane.size - _TRIAL, 0) // 2
    trial = plane[start : start + _TRIAL]
    searched = _piece(trial, replace(simple, codings=(_Coding.SEARCH,)), final=True)
    if _nbytes(searched) > _MIN_GAIN * _nbytes(_piece(trial, simple, final=True)):
        return ()
    if facts.entropy < _MIN_ENTROPY_FOR_SHORT_SEARCH:
        return (_Coding.SEARCH,)
    return _Coding.SEARCH, _Coding.SHORT_SEARCH


def _piece(data: Bytes, plan: _Plan, *, final: bool) -> list[Buffer]:
    """The smallest coding of the plan, or stored blocks where nothing is smaller."""
    codings = (_deflated(data, coding, plan.mem_level, final=final) for coding in plan.codings)
    shortest = min(codings, key=_nbytes, default=None)
    if shortest is None or _nbytes(shortest) >= _stored_nbytes(data.size):
        return _stored(data, final=final)
    return shortest


def _nbytes(parts: list[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)


def _deflated(data: Bytes, coding: _Coding, mem_level: int, *, final: bool) -> list[Buffer]:
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
        return isal_zlib.compressobj(3, zlib.DEFLATED, RAW_DEFLATE, 9)
    level, strategy = _setting(coding)
    return library.compressobj(level, zlib.DEFLATED, RAW_DEFLATE, mem_level, strategy)


def _setting(coding: _Coding) -> tuple[int, int]:
    """Level and strategy of zlib-ng or zlib."""
    match coding:
        case _Coding.DENSE | _Coding.HUFFMAN:
            return 1, zlib.Z_HUFFMAN_ONLY
        case _Coding.RUNS:
            return 1, zlib.Z_RLE
        # zlib-ng's level 7 is as thorough as zlib's level 6, but sees no matches of three
        # bytes; its level 9 does.
        case _Coding.SHORT_SEARCH if ENGINES.zlib_ng:
            return 9, zlib.Z_DEFAULT_STRATEGY
        case _:
            return 7 if ENGINES.zlib_ng else 6, zlib.Z_DEFAULT_STRATEGY


def _stored(data: Bytes, *, final: bool) -> list[Buffer]:
    """RFC 1951, 3.2.4: blocks of a flag, the length, its complement, and the bytes themselves."""
    parts: list[Buffer] = []
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
