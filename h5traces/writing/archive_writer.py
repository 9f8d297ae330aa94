"""Writes archives: records in, one published file out.

Arrays are cast, digested and compressed in threads; one thread writes. Nothing appears under the
final name before it is complete and durable. Its callers also read it back first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import uuid
from collections import deque
from concurrent.futures import Future
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self, TypeVar

import xxhash

from h5traces.errors import ArchiveExistsError, CorruptArchiveError, __version__
from h5traces.format import layout
from h5traces.format.archive import ArchiveMetadata, Cast, KindMetadata, SourceFile, add_casts
from h5traces.format.document import Attrs, compact_json, to_attributes
from h5traces.format.dtypes import NO_COUNTS
from h5traces.format.entries import ChunkTable, ObjectEntry
from h5traces.format.forms import StoredObject, digests_of, form_of
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.record import IndexRow, StepArrays, TraceRecord, index_columns
from h5traces.format.text import utc_now
from h5traces.format.values import EncodedObject
from h5traces.meaning.array_checks import not_finite_findings
from h5traces.precision.attention import DERIVATION, MEAN, HeadMean, with_head_mean
from h5traces.precision.encoding import Encoder
from h5traces.precision.scales import ScaleSet, stored_arrays
from h5traces.storage.footer import FooterBuilder
from h5traces.storage.hdf5.foreign import Origin, copy_foreign
from h5traces.storage.hdf5.writing import Hdf5Writer
from h5traces.storage.processes import deferred_signals
from h5traces.storage.publish import PartFile
from h5traces.storage.remote.paths import RemotePath
from h5traces.storage.threads import ThreadPool
from h5traces.writing.options import WriteOptions, WriteSummary
from h5traces.writing.preparation import (
    Observation,
    Prepared,
    exceptions_table,
    observe,
    prepare_element,
    prepare_elements,
    prepare_layers,
    record_elements,
    steps_table,
)
from h5traces.writing.reading_back import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.precision import CalibrationRecord
    from h5traces.format.record import LayerArray, TraceMetadata
    from h5traces.meaning.checks import Finding
    from h5traces.writing.stored_samples import StoredSample


_Value = TypeVar("_Value")

# Groups of arrays per worker that may wait, cast and compressed, for the thread that writes.
_QUEUED_PER_WORKER = 2
# Values in a group of arrays. Handing one array at a time to a thread and back took a tenth of the
# interpreter's time.
_GROUP_SIZE = 1 << 20
# Arrays of scales that a thread encodes in one call.
_SCALES_OF_TASK = 12
# Smaller groups are not handed over at all.
_SMALL_GROUP = 1 << 17
# Values of a sample that is decoded as it is encoded; smaller ones are read back in less time.
_LARGE_SAMPLE = 1 << 19


def next_generation(taken: set[int], index: int | None) -> int:
    """The generation index that a sample gets, added to those that others of its id have."""
    if index is None or index in taken:
        index = max(taken, default=-1) + 1
    taken.add(index)
    return index


class ArchiveWriter:
    """Writes records to one archive file; use it as a context manager.

    Leaving the block without an exception finishes and publishes the file; an exception deletes
    what was written and touches nothing else.

    The shards of a set share `generations`, the generation indices in use by sample id. `metadata`
    are further fields of `ArchiveMetadata`, such as ``model_id``.
    """

    def __init__(
        self,
        path: Path,
        options: WriteOptions | None = None,
        *,
        generations: dict[str, set[int]] | None = None,
        **metadata: Any,
    ) -> None:
        self._options = options or WriteOptions()
        if not self._options.overwrite and os.path.lexists(path):
            message = f"{path} exists; use overwrite=True to replace it, or another name"
            raise ArchiveExistsError(message)
        self._encoder = Encoder(self._options.precision, self._options.scales)
        self._metadata = ArchiveMetadata(
            format=layout.FORMAT_NAME,
            format_version=layout.FORMAT_VERSION,
            num_samples=0,
            generator=f"h5traces {__version__}",
            created=utc_now(),
            # Until what is in it is known.
            archive_id=str(uuid.UUID(int=0)),
            codec=self._options.codec,
            dtype_policy=self._options.dtype,
            on_overflow=self._options.on_overflow,
            precision=None if self._encoder.precision.is_exact else self._encoder.precision,
            earlier_precisions=self._options.earlier_precisions or None,
            required_features=() if self._encoder.is_plain else (layout.PRECISION_FEATURE,),
            **metadata,
        )
        self._workers = self._options.workers or os.cpu_count() or 1
        self._pool = ThreadPool(self._workers, thread_name_prefix="h5traces-encode")
        with contextlib.ExitStack() as undo:
            # A signal here would leave a file that no caller could discard.
            with deferred_signals():
                self._part = PartFile(path)
                undo.callback(self._part.discard)
                self._hdf5 = Hdf5Writer(self._part.file)
                self._hdf5.create_group(layout.SAMPLES_GROUP, {})
                self._hdf5.create_group(layout.KINDS_GROUP, {})
            undo.pop_all()
        self._footer = FooterBuilder(path.parent)
        self._origins: list[Origin] = []
        self._observed = Observation()
        self._generations = {} if generations is None else generations
        self._index: list[IndexRow] = []
        # By kind and types: arrays, and values that changed; None if that is not known.
        self._casts: dict[tuple[str, Any, Any], tuple[int, int | None]] = {}
        self._finished = False
        self.part_path = self._part.path
        # Of samples whose bytes were decoded as they were encoded, what `fingerprint` gives, by
        # number.
        self.looked_back: dict[int, int] = {}
        # Of every sample written, computed from the records themselves.
        self.digests: list[str] = []
        # Of the sample written last: what two samples with the same bytes share, and its values
        # that are not finite.
        self.content = ""
        self.not_finite: list[Finding] = []
        self.summary = WriteSummary(path)

    def append(self, record: TraceRecord, own: Iterable[EncodedObject] = ()) -> None:
        """Write one record, and users' own objects beside it, whose names begin with ``x_``."""
        record = with_head_mean(record, self._options.precision)
        if self._options.precision.is_exact and not self._options.earlier_precisions:
            record = record.model_copy(update={"exact_digest": None})
        description = record.describe()
        row = IndexRow.of(description.metadata, record.texts)
        looks_back = self._options.verify and _num_values(record) >= _LARGE_SAMPLE
        objects = self._record_objects(record, looks_back=looks_back)
        try:
            stored = self._write_sample(description.metadata, row, observe(record), objects, own)
        except CorruptArchiveError as error:
            place = layout.sample_path(self.summary.num_samples)
            message = f"{self.summary.path}: {place}: {error}"
            raise CorruptArchiveError(message) from error
        if looks_back:
            self.looked_back[self.summary.num_samples - 1] = fingerprint(stored)

    def copy(self, sample: StoredSample) -> None:
        """Write a sample of another archive by copying its chunks, without recompression."""
        metadata = sample.metadata
        row = IndexRow.of(metadata, sample.texts)
        self._write_sample(metadata, row, sample.observation(), sample.objects())

    def carry_foreign(self, file: ArchiveFile, sample: int | None = None) -> None:
        """Copy, at the end, what is not the format's, to the root or with an index the last sample.

        Only archives on disk can be asked for it.
        """
        if not file.store.has_foreign or isinstance(file.path, RemotePath):
            return
        place, target = "/", "/"
        if sample is not None:
            place = file.store.sample_place(sample)
            target = layout.sample_path(self.summary.num_samples - 1)
        self._origins.append(Origin(file.path, place, target))

    def _copy_foreign(self) -> None:
        if self._origins:
            keep = self._options.foreign == "keep"
            copied = copy_foreign(self._part.file, self._origins, DEFAULT_LIMITS, keep=keep)
            self._part.file.raise_error()
            self._footer.has_foreign |= copied.number > 0
            self.summary.left_foreign += copied.left

    def _record_objects(
        self, record: TraceRecord, *, looks_back: bool
    ) -> Iterator[EncodedObject | Prepared]:
        for kind, layers in record.layered.items():
            yield EncodedObject(kind, to_attributes(layers.form))
        yield from self._prepare(record, looks_back=looks_back)
        elements = list(record_elements(record))
        arrays = [each for each in elements if each.values is not None]
        prepared = iter(prepare_elements(arrays, looks_back=looks_back))
        for element in elements:
            yield element if element.values is None else next(prepared)

    @deferred_signals()
    def _write_sample(
        self,
        metadata: TraceMetadata,
        row: IndexRow,
        observation: Observation,
        objects: Iterable[EncodedObject | Prepared],
        own: Iterable[EncodedObject] = (),
    ) -> list[StoredObject]:
        self._observed.add_sample(observation, self.summary.num_samples)
        metadata = self._complete(metadata)
        group = layout.sample_path(self.summary.num_samples)
        attrs = to_attributes(metadata)
        stored: list[StoredObject] = []
        self.not_finite = []
        self._hdf5.create_group(group, attrs)
        for each in objects:
            if isinstance(each, Prepared):
                stored.append(_write_dataset(self._hdf5, group, each))
                self._count(each)
            else:
                stored.append(_write_group(self._hdf5, group, each))
            # A full disk shows here at the latest; HDF5 sees every write succeed.
            self._part.file.raise_error()
        for own_object in own:
            self._footer.has_foreign = True
            if own_object.values is None:
                _write_group(self._hdf5, group, own_object)
            else:
                _write_dataset(self._hdf5, group, prepare_element(own_object))
        stored.sort(key=itemgetter(0))
        digest, self.content = digests_of(attrs, stored)
        # The digest comes last: a sample without one is incomplete.
        self._hdf5.add_attributes(group, {"digest": digest})
        self._hdf5.finish_group(group)
        self._part.file.raise_error()
        self._part.file.start_write_back()
        self._footer.add_sample({**attrs, "digest": digest}, stored)
        self.digests.append(digest)
        self._index.append(row._replace(generation_index=metadata.generation_index))
        self.summary.num_samples += 1
        self.summary.coverage[metadata.coverage] += 1
        return stored

    def _complete(self, metadata: TraceMetadata) -> TraceMetadata:
        """Fill in what depends on earlier samples."""
        update: dict[str, Any] = {}
        if metadata.sample_id is not None:
            # A copied sample keeps its index unless a sample of another archive has it.
            taken = self._generations.setdefault(metadata.sample_id, set())
            update["generation_index"] = next_generation(taken, metadata.generation_index)
        if self.summary.num_samples == 0 and metadata.fields:
            self._metadata = self._metadata.model_copy(update={"fields": metadata.fields})
        if metadata.fields == self._metadata.fields:
            update["fields"] = None
        return metadata.model_copy(update=update)

    def _prepare(self, record: TraceRecord, *, looks_back: bool) -> Iterator[Prepared]:
        """Yield the layered arrays in order, cast, digested and encoded in threads."""
        waiting: deque[Future[list[Prepared]] | list[Prepared]] = deque()
        exceptions: dict[str, dict[str, NDArray[np.float64]]] = {}

        def next_ready() -> Iterator[Prepared]:
            found = waiting.popleft()
            for each in found.result() if isinstance(found, Future) else found:
                if each.exceptions is not None:
                    kind, _, name = each.path.partition("/")
                    exceptions.setdefault(kind, {})[name] = each.exceptions
                yield each

        for kind, layered in record.layered.items():
            if layered.in_steps:
                table = steps_table(kind, layered.arrays)
                yield prepare_element(table, looks_back=looks_back)
            for group, size in _groups(layered.arrays):
                task = partial(
                    prepare_layers,
                    kind,
                    group,
                    self._options,
                    self._encoder,
                    layered.definition,
                    looks_back=looks_back,
                )
                waiting.append(self._pool.submit(task) if size >= _SMALL_GROUP else task())
                if len(waiting) > _QUEUED_PER_WORKER * self._workers:
                    yield from next_ready()
        while waiting:
            yield from next_ready()
        for kind, found in exceptions.items():
            self.summary.num_exceptions[kind] += sum(map(len, found.values()))
            table = exceptions_table(kind, found)
            yield prepare_element(table, looks_back=looks_back)

    def _count(self, prepared: Prepared) -> None:
        """Note what the summary says of a dataset that was written."""
        kind = prepared.path.partition("/")[0]
        kind = kind if kind in self._observed.layers else "other"
        self.summary.raw_nbytes[kind] += prepared.raw_nbytes
        self.summary.stored_nbytes[kind] += sum(map(len, prepared.encoded.chunks))
        if prepared.kept_exact is not None:
            self.summary.kept_exact[f"{kind}: {prepared.kept_exact}"] += 1
        self._note_cast(kind, prepared)
        counts = prepared.counts
        if counts != NO_COUNTS:
            self.summary.counts[kind] = self.summary.counts.get(kind, NO_COUNTS) + counts
            self.not_finite += not_finite_findings(prepared.path, counts.num_nan, counts.num_inf)

    def _note_cast(self, kind: str, prepared: Prepared) -> None:
        """Collect what casts changed."""
        attrs: Mapping[str, Any] = prepared.attrs
        source = attrs.get("cast_from")
        if source is not None:
            key = kind, source, attrs.get("restored_dtype", prepared.dtype)
            num_arrays, before = self._casts.get(key, (0, 0))
            changed = attrs.get("num_changed")
            total = None if before is None or changed is None else before + changed
            self._casts[key] = num_arrays + 1, total

    def finish(
        self, *, sources: tuple[SourceFile, ...] | None = None, **metadata: Any
    ) -> ArchiveMetadata:
        """Write metadata, index and footer and make the file durable; `publish` names it.

        `metadata` are fields of `ArchiveMetadata` that are known only at the end.
        """
        self._finished = True
        # The disk is at work while the rest is made.
        self._part.file.start_write_back(least_nbytes=1)
        kinds = {name: self._kind_attributes(name) for name in self._observed.layers}
        for name, attrs in kinds.items():
            self._hdf5.create_group(f"/{layout.KINDS_GROUP}/{name}", attrs)
        self._write_scales()
        self._hdf5.write_table(f"/{layout.INDEX_TABLE}", index_columns(self._index))
        # Means over heads that a writer computed have no source.
        casts = add_casts(
            Cast(cast_from=source, dtype=dtype, num_arrays=num_arrays, num_changed=num_changed)
            for (kind, source, dtype), (num_arrays, num_changed) in self._casts.items()
            if "derivation" not in kinds[kind]
        )
        archive = self._final_metadata(sources=sources, casts=casts, **metadata)
        archive = archive.model_copy(update={"archive_id": self._archive_id(archive)})
        root = to_attributes(archive)
        complete = {"complete": root.pop("complete")}
        self._hdf5.add_attributes("/", root)
        self._hdf5.add_attributes("/", complete)
        self._hdf5.close()
        self._copy_foreign()
        self._pool.shutdown()
        self._part.file.raise_error()
        for block in self._footer.finish(self._part.file, {**root, **complete}, kinds):
            self._part.append(block)
        self._part.sync()
        self.summary.nbytes = self._part.path.stat().st_size
        self._metadata = archive
        return archive

    def _archive_id(self, archive: ArchiveMetadata) -> str:
        """A UUID made of samples and attributes: whoever writes the same archive gives the same.

        Times are left out, and objects of other programs are named by their files.
        """
        left_out: Any = {"archive_id": True, "created": True}
        left_out["sources"] = {"__all__": {"modified_ns"}}
        facts = compact_json(archive.model_dump(mode="json", exclude=left_out))
        origins = [f"{each.file.name} {each.place} {each.target}" for each in self._origins]
        text = "\n".join([facts, *self.digests, *origins])
        digest = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
        return str(uuid.UUID(bytes=digest))

    @property
    def metadata(self) -> ArchiveMetadata:
        """What the archive says of itself; all of it when it is finished."""
        return self._metadata

    def _write_scales(self) -> None:
        """Write the scales of the stored layers, once for all samples."""
        scales = self._encoder.scales
        if scales is None or self._encoder.precision.step is None:
            return
        stored = {}
        for path, each in scales.layers.items():
            kind, _, name = path.partition("/")
            layer = layout.parse_layer_name(name)
            observed = self._observed
            numbers = (observed.positions if layout.is_position(name) else observed.layers).get(
                kind
            )
            # The embedding has no number.
            if numbers is not None and (layer is None or layer in numbers):
                stored[path] = each
        arrays = stored_arrays(ScaleSet(stored, scales.record))
        self._footer.add_scales(write_scales(self._hdf5, arrays, scales.record, self._pool))

    def _final_metadata(self, **metadata: Any) -> ArchiveMetadata:
        observed = self._observed
        stored = sorted(set().union(*observed.layers.values()))
        known = metadata.pop("num_layers", None) or self._metadata.num_layers or 0
        # Of layers with gaps, nobody knows how many follow.
        is_whole = stored == list(range(len(stored)))
        num_layers = max(known, stored[-1] + 1) if stored and (known or is_whole) else known or None
        is_subset = bool(stored) and stored != list(range(min(num_layers or 0, len(stored) + 1)))
        return ArchiveMetadata(
            **{
                **self._metadata.model_dump(),
                "num_samples": self.summary.num_samples,
                "num_layers": num_layers,
                "hidden_size": _only(observed.hidden_sizes),
                "num_heads": _only(observed.head_counts),
                "layers": tuple(stored) if is_subset else None,
                "complete": True,
                **metadata,
            }
        )

    def _kind_attributes(self, kind: str) -> Attrs:
        definition = layout.KINDS.get(kind)
        observed = self._observed
        said = observed.definitions.get(kind) or layout.FURTHER_KIND
        text = definition.definition if definition else said
        found = observed.reductions.get(kind, {None})
        positions = observed.positions.get(kind)
        reduction = (_only(found) or "unknown") if kind == layout.ATTENTION_MEAN else None
        return to_attributes(
            KindMetadata(
                axes=definition.axes if definition else observed.axes.get(kind, ("value",)),
                layered=True,
                layers=tuple(sorted(observed.layers.get(kind, ()))),
                positions=None if positions is None else tuple(sorted(positions)),
                definition=text if positions is None else layout.BY_POSITION,
                reduction=reduction,
                derivation=DERIVATION if self._makes_means and reduction == MEAN else None,
            )
        )

    @property
    def _makes_means(self) -> bool:
        """Whether means over heads are made of attentions here, or were in an archive before."""
        options = self._options
        losses = (options.precision, *options.earlier_precisions)
        return any(each.head_mean != "none" for each in losses)

    def publish(self) -> Path:
        """Give the finished file its final name."""
        self._part.publish(overwrite=self._options.overwrite)
        return self.summary.path

    def discard(self) -> None:
        """Delete what was written, and nothing else."""
        self._pool.shutdown(cancel_futures=True)
        self._footer.close()
        self._part.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is not None:
            self.discard()
            return
        try:
            if not self._finished:
                self.finish()
            self.publish()
        except BaseException:
            self.discard()
            raise


def _only(values: set[_Value]) -> _Value | None:
    """The only value; None if there are none or several."""
    return next(iter(values)) if len(values) == 1 else None


def _num_values(record: TraceRecord) -> int:
    return sum(size for each in record.layered.values() for _, size in _groups(each.arrays))


def _groups(arrays: tuple[LayerArray, ...]) -> Iterator[tuple[list[LayerArray], int]]:
    """Group the arrays so that handing a group to a thread is worth it; groups with their sizes."""
    group: list[LayerArray] = []
    size = 0
    for each in arrays:
        steps = each.array.steps if isinstance(each.array, StepArrays) else (each.array,)
        group.append(each)
        # A mean over heads takes as long as the weights that it is made of.
        made_of = (step.attention if isinstance(step, HeadMean) else step for step in steps)
        size += sum(math.prod(source.shape) for source in made_of)
        if size >= _GROUP_SIZE:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _write_group(hdf5: Hdf5Writer, parent: str, group: EncodedObject) -> StoredObject:
    """Write a group below `parent`."""
    hdf5.create_group(f"{parent}/{group.path}", group.attrs)
    return StoredObject.of(ObjectEntry(group.path, group.attrs))


def _write_dataset(hdf5: Hdf5Writer, parent: str, prepared: Prepared) -> StoredObject:
    """Write a dataset below `parent`; what is said of it has the path of `prepared`."""
    encoded, path = prepared.encoded, prepared.path
    form, digest = form_of(
        prepared.dtype, encoded.shape, encoded.chunk, encoded.codec, prepared.attrs
    )
    offsets, sizes = hdf5.write_like(
        f"{parent}/{path}",
        form,
        digest,
        encoded.chunks,
        prepared.white,
        is_picture=layout.is_picture(path),
    )
    table = ChunkTable(tuple(offsets), tuple(sizes), encoded.checksums)
    return StoredObject(path, form, digest, table)


def write_scales(
    hdf5: Hdf5Writer,
    arrays: Iterable[tuple[str, NDArray[np.float32]]],
    record: CalibrationRecord | None,
    pool: ThreadPool,
) -> list[StoredObject]:
    """Write the group ``/scales`` from paths below the root and values ``(hidden,)``.

    They are encoded in threads. Returns groups and datasets with their paths below the root, in
    order of path.
    """
    attrs: Attrs = {} if record is None else to_attributes(record)
    root = EncodedObject(layout.SCALES_GROUP, attrs)
    entries = {layout.SCALES_GROUP: _write_group(hdf5, "", root)}
    elements = [EncodedObject(path, {}, "float32", values) for path, values in arrays]
    groups = [
        elements[at : at + _SCALES_OF_TASK] for at in range(0, len(elements), _SCALES_OF_TASK)
    ]
    for prepared in itertools.chain.from_iterable(pool.map(prepare_elements, groups)):
        path = prepared.path
        parent = path.rpartition("/")[0]
        while parent not in entries:
            entries[parent] = _write_group(hdf5, "", EncodedObject(parent))
            parent = parent.rpartition("/")[0]
        entries[path] = _write_dataset(hdf5, "", prepared)
    return [entries[path] for path in sorted(entries)]
