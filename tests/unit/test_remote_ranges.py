"""Ranges are joined without losing a byte; what is kept on disk is what was fetched."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from h5traces.storage.remote.file import RangeCache
from h5traces.storage.remote.paths import Blocks, ByteRange, RemotePath, Reply, coalesce, is_url

DATA = bytes(index * 7 % 251 for index in range(400))
ranges = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 100)).map(lambda each: ByteRange(*each)),
    min_size=1,
    max_size=20,
)


@given(ranges, st.integers(0, 60), st.integers(1, 500))
def test_every_range_is_found_in_what_is_fetched(
    wanted: list[ByteRange], gap: int, most: int
) -> None:
    joined = coalesce(wanted, max_gap_nbytes=gap, max_nbytes=most)
    assert joined == sorted(joined)
    longest = max(each.nbytes for each in wanted)
    assert all(each.nbytes <= max(most, longest) for each in joined)
    blocks = Blocks([(each.offset, DATA[each.offset : each.stop]) for each in joined])
    for each in wanted:
        assert blocks.find(each) == DATA[each.offset : each.stop]
    for before, after in itertools.pairwise(joined):
        # Neither could have gone with the other.
        assert after.offset - before.stop > gap or after.stop - before.offset > most


@given(ranges)
def test_without_a_limit_near_ranges_are_one(wanted: list[ByteRange]) -> None:
    first, stop = min(each.offset for each in wanted), max(each.stop for each in wanted)
    joined = coalesce(wanted, max_gap_nbytes=1000, max_nbytes=1000)
    assert joined == [ByteRange(first, stop - first)]


@given(ranges, ranges)
def test_the_cache_gives_back_what_it_kept(kept: list[ByteRange], others: list[ByteRange]) -> None:
    tail = Reply(DATA[-50:], len(DATA), '"etag"')
    with tempfile.TemporaryDirectory() as name:
        path = RemotePath("s3://bucket/a.h5")
        RangeCache(Path(name), path, tail).keep(
            {each: DATA[each.offset : each.stop] for each in kept}
        )
        again = RangeCache(Path(name), path, tail)
        for each in kept:
            assert again.find(each) == DATA[each.offset : each.stop]
        for each in set(others) - set(kept):
            assert again.find(each) is None
        # Another version of the object, or another object, knows nothing of it.
        for other in (
            RangeCache(Path(name), path, Reply(tail.data, tail.total_nbytes, '"other"')),
            RangeCache(Path(name), path, Reply(tail.data, tail.total_nbytes + 1, '"etag"')),
            RangeCache(Path(name), path, Reply(b"other", tail.total_nbytes, '"etag"')),
            RangeCache(Path(name), RemotePath("s3://bucket/b.h5"), tail),
        ):
            assert other.find(kept[0]) is None


def test_addresses() -> None:
    assert is_url("s3://bucket/a.h5")
    assert is_url("https://host/a.h5")
    assert not is_url("c://folder/a.h5")
    assert not is_url("folder/a.h5")
    assert not is_url(Path("s3:/bucket/a.h5"))
    web = RemotePath("https://user:secret@host/run%20a.h5?signature=secret")
    assert str(web) == "https://…host/run%20a.h5?…"
    assert web.name == "run a.h5"
    assert web.suffix == ".h5"
    assert not web.is_pattern
    assert RemotePath("https://host/*.h5").is_pattern
    assert RemotePath("s3://bucket/run-0?.h5").is_pattern
