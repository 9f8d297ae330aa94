"""Structures that HDF5 finds things by: links of large groups, chunks of large datasets.

Each is written once and whole, so none of them has the free space that HDF5 leaves for growth.
Written after the HDF5 File Format Specification, version 3.0: III.A.2 (version 2 B-trees), III.G
(fractal heap), VII.C (fixed array).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.storage.hdf5.messages import PAGE_BITS, UNDEFINED, chunk_nbytes_width, link

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint32]


_START: Final = 0xDEADBEEF
_MASK: Final = 0xFFFFFFFF
_BLOCK_NBYTES: Final = 12
_ROTATIONS: Final = (4, 6, 8, 16, 19, 4)
# From so many equal lengths on, arrays are faster than integers.
_MIN_ALIKE: Final = 6


def checksums(blocks: Sequence[bytes]) -> list[int]:
    """The checksums of several blocks of bytes."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(blocks):
        by_length[len(block)].append(number)
    found = [0] * len(blocks)
    for length, numbers in by_length.items():
        if len(numbers) < _MIN_ALIKE or not length:
            values = [checksum(blocks[number]) for number in numbers]
        else:
            values = _checksums_of_one_length([blocks[number] for number in numbers], length)
        for number, value in zip(numbers, values, strict=True):
            found[number] = value
    return found


def checksum(block: bytes) -> int:
    """The checksum of one block of bytes."""
    if not block:
        return _START
    padded = block + bytes(-len(block) % _BLOCK_NBYTES)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    return _hash(words, (_START + len(block)) & _MASK)


def _checksums_of_one_length(blocks: list[bytes], length: int) -> list[int]:
    padding = bytes(-length % _BLOCK_NBYTES)
    rows = np.frombuffer(padding.join([*blocks, b""]), dtype="<u4").reshape(len(blocks), -1)
    words = np.ascontiguousarray(rows.T)
    a = np.full(len(blocks), (_START + length) & _MASK, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    last = len(words) - 3
    _mix_columns(a, b, c, words[:last])
    found: list[int] = _final(a + words[last], b + words[last + 1], c + words[last + 2]).tolist()
    return found


def _mix_columns(a: Words, b: Words, c: Words, words: Words) -> None:
    """What `_mix` does, for many states at once and in place; uint32 needs no masks."""
    left, right = np.empty_like(a), np.empty_like(a)
    steps = [
        (x, y, z, np.uint32(bits), np.uint32(32 - bits))
        for (x, y, z), bits in zip(2 * [(a, c, b), (b, a, c), (c, b, a)], _ROTATIONS, strict=True)
    ]
    for index in range(0, len(words), 3):
        a += words[index]
        b += words[index + 1]
        c += words[index + 2]
        for x, y, z, bits, others in steps:
            np.subtract(x, y, out=x)
            np.left_shift(y, bits, out=left)
            np.right_shift(y, others, out=right)
            np.bitwise_or(left, right, out=left)
            np.bitwise_xor(x, left, out=x)
            np.add(y, z, out=y)


def _hash(words: tuple[int, ...], start: int) -> int:
    """Hash words of 32 bits, a multiple of three and at least three of them."""
    a = b = c = start
    last = len(words) - 3
    for index in range(0, last, 3):
        a, b, c = _mix(
            a + words[index] & _MASK, b + words[index + 1] & _MASK, c + words[index + 2] & _MASK
        )
    final = a + words[last] & _MASK, b + words[last + 1] & _MASK, c + words[last + 2] & _MASK
    return int(_final(*final))


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


def _final(a: Any, b: Any, c: Any) -> Any:
    """The last scrambling, of integers or arrays."""
    c = (c ^ b) - (b << 14 & _MASK | b >> 18) & _MASK
    a = (a ^ c) - (c << 11 & _MASK | c >> 21) & _MASK
    b = (b ^ a) - (a << 25 & _MASK | a >> 7) & _MASK
    c = (c ^ b) - (b << 16 & _MASK | b >> 16) & _MASK
    a = (a ^ c) - (c << 4 & _MASK | c >> 28) & _MASK
    b = (b ^ a) - (a << 14 & _MASK | a >> 18) & _MASK
    return (c ^ b) - (b << 24 & _MASK | b >> 8) & _MASK


# Appends bytes to the file and returns their address.
Append = Callable[[bytes], int]

_MIN_HEAP_BLOCK_NBYTES: Final = 512
# Signature, version, address of the heap's header, offset in the heap, checksum.
_HEAP_BLOCK_HEAD: Final = struct.Struct("<4sBQII")
_HEAP_ID: Final = struct.Struct("<BIH")
_LARGEST_HEAP: Final = 1 << 32
# As long as a link may be; HDF5 gives larger objects storage of their own.
_LARGEST_OBJECT: Final = 65_535
_LINKS_BY_NAME: Final = 5
_RECORD: Final = struct.Struct("<I7s")
# Signature, version and type in front, the checksum behind.
_NODE_OVERHEAD: Final = 10
# Number of records of a leaf; each node has room for as many, and a root of leaves for so many.
_LEAF_RECORDS: Final = 20_000
_FILTERED_CHUNKS: Final = 1
_ARRAY_HEADER_NBYTES: Final = 28


def with_checksum(block: bytes) -> bytes:
    """A block of metadata and its checksum."""
    return block + checksum(block).to_bytes(4, "little")


def write_dense_links(links: dict[bytes, int], append: Append) -> tuple[int, int]:
    """Links of a group too large to list them in its header.

    Parameters
    ----------
    links
        Address by name.
    append
        Writes bytes behind the file's end.

    Returns
    -------
    tuple
        Addresses of the fractal heap that holds the links and of the B-tree of their names.
    """
    names = sorted(links)
    objects = [link(name, links[name]) for name in names]
    heap, ids = _write_heap(objects, append)
    hashes = checksums(names)
    # By hash, then by name, as HDF5 compares them.
    order = sorted(range(len(names)), key=lambda number: (hashes[number], names[number]))
    records = [_RECORD.pack(hashes[number], ids[number]) for number in order]
    return heap, _write_tree(records, append)


def _write_heap(objects: Sequence[bytes], append: Append) -> tuple[int, list[bytes]]:
    """A fractal heap of one direct block; its address and the ids of the objects."""
    ids, offset = [], _HEAP_BLOCK_HEAD.size
    for each in objects:
        ids.append(_HEAP_ID.pack(0, offset, len(each)))
        offset += len(each)
    nbytes = max(_MIN_HEAP_BLOCK_NBYTES, 1 << (offset - 1).bit_length())
    if nbytes > _LARGEST_HEAP // 2:
        message = f"{len(objects)} links take {offset} bytes, more than one group can hold"
        raise ValueError(message)
    # The block names its heap and the heap its block, so one address must be known before: the
    # header follows the block.
    body = b"".join(objects).ljust(nbytes - _HEAP_BLOCK_HEAD.size, b"\0")
    header_address = append(b"") + nbytes
    head = _HEAP_BLOCK_HEAD.pack(b"FHDB", 0, header_address, 0, 0)
    found = checksum(head + body)
    block = append(_HEAP_BLOCK_HEAD.pack(b"FHDB", 0, header_address, 0, found) + body)
    return append(_heap_header(len(objects), nbytes, block)), ids


def _heap_header(num_objects: int, block_nbytes: int, block: int) -> bytes:
    """Its fields are those of a heap whose root is a direct block and whose space is all used."""
    return with_checksum(
        b"FRHP"
        # version; lengths of ids and of filters; flags: direct blocks have checksums
        + struct.pack("<BHHB", 0, _HEAP_ID.size, 0, 2)
        # largest object; next id and tree of huge objects; free space and its manager
        + struct.pack("<IQQQQ", _LARGEST_OBJECT, 0, UNDEFINED, 0, UNDEFINED)
        # managed space, allocated space, next block, managed objects; huge and tiny objects
        + struct.pack("<8Q", block_nbytes, block_nbytes, 0, num_objects, 0, 0, 0, 0)
        # table width, first and largest direct block, bits of offsets, rows to begin with
        + struct.pack("<HQQHH", 4, block_nbytes, max(block_nbytes, 1 << 17), 32, 1)
        # root block, and no rows, since it is a direct one
        + struct.pack("<QH", block, 0)
    )


def _write_tree(records: Sequence[bytes], append: Append) -> int:
    """A version 2 B-tree of one leaf, or of a root and its leaves; its address."""
    node_nbytes = _NODE_OVERHEAD + _RECORD.size * min(len(records), _LEAF_RECORDS)
    if len(records) <= _LEAF_RECORDS:
        depth, root, num_in_root = 0, append(_leaf(records, node_nbytes)), len(records)
    else:
        node_nbytes, root, num_in_root = _write_root(records, append)
        depth = 1
    return append(
        with_checksum(
            b"BTHD"
            # version, type, node size, record size, depth, split and merge percentages
            + struct.pack("<BBIHHBB", 0, _LINKS_BY_NAME, node_nbytes, _RECORD.size, depth, 100, 40)
            + struct.pack("<QHQ", root, num_in_root, len(records))
        )
    )


def _leaf(records: Sequence[bytes], node_nbytes: int) -> bytes:
    head = b"BTLF" + bytes((0, _LINKS_BY_NAME))
    return with_checksum(head + b"".join(records)).ljust(node_nbytes, b"\0")


def _write_root(records: Sequence[bytes], append: Append) -> tuple[int, int, int]:
    """A root whose records part its leaves: node size, its address, and its number of records."""
    stride = _LEAF_RECORDS + 1
    leaves: list[Sequence[bytes]] = [
        records[start : start + _LEAF_RECORDS] for start in range(0, len(records), stride)
    ]
    separators = list(records[_LEAF_RECORDS::stride])
    # A separator needs a leaf behind it, which may not be empty.
    if len(leaves) == len(separators):
        leaves.append([])
        leaves[-1], separators[-1:] = [separators[-1]], [leaves[-2][-1]]
        leaves[-2] = leaves[-2][:-1]
    pointer_nbytes = 8 + 2
    body_nbytes = _RECORD.size * len(separators) + pointer_nbytes * len(leaves)
    node_nbytes = _NODE_OVERHEAD + max(_RECORD.size * _LEAF_RECORDS, body_nbytes)
    pointers = [struct.pack("<QH", append(_leaf(leaf, node_nbytes)), len(leaf)) for leaf in leaves]
    head = b"BTIN" + bytes((0, _LINKS_BY_NAME))
    root = with_checksum(head + b"".join(separators) + b"".join(pointers))
    return node_nbytes, append(root.ljust(node_nbytes, b"\0")), len(separators)


def write_fixed_array(
    addresses: Sequence[int], sizes: Sequence[int], raw_nbytes: int, append: Append
) -> int:
    """The index of a dataset of several filtered chunks.

    Parameters
    ----------
    addresses, sizes
        Where the chunks lie, in C order of the grid.
    raw_nbytes
        Size of a chunk before the filters.
    append
        Writes bytes behind the file's end.

    Returns
    -------
    int
        Address of its header.
    """
    width = chunk_nbytes_width(raw_nbytes)
    entries = [
        address.to_bytes(8, "little") + size.to_bytes(width, "little") + bytes(4)
        for address, size in zip(addresses, sizes, strict=True)
    ]
    per_page = 1 << PAGE_BITS
    pages = [
        b"".join(entries[start : start + per_page]) for start in range(0, len(entries), per_page)
    ]
    header_nbytes = 28
    header_address = append(b"")
    data_address = header_address + header_nbytes
    entry_nbytes = 8 + width + 4
    header = (
        b"FAHD"
        + struct.pack("<BBBB", 0, _FILTERED_CHUNKS, entry_nbytes, PAGE_BITS)
        + struct.pack("<QQ", len(entries), data_address)
    )
    head = b"FADB" + struct.pack("<BBQ", 0, _FILTERED_CHUNKS, header_address)
    append(with_checksum(header))
    append(b"".join(_array_block(head, pages)))
    return header_address


def _array_block(head: bytes, pages: Sequence[bytes]) -> Iterable[bytes]:
    """One page needs no table of pages; of several, each has a checksum of its own."""
    if len(pages) == 1:
        return [with_checksum(head + pages[0])]
    written = (1 << len(pages)) - 1 << -len(pages) % 8
    bitmap = written.to_bytes((len(pages) + 7) // 8, "big")
    return [with_checksum(head + bitmap), *map(with_checksum, pages)]
