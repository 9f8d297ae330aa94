"""h5traces through its public API: the writer, ``h5traces.open`` and ``Archive.read``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from suite.formats.base import Format, Sample
from suite.formats.hdf5 import Hdf5
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from h5traces.format.record import TraceRecord

# Samples that one call of `Archive.read` returns together, as a data loader would ask for.
_READ_BATCH = 4


class Archive(Format):
    """One codec of h5traces.

    Parameters
    ----------
    codec
        Its name.
    workers
        Threads: 1 also means reading array by array in a plain loop; None means one per core, and
        reading by ``Archive.read``.
    """

    modules = ("h5traces", "h5traces.writing")
    suffix: ClassVar[str] = ".h5"

    def __init__(self, codec: str, workers: int | None) -> None:
        self._codec, self._workers = codec, workers
        self.name = archive_name(codec, threaded=workers is None)

    def write(self, samples: Iterable[Sample], path: Path) -> None:
        from h5traces.writing.archive_writer import ArchiveWriter
        from h5traces.writing.options import WriteOptions

        options = WriteOptions(codec=self._codec, workers=self._workers, verify=False)
        # Leaving the block makes the file durable and gives it its name.
        with ArchiveWriter(path, options, model_id="synthetic") as writer:
            for sample in samples:
                writer.append(to_record(sample))

    def scan(self, path: Path) -> None:
        import h5traces

        with h5traces.open(path) as archive:
            if self._workers is None:
                for start in range(0, len(archive), _READ_BATCH):
                    archive.read(range(start, min(start + _READ_BATCH, len(archive))))
                return
            for trace in archive:
                for kind in KINDS:
                    for array in trace[kind]:
                        del array

    @contextlib.contextmanager
    def reader(self, path: Path) -> Iterator[Any]:
        import h5traces

        with h5traces.open(path) as archive:

            def read(index: int, layer: int) -> list[Any]:
                trace = archive[index]
                return [trace[kind][layer] for kind in KINDS]

            yield read

    def count(self, path: Path) -> int:
        import h5traces

        with h5traces.open(path) as archive:
            return len(archive)


class ReadByStockHdf5(Hdf5):
    """An h5traces archive in the hands of stock h5py: what a colleague without h5traces gets."""

    def __init__(self) -> None:
        super().__init__("h5traces gzip, read by stock h5py", dict, whole=True)
        self.written_by = archive_name("gzip", threaded=False)


def archive_name(codec: str, *, threaded: bool) -> str:
    """The name in the report."""
    return f"h5traces {codec}, {'all cores' if threaded else '1 thread'}"


def codecs() -> tuple[str, ...]:
    """The codecs that h5traces offers for hidden states and attentions."""
    from h5traces.storage.codecs import ArrayCodec

    return get_args(ArrayCodec)


def archives() -> tuple[Archive, ...]:
    """Every codec with one thread and with all."""
    return tuple(Archive(codec, workers) for codec in codecs() for workers in (1, None))


def to_record(sample: Sample) -> TraceRecord:
    """A legacy dict as what the writer takes, without going through the importer."""
    from h5traces.format import layout
    from h5traces.format.dtypes import TypedArray
    from h5traces.format.record import LayerArray, LayeredArrays, TraceRecord

    last = len(sample[layout.HIDDEN_STATES]) - 1

    def site(kind: str, layer: int) -> str | None:
        if kind != layout.HIDDEN_STATES:
            return None
        return layout.SITE_FINAL_NORM if layer == last else layout.SITE_BLOCK_OUTPUT

    return TraceRecord(
        sample_id=sample["question_id"],
        fields=tuple(sample),
        tokens=sample["tokens"],
        tokens_decoded=tuple(sample["tokens_decoded"]),
        texts={"generated_answer_clean": sample["generated_answer_clean"]},
        layered={
            kind: LayeredArrays(
                tuple(
                    LayerArray(layout.layer_name(layer), TypedArray.of(array), site(kind, layer))
                    for layer, array in enumerate(sample[kind])
                )
            )
            for kind in KINDS
        },
    )
