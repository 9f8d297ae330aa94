"""Headers of samples whose objects differ in digests and chunks alone, compared in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.format import layout
from h5traces.format.digests import DIGEST
from h5traces.storage.hdf5.messages import (
    attribute_name,
    attribute_start,
    group_messages,
    layout_address,
    link_message,
    link_target,
    messages_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from h5traces.storage.footer_rows import FooterRow

    Bytes = NDArray[np.uint8]

RANGE_NAME: Final = layout.IMAGE_RANGE.encode() + b"\0"
_DIGEST_NAME: Final = DIGEST.encode() + b"\0"
_DIGEST_NBYTES: Final = 32
# How far before the end of a message: the address in a link, or of a single chunk, and its size.
_TO_ADDRESS, _TO_SIZE = 8, 20


class Header(NamedTuple):
    """The header of an object: the bytes before its body, and the body."""

    prefix_nbytes: int
    body: bytes


class HeaderPattern:
    """The bytes of a sample's headers that like samples share, from `start` to its group's header.

    Other samples of the same form have the same bytes where `Hdf5Writer` wrote both. `block` are
    those bytes, `group` is the body of the group's header.
    """

    def __init__(self, start: int, block: bytes, group: bytes) -> None:
        self.nbytes = len(block)
        self._start, self._group = start, start + len(block)
        self._known: Bytes = np.frombuffer(block, np.uint8).copy()
        # Which bits are compared.
        self._mask: Bytes = np.zeros(len(block), np.uint8)
        # Names of the group's links in order, and how far before the group their targets are.
        links = filter(None, map(link_target, messages_of(group)))
        self._links = [(name, self._group - address) for name, address in links]
        # What differs between samples, by place among the bytes: addresses and sizes of chunks by
        # number of the chunk, digests by number of the object, links by distance of their targets.
        self._addresses: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._digests: dict[int, int] = {}
        self._targets: dict[int, int] = {}

    def add(self, address: int, header: Header, row: FooterRow, place: int) -> None:
        """Add the header of an object, which was compared with its place in the row.

        ValueError where other samples may differ in more.
        """
        first = address - self._start
        position = first + header.prefix_nbytes
        if first < 0 or position + len(header.body) > self.nbytes:
            msg = "the header does not lie before that of its group"
            raise ValueError(msg)
        self._mask[first : position + len(header.body)] = 0xFF
        chunk, next_chunk = row.form.chunk_ends[place : place + 2].tolist()
        for message in messages_of(header.body):
            begin, position = position, position + len(message)
            name, target = attribute_name(message), link_target(message)
            if layout_address(message) is not None and next_chunk > chunk:
                if next_chunk > chunk + 1:
                    msg = "the index of several chunks lies elsewhere"
                    raise ValueError(msg)
                self._addresses[position - _TO_ADDRESS] = chunk
                self._sizes[position - _TO_SIZE] = chunk
            elif name == _DIGEST_NAME and row.with_digest[place]:
                self._digests[position - _DIGEST_NBYTES] = place
            elif name == RANGE_NAME:
                self._mask[begin + attribute_start(message) : position] = 0
            elif target is not None:
                self._targets[position - _TO_ADDRESS] = self._group - target[1]

    def group(self, address: int) -> Iterator[bytes]:
        """What the header of the group at an address holds, but attributes."""
        yield group_messages()
        for name, distance in self._links:
            yield link_message(name, address - distance)

    def fits(self, block: bytes, address: int, row: FooterRow) -> bool:
        """Whether the bytes before the group at an address are those of the sample in `row`."""
        offsets, sizes, _ = row.chunks
        digests: NDArray[Any] = np.frombuffer(row.digests.encode(), f"S{_DIGEST_NBYTES}")
        expected = self._known.copy()
        for places, values, dtype in (
            (self._addresses, offsets, "<i8"),
            (self._sizes, sizes, "<i8"),
            (self._targets, None, "<i8"),
            (self._digests, digests, digests.dtype.str),
        ):
            numbers = np.array(list(places.values()), np.int64)
            own = address - numbers if values is None else values[numbers]
            width = own.dtype.itemsize
            holes = np.array(list(places), np.int64)[:, np.newaxis] + np.arange(width)
            expected[holes] = own.astype(dtype, copy=False).view(np.uint8).reshape(-1, width)
        return not ((np.frombuffer(block, np.uint8) ^ expected) & self._mask).any()
