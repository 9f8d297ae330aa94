"""Bounds on what a pickle may ask for while it is read.

Pickles are programs, and a short one can ask for a lot of memory or time. The defaults leave room
for every honest batch that is known (and for samples of several gigabytes) and stop the rest with
a message that names the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PickleLimits:
    """Limits of the pickle reader; "item" is one element of the batch.

    Attributes
    ----------
    max_item_opcodes
        Opcodes executed for one item, those of embedded torch storages included.
    max_item_memo
        Memo entries written by one item.
    max_mark_depth
        Marks open at the same time.
    max_depth
        Levels of lists, tuples and dicts inside an item.
    max_payload_nbytes
        Bytes of one array, bytes or bytearray object.
    max_string_nbytes
        Bytes of one encoded string; protocols 0 to 2 store arrays as strings.
    max_item_nbytes
        Bytes of all arrays, bytes and strings of one item.
    max_created_ratio, max_created_nbytes
        Bytes that shims may create by copying (expanded tensors, decoded strings) per item: the
        ratio times what was read, plus the constant. A stride of 0 makes terabytes of nothing.
    max_portion_items
        Items written before they are appended to the list; picklers append after 1000.
    max_kept_entries, max_kept_nbytes
        Memo entries kept because later items share them.
    max_unfolded_ratio, unfolded_grace_nbytes
        Bytes of all items, every use of a shared object counted, per byte of pickle, plus the
        constant. A megabyte that a hundred thousand arrays share would fill a disk when written.
    max_expansion, expansion_grace_nbytes
        Inflated bytes per compressed byte of a gzip file, once that many bytes were inflated.
        Deflate reaches 1032; float16 traces stay below 10, a batch of zeros reaches it.
    """

    max_item_opcodes: int = 2_000_000
    max_item_memo: int = 1_000_000
    max_mark_depth: int = 256
    max_depth: int = 64
    max_payload_nbytes: int = 4 * GIB
    max_string_nbytes: int = 512 * MIB
    max_item_nbytes: int = 16 * GIB
    max_created_ratio: int = 4
    max_created_nbytes: int = 64 * MIB
    max_portion_items: int = 100_000
    max_kept_entries: int = 200_000
    max_kept_nbytes: int = 2 * GIB
    max_unfolded_ratio: int = 50
    unfolded_grace_nbytes: int = 256 * MIB
    max_expansion: int = 300
    expansion_grace_nbytes: int = 64 * MIB
