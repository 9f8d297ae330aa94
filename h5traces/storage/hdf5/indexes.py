"""HDF5's indexes: of the links of large groups and of the chunks of large datasets.

Each is written once and whole, without the free space that HDF5 leaves for growth.
Written after the HDF5 File Format Specification, version 3.0: III.A.2 (version 2 B-trees), III.G
(fractal heap), VII.C (fixed array).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from h5traces.format.native import NATIVE
from h5traces.storage.hdf5.messages import (
    PAGE_BITS,
    UNDEFINED,
    byte_width,
    chunk_nbytes_width,
    link,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_START: Final = 0xDEADBEEF
_MASK: Final = 0xFFFFFFFF
_BLOCK_NBYTES: Final = 12


def checksums(blocks: Sequence[bytes]) -> list[int]:
    """The checksums of several blocks of bytes."""
    if NATIVE is not None:
        found: list[int] = NATIVE.lookup3(list(blocks))
        return found
    return [checksum(block) for block in blocks]


def checksum(block: bytes) -> int:
    """The checksum of one block of bytes."""
    if not block:
        return _START
    padded = block + bytes(-len(block) % _BLOCK_NBYTES)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    a = b = c = (_START + len(block)) & _MASK
    last = len(words) - 3
    for index in range(0, last, 3):
        a, b, c = _mix(
            a + words[index] & _MASK, b + words[index + 1] & _MASK, c + words[index + 2] & _MASK
        )
    final = a + words[last] & _MASK, b + words[last + 1] & _MASK, c + words[last + 2] & _MASK
    return _final(*final)


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    a = (a - c & _MASK) ^ (c << 4 & _MASK | c >> 28)
    c = c + b & _MASK
    b = (b - a & _MASK) ^ (a << 6 & _MASK | a >> 26)
    a = a + c & _MASK
    c = (c - b & _MASK) ^ (b << 8 & _MASK | b >> 24)
    b = b + a & _MASK
    a = (a - c & _MASK) ^ (c << 16 & _MASK | c >> 16)
    c = c + b & _MASK
    b = (b - a & _MASK) ^ (a << 19 & _MASK | a >> 13)
    a = a + c & _MASK
    c = (c - b & _MASK) ^ (b << 4 & _MASK | b >> 28)
    b = b + a & _MASK
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = (c ^ b) - (b << 14 & _MASK | b >> 18) & _MASK
    a = (a ^ c) - (c << 11 & _MASK | c >> 21) & _MASK
    b = (b ^ a) - (a << 25 & _MASK | a >> 7) & _MASK
    c = (c ^ b) - (b << 16 & _MASK | b >> 16) & _MASK
    a = (a ^ c) - (c << 4 & _MASK | c >> 28) & _MASK
    b = (b ^ a) - (a << 14 & _MASK | a >> 18) & _MASK
    return (c ^ b) - (b << 24 & _MASK | b >> 8) & _MASK


# Appends bytes to the file and returns their address.
Append = Callable[[bytes], int]

# HDF5 reads whole blocks of a heap and whole nodes of a tree to find one link, so both are small. A
# heap has four blocks in a row: two rows of this size, four rows that double it each, then rows of
# indirect blocks, which have rows themselves.
_FIRST_BLOCK_NBYTES: Final = 1 << 10
_BLOCKS_PER_ROW: Final = 4
_NUM_DIRECT_ROWS: Final = 6
_LARGEST_NODE_NBYTES: Final = 2 << 10
_HEAP_HEADER_NBYTES: Final = 146
# Signature, version, address of the heap's header, offset in the heap.
_BLOCK_HEAD: Final = struct.Struct("<4sBQI")
_CHECKSUM_NBYTES: Final = 4
_BLOCK_OVERHEAD: Final = _BLOCK_HEAD.size + _CHECKSUM_NBYTES
_HEAP_ID: Final = struct.Struct("<BIH")
_LARGEST_HEAP: Final = 1 << 32
# HDF5's own choice; larger objects that it adds are stored apart.
_LARGEST_OBJECT: Final = 4096
_LINKS_BY_NAME: Final = 5
_RECORD: Final = struct.Struct("<I7s")
# Signature, version and type first, the checksum last.
_NODE_OVERHEAD: Final = 10
_FILTERED_CHUNKS: Final = 1
_ARRAY_HEADER_NBYTES: Final = 28


def with_checksum(block: bytes) -> bytes:
    """A block of metadata and its checksum."""
    return block + checksum(block).to_bytes(4, "little")


def write_dense_links(links: dict[bytes, int], append: Append) -> tuple[int, int]:
    """Links (address by name) of a group too large to list them in its header.

    Returns the addresses of the fractal heap that holds the links and of the B-tree of their names.
    """
    names = sorted(links)
    heap = _Heap(append(b""), [link(name, links[name]) for name in names])
    append(heap.encoded())
    hashes = checksums(names)
    # By hash, then by name, as HDF5 compares them.
    order = sorted(range(len(names)), key=lambda number: (hashes[number], names[number]))
    records = [_RECORD.pack(hashes[number], heap.ids[number]) for number in order]
    return heap.address, _write_tree(records, append)


@dataclass(slots=True)
class _Block:
    """A direct block of a heap: its offset in the heap, its size and its objects."""

    offset: int
    nbytes: int
    objects: list[bytes] = field(default_factory=list)


class _Heap:
    """A fractal heap in one piece: its header, direct blocks, indirect blocks."""

    def __init__(self, address: int, objects: Sequence[bytes]) -> None:
        self.address = address
        self.ids: list[bytes] = []
        self._longest = max(map(len, objects))
        # Every block has room for every object, so none is skipped.
        needed = _BLOCK_OVERHEAD + self._longest
        self._first_nbytes = max(_FIRST_BLOCK_NBYTES, 1 << (needed - 1).bit_length())
        self._blocks = list(self._filled(objects))
        self._end = self._blocks[-1].offset + self._blocks[-1].nbytes
        if self._end > _LARGEST_HEAP // 2:
            message = f"{len(objects)} links take {self._end} bytes, more than one group can hold"
            raise ValueError(message)
        self._parts: list[bytes] = []
        self._position = address + _HEAP_HEADER_NBYTES

    def _filled(self, objects: Sequence[bytes]) -> Iterator[_Block]:
        """The direct blocks; notes the ids of the objects."""
        sizes = self._block_sizes(itertools.count())
        block, position = _Block(0, next(sizes)), _BLOCK_OVERHEAD
        for each in objects:
            if position + len(each) > block.nbytes:
                yield block
                block = _Block(block.offset + block.nbytes, next(sizes))
                position = _BLOCK_OVERHEAD
            block.objects.append(each)
            self.ids.append(_HEAP_ID.pack(0, block.offset + position, len(each)))
            position += len(each)
        yield block

    def _block_sizes(self, rows: Iterable[int]) -> Iterator[int]:
        """Sizes of the direct blocks in rows, by their offsets."""
        for row in rows:
            for _ in range(_BLOCKS_PER_ROW):
                if row < _NUM_DIRECT_ROWS:
                    yield self._row_nbytes(row)
                else:
                    yield from self._block_sizes(range(_rows_inside(row)))

    def _row_nbytes(self, row: int) -> int:
        """Size of each block in a row."""
        return self._first_nbytes << max(0, row - 1)

    def encoded(self) -> bytes:
        """All of its bytes."""
        addresses = {
            block.offset: self._place(encoded)
            for block, encoded in zip(self._blocks, self._direct_blocks(), strict=True)
        }
        num_rows, root = 0, addresses[0]
        if len(addresses) > 1:
            # Each row but the first doubles the heap.
            row_nbytes = _BLOCKS_PER_ROW * self._first_nbytes
            num_rows = 1 + ((self._end - 1) // row_nbytes).bit_length()
            root = self._place_indirect(num_rows, 0, addresses)
        return b"".join([self._header(root, num_rows), *self._parts])

    def _place(self, part: bytes) -> int:
        """Append a part; its address."""
        self._parts.append(part)
        self._position += len(part)
        return self._position - len(part)

    def _direct_blocks(self) -> Iterator[bytes]:
        """The blocks with their checksums, which are taken with zeros in their place."""
        blocks = []
        for each in self._blocks:
            head = _BLOCK_HEAD.pack(b"FHDB", 0, self.address, each.offset)
            parts = (head, bytes(_CHECKSUM_NBYTES), *each.objects)
            blocks.append(b"".join(parts).ljust(each.nbytes, b"\0"))
        for block, found in zip(blocks, checksums(blocks), strict=True):
            stored = found.to_bytes(_CHECKSUM_NBYTES, "little")
            yield block[: _BLOCK_HEAD.size] + stored + block[_BLOCK_OVERHEAD:]

    def _place_indirect(self, num_rows: int, offset: int, addresses: dict[int, int]) -> int:
        """Append an indirect block at `offset` after those that it points to; its address.

        `addresses` are those of the direct blocks by their offsets.
        """
        entries, position = [], offset
        for row in range(num_rows):
            for _ in range(_BLOCKS_PER_ROW):
                if row < _NUM_DIRECT_ROWS or position >= self._end:
                    entries.append(addresses.get(position, UNDEFINED))
                else:
                    entries.append(self._place_indirect(_rows_inside(row), position, addresses))
                position += self._row_nbytes(row)
        head = _BLOCK_HEAD.pack(b"FHIB", 0, self.address, offset)
        return self._place(with_checksum(head + struct.pack(f"<{len(entries)}Q", *entries)))

    def _header(self, root: int, num_rows: int) -> bytes:
        """The header; a root of no rows is a direct block."""
        sizes = list(self._block_sizes(range(num_rows))) or [self._first_nbytes]
        used = _BLOCK_OVERHEAD * len(sizes) + sum(
            len(data) for block in self._blocks for data in block.objects
        )
        allocated = sum(block.nbytes for block in self._blocks)
        next_block = self._end if num_rows else 0
        largest_block = self._row_nbytes(_NUM_DIRECT_ROWS - 1)
        return with_checksum(
            b"FRHP"
            # version; lengths of ids and of filters; flags: direct blocks have checksums
            + struct.pack("<BHHB", 0, _HEAP_ID.size, 0, 2)
            # largest object; next id and tree of huge objects; free space and its manager
            + struct.pack("<IQQ", max(_LARGEST_OBJECT, self._longest), 0, UNDEFINED)
            + struct.pack("<QQ", sum(sizes) - used, UNDEFINED)
            # managed space, allocated space, next block, managed objects; huge and tiny objects
            + struct.pack("<8Q", sum(sizes), allocated, next_block, len(self.ids), 0, 0, 0, 0)
            # table width, first and largest direct block, bits of offsets, rows to begin with
            + struct.pack("<HQQHH", _BLOCKS_PER_ROW, self._first_nbytes, largest_block, 32, 1)
            # root block and its rows
            + struct.pack("<QH", root, num_rows)
        )


def _rows_inside(row: int) -> int:
    """Rows of an indirect block that stands in a row."""
    return row - _BLOCKS_PER_ROW.bit_length() + 1


def _write_tree(records: list[bytes], append: Append) -> int:
    """A version 2 B-tree of sorted records; its address.

    Built from its leaves up: the records that part the nodes of a level are those of the next.
    """
    num_records = len(records)
    capacity = min(num_records, (_LARGEST_NODE_NBYTES - _NODE_OVERHEAD) // _RECORD.size)
    node_nbytes = _NODE_OVERHEAD + _RECORD.size * capacity
    count_width, total_width = byte_width(capacity), 0
    most_below = capacity
    totals, pointers = [0] * (num_records + 1), [b""] * (num_records + 1)
    for depth in itertools.count():
        parts = _parted(len(records), capacity)
        nodes = [
            (b"BTIN" if depth else b"BTLF")
            + bytes((0, _LINKS_BY_NAME))
            + b"".join([*records[part], *pointers[part.start : part.stop + 1]])
            for part in parts
        ]
        address = append(
            b"".join(
                (node + found.to_bytes(_CHECKSUM_NBYTES, "little")).ljust(node_nbytes, b"\0")
                for node, found in zip(nodes, checksums(nodes), strict=True)
            )
        )
        counts = [part.stop - part.start for part in parts]
        if len(parts) == 1:
            break
        totals = [
            count + sum(totals[part.start : part.stop + 1])
            for count, part in zip(counts, parts, strict=True)
        ]
        pointers = [
            (address + node_nbytes * number).to_bytes(8, "little")
            + count.to_bytes(count_width, "little")
            + (total.to_bytes(total_width, "little") if total_width else b"")
            for number, (count, total) in enumerate(zip(counts, totals, strict=True))
        ]
        records = [records[part.stop] for part in parts[:-1]]
        # A node has one pointer more than it has records.
        width = len(pointers[0])
        capacity = (node_nbytes - _NODE_OVERHEAD - width) // (_RECORD.size + width)
        most_below = (capacity + 1) * most_below + capacity
        total_width = byte_width(most_below)
    return append(
        with_checksum(
            b"BTHD"
            # version, type, node size, record size, depth, split and merge percentages
            + struct.pack("<BBIHHBB", 0, _LINKS_BY_NAME, node_nbytes, _RECORD.size, depth, 100, 40)
            + struct.pack("<QHQ", address, counts[0], num_records)
        )
    )


def _parted(num_records: int, capacity: int) -> list[slice]:
    """As few nodes as hold the records, evenly, with one record between each two of them."""
    num_nodes = -(-(num_records + 1) // (capacity + 1))
    bounds = [(num_records + 1) * number // num_nodes for number in range(num_nodes + 1)]
    return [slice(start, stop - 1) for start, stop in itertools.pairwise(bounds)]


def write_fixed_array(
    addresses: Sequence[int], sizes: Sequence[int], raw_nbytes: int, append: Append
) -> int:
    """The index of several filtered chunks, in C order of the grid; the address of its header."""
    width = chunk_nbytes_width(raw_nbytes)
    entries = [
        address.to_bytes(8, "little") + size.to_bytes(width, "little") + bytes(4)
        for address, size in zip(addresses, sizes, strict=True)
    ]
    per_page = 1 << PAGE_BITS
    pages = [
        b"".join(entries[start : start + per_page]) for start in range(0, len(entries), per_page)
    ]
    header_address = append(b"")
    data_address = header_address + _ARRAY_HEADER_NBYTES
    entry_nbytes = 8 + width + 4
    header = (
        b"FAHD"
        + struct.pack("<BBBB", 0, _FILTERED_CHUNKS, entry_nbytes, PAGE_BITS)
        + struct.pack("<QQ", len(entries), data_address)
    )
    head = b"FADB" + struct.pack("<BBQ", 0, _FILTERED_CHUNKS, header_address)
    append(with_checksum(header))
    # A single page needs no table of pages; several pages have a checksum each.
    if len(pages) == 1:
        append(with_checksum(head + pages[0]))
    else:
        written = (1 << len(pages)) - 1 << -len(pages) % 8
        bitmap = written.to_bytes((len(pages) + 7) // 8, "big")
        append(b"".join([with_checksum(head + bitmap), *map(with_checksum, pages)]))
    return header_address
