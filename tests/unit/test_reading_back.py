"""A conversion notices what encoder, memory or disk did wrong before it names a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import make_batch, write_batch

import h5traces
from h5traces.archive.footer_store import FooterStore
from h5traces.errors import CorruptArchiveError
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage import arrays, footer_rows
from h5traces.storage.codecs import GZIP
from h5traces.storage.files import LocalFile
from h5traces.writing import archive_writer, preparation, reading_back
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # As if its samples were large.
    monkeypatch.setattr(archive_writer, "_LARGE_SAMPLE", 0)
    return write_batch(tmp_path / "batch.pkl", make_batch("full_gz"))


def failure(source: Path, **options: Any) -> str:
    """The message of a conversion that must fail; it leaves nothing."""
    report = h5traces.convert(source, source.with_name("out.h5"), **options)
    assert not report.ok
    assert [each.name for each in source.parent.iterdir()] == [source.name]
    return str(report.files[0].error)


@pytest.fixture
def after_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Have something happen to the file when all of it is on disk."""

    def arrange(change: Callable[[Path], None]) -> None:
        finish = ArchiveWriter.finish

        def finished(writer: ArchiveWriter, **given: Any) -> Any:
            found = finish(writer, **given)
            change(writer.part_path)
            return found

        monkeypatch.setattr(ArchiveWriter, "finish", finished)

    return arrange


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def entry_of(path: Path, name: str) -> Any:
    return FooterStore(LocalFile(path), DEFAULT_LIMITS).sample(3).objects[name]


def test_a_bit_of_a_chunk_that_changed_on_disk(source: Path, after_writing: Any) -> None:
    name = "attentions/layer_002"
    after_writing(lambda path: flip(path, entry_of(path, name).chunks.offsets[0] + 9))
    assert f"/samples/00000003/{name} reads back with other" in failure(source)


def test_a_bit_between_chunks_that_changed_on_disk(source: Path, after_writing: Any) -> None:
    def change(path: Path) -> None:
        objects = FooterStore(LocalFile(path), DEFAULT_LIMITS).sample(3).objects.values()
        ranges = [each for entry in objects if entry.chunks for each in entry.chunks.ranges]
        # Of an object header, behind the last chunk of the sample.
        flip(path, max(offset + size for offset, size in ranges) + 40)

    after_writing(change)
    assert "out.h5" in failure(source)


def test_an_encoder_that_is_wrong(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = arrays.encode_array

    def wrong(values: Any, codec: str) -> Any:
        found = right(values, codec)
        return right(values + values.dtype.type(1), codec) if values.dtype == "<f2" else found

    monkeypatch.setattr(arrays, "NATIVE", None)
    monkeypatch.setattr(arrays, "encode_array", wrong)
    message = failure(source, precision=PrecisionOptions(dtype="auto"))
    assert "/samples/00000000: hidden_states/layer_000 was encoded to bytes" in message
    assert "run again" in message


def test_an_encoder_whose_bytes_cannot_be_decoded() -> None:
    assert not arrays._decodes_to(b"no zlib stream", np.ones(3, "<f2"), GZIP.name)


def test_a_digest_that_is_wrong(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = arrays._stored_plainly
    monkeypatch.setattr(arrays, "NATIVE", None)
    monkeypatch.setattr(
        arrays, "_stored_plainly", lambda each: right(each)._replace(digest="0" * 32)
    )
    assert "or has a wrong digest" in failure(source)


@pytest.mark.skipif(arrays.NATIVE is None, reason="the kernels are not compiled")
def test_kernels_that_encode_wrongly(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """Kernels of which one says that what it encoded does not come back."""

        def __getattr__(self, name: str) -> Any:
            return getattr(right, name)

        def store(self, *given: Any) -> Any:
            return [(*each[:-1], 0 if each[-1] == 1 else each[-1]) for each in right.store(*given)]

    right: Any = arrays.NATIVE
    monkeypatch.setattr(arrays, "NATIVE", Wrong())
    assert "was encoded to bytes that decode to other values" in failure(source)


def test_what_the_index_says_otherwise_is_read_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = FooterStore.begin

    def noted(store: FooterStore, wanted: Any, *given: Any, **more: Any) -> Any:
        begun.extend(sample.ordinal for sample, _ in wanted)
        return begin(store, wanted, *given, **more)

    monkeypatch.setattr(FooterStore, "begin", noted)
    assert h5traces.convert(source, source.with_name("one.h5")).ok
    assert not begun
    # As if another sample had been looked back at than the index lists.
    right = reading_back.fingerprint
    monkeypatch.setattr(reading_back, "fingerprint", lambda entries: right(entries) + 1)
    report = h5traces.convert(source, source.with_name("two.h5"))
    assert report.ok
    assert begun == list(range(report.files[0].num_samples))


def test_without_verification_nothing_is_looked_at(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "_looked_back", None)
    report = h5traces.convert(
        source, source.with_name("out.h5"), target=TargetOptions(verify=False)
    )
    assert report.ok


def test_small_samples_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_batch(tmp_path / "batch.pkl", make_batch("full_gz"))
    looked: list[bool] = []
    right = arrays.store_arrays
    monkeypatch.setattr(
        preparation,
        "store_arrays",
        lambda given, looks_back=False: (looked.append(looks_back), right(given))[1],
    )
    assert h5traces.convert(source, source.with_name("out.h5")).ok
    assert looked
    assert not any(looked)


def test_an_index_with_other_chunks_than_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = footer_rows.RowPacker._numbers

    def wrong(packer: Any, form: Any) -> Any:
        found = numbers(packer, form)
        if form.shape == form.chunk:
            return found
        # As many chunks, which are longer and narrower.
        return found._replace(
            chunk_dims=np.array([700, form.chunk[0] * 4096 // 700 + 1], "<i8").tobytes()
        )

    monkeypatch.setattr(footer_rows.RowPacker, "_numbers", wrong)
    states = np.zeros((700, 4096), np.float32)
    path = tmp_path / "out.h5"
    with (
        pytest.raises(CorruptArchiveError),
        h5traces.create(path, spool=False, precision=PrecisionOptions(dtype="float32")) as writer,
    ):
        writer.append({"question_id": "a", "hidden_states": [states]})
    assert not path.exists()
