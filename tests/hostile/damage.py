"""Damages archives as disks, memory and transfers do, and judges what becomes of it.

Damage must be reported by ``verify``, or leave every value and attribute as it was, through the
footer and through HDF5. Reading must end in an error of ours or give what was stored, and never
another number, a crash or a hang.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import children
import numpy as np
import probe
import xxhash
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.hdf5_store import Hdf5Store
from h5traces.errors import H5TracesError, StoredStateWarning
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.rewriting.repack import repack
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import hdf5_end
from h5traces.storage.footer_rows import FooterError
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.archive.hdf5_store import Store

SECTOR = 512
PAGE = 4096


# --- archives --------------------------------------------------------------------------------


def _float16(folder: Path) -> Path:
    return make_archive(folder, make_batch("full_gz"))


def _float32(folder: Path) -> Path:
    return make_archive(folder, make_batch("full_gz", dtype="float32"), dtype="auto")


def _bfloat16(folder: Path) -> Path:
    batch = make_batch("full_gz", dtype="float32-from-bfloat16")
    return make_archive(folder, batch, dtype="auto")


def _steps(folder: Path) -> Path:
    return make_archive(folder, make_batch("step_full"))


def _subset(folder: Path) -> Path:
    return make_archive(folder, make_batch("full_gz"), layers=[0, 2])


def _zstd(folder: Path) -> Path:
    target = folder / "repacked.h5"
    repack(_float16(folder), target, precision=PrecisionOptions(codec="zstd"))
    return target


def _shard(folder: Path) -> Path:
    with h5traces.create(f"{folder}/run/", target=TargetOptions(shard_samples=4)) as writer:
        for sample in make_batch("full_gz"):
            writer.append(sample)
    return folder / "run" / "traces-00000.h5"


def _spooled(folder: Path) -> Path:
    """A sample that is in no shard yet."""
    writer = h5traces.create(folder / "run.h5")
    writer.append(make_batch("full_gz", num_samples=1)[0])
    writer.suspend()
    target = folder / "sample.h5"
    (folder / "run.h5.spool" / "00000000.sample").rename(target)
    return target


def _in_steps(folder: Path) -> Path:
    """Samples that need scales, and lists of exceptions, to be read."""
    return make_archive(folder, make_batch("full_gz", num_samples=8), tier="fine")


def _averaged(folder: Path) -> Path:
    return make_archive(folder, make_batch("full_gz"), tier="compact")


def _tiny(folder: Path) -> Path:
    array = np.arange(6, dtype="f2").reshape(2, 3)
    return make_archive(folder, [{"hidden_states": [array], "tokens": np.arange(2)}])


def _large(folder: Path) -> Path:
    """Arrays of several chunks, 11 MB in all."""
    rng = np.random.default_rng(0)
    trace = {
        "hidden_states": [rng.normal(size=(600, 4096)).astype("f2")],
        "attentions": [rng.random((8, 600, 600)).astype("f2")],
        "question_id": "long",
    }
    return make_archive(folder, [trace])


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "float16": _float16,
    "float32": _float32,
    "bfloat16": _bfloat16,
    "generation steps": _steps,
    "subset of layers": _subset,
    "shard of a long run": _shard,
    "spooled sample": _spooled,
    "fine": _in_steps,
    "compact": _averaged,
    "one tiny sample": _tiny,
    "several chunks per array": _large,
    "zstd": _zstd,
}


def contents(store: Store) -> dict[str, str]:
    """Every attribute and value of an archive by its path; the errors of ours are not caught."""
    found = {"/": repr(store.root_attrs), "/kinds": repr(store.kinds)}
    scales = store.scales()
    named = [] if scales is None else [("scales", scales)]
    for index, sample in (
        *((index, store.sample(index)) for index in range(store.num_samples)),
        *named,
    ):
        found[f"/{index}"] = repr(sorted(sample.attrs.items()))
        for path, entry in sample.objects.items():
            digest = ""
            if not entry.is_group:
                values = np.ascontiguousarray(store.read(sample, path))
                digest = xxhash.xxh3_128_hexdigest(values.tobytes())
            facts = (sorted(entry.attrs.items()), entry.dtype, entry.shape, entry.chunk, digest)
            found[f"/{index}/{path}"] = repr(facts)
    return found


def read(path: Path) -> tuple[dict[str, str], list[H5TracesError]]:
    """What reading in the ordinary way gives, field by field, and the errors it meets."""
    found: dict[str, str] = {}
    errors: list[H5TracesError] = []

    def note(place: str, get: Callable[[], Any]) -> Any:
        try:
            value = get()
            found[place] = repr(probe.flat(value))
        except H5TracesError as error:
            errors.append(error)
            return None
        return value

    try:
        archive = h5traces.open(path)
    except H5TracesError as error:
        return found, [error]
    with archive:
        note("metadata", lambda: archive.metadata.model_dump(mode="json"))
        note("length", lambda: len(archive))
        note("ids", lambda: archive.ids)
        for index in range(len(archive)):
            trace = archive[index]
            note(f"{index}: metadata", lambda trace=trace: trace.metadata.model_dump(mode="json"))
            for key in note(f"{index}: keys", lambda trace=trace: list(trace)) or ():
                value = note(f"{index}: {key}", lambda trace=trace, key=key: _length(trace[key]))
                # None if the field cannot be read, which `errors` has.
                for place in range(value or 0 if key in probe.LAYERED else 0):
                    note(
                        f"{index}: {key} {place}",
                        lambda trace=trace, key=key, place=place: trace[key][place],
                    )
    return found, errors


def _length(value: Any) -> Any:
    """A field's value; of layers only how many there are, as each is read by itself."""
    return len(value) if isinstance(value, h5traces.archive.trace.LayerSequence) else value


# --- damage ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A damaged file, and what was done to it."""

    what: str
    data: bytes


class Subject:
    """An archive and what it holds.

    Parameters
    ----------
    name
        One of `ARCHIVES`.
    folder
        Where to make it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = ARCHIVES[name](folder)
            store = FooterStore(LocalFile(path), DEFAULT_LIMITS)
            self.fields, errors = read(path)
            assert not errors
            self.by_footer = contents(store)
            self.by_hdf5 = contents(Hdf5Store(path, DEFAULT_LIMITS))
        self.data = path.read_bytes()
        self.end = hdf5_end(LocalFile(path))
        tables = [
            each.chunks
            for sample in map(store.sample, range(store.num_samples))
            for each in sample.objects.values()
        ]
        ranges = [each for table in tables if table is not None for each in table.ranges]
        spans = sorted((start, start + nbytes) for start, nbytes in ranges)
        self.chunks = list(dict.fromkeys(spans))

    def flip(self, rng: random.Random) -> Damage:
        """One bit, anywhere."""
        data, at, bit = bytearray(self.data), rng.randrange(len(self.data)), rng.randrange(8)
        data[at] ^= 1 << bit
        return Damage(f"bit {bit} of byte {at}", bytes(data))

    def cut(self, rng: random.Random) -> Damage:
        """The end is missing: anywhere, or at a place that means something."""
        edges = [0, 1, 8, 48, self.end - 1, self.end, len(self.data) - 1, len(self.data) - 64]
        edges += [edge for span in self.chunks for edge in span]
        at = rng.choice([rng.randrange(len(self.data)), rng.choice(edges)])
        return Damage(f"cut at {at}", self.data[:at])

    def grown(self, rng: random.Random) -> Damage:
        """Bytes behind the end."""
        more = rng.choice([bytes(1), bytes(PAGE), rng.randbytes(100), self.data])
        return Damage(f"{len(more)} bytes behind the end", self.data + more)

    def sector(self, rng: random.Random) -> Damage:
        """A sector of zeros, of ones, of noise, or of what belongs elsewhere."""
        size = rng.choice([SECTOR, PAGE])
        at = rng.randrange(-(-len(self.data) // size)) * size
        length = min(size, len(self.data) - at)
        other = rng.randrange(-(-len(self.data) // size)) * size
        kind, new = rng.choice(
            [
                ("zeros", bytes(length)),
                ("zeros", bytes(length)),
                ("ones", b"\xff" * length),
                ("noise", rng.randbytes(length)),
                (f"what lies at {other}", self.data[other : other + length].ljust(length, b"\0")),
            ]
        )
        data = self.data[:at] + new + self.data[at + length :]
        return Damage(f"sector of {size} at {at}: {kind}", data)

    def swapped(self, rng: random.Random) -> Damage:
        """The bytes of two chunks, in each other's place as far as they fit."""
        one = rng.choice(self.chunks)
        others = [span for span in self.chunks if self._bytes(span) != self._bytes(one)]
        alike = [span for span in others if span[1] - span[0] == one[1] - one[0]]
        other = rng.choice(alike if alike and rng.random() < 0.5 else others)
        length = min(one[1] - one[0], other[1] - other[0])
        data = bytearray(self.data)
        data[one[0] : one[0] + length] = self.data[other[0] : other[0] + length]
        data[other[0] : other[0] + length] = self.data[one[0] : one[0] + length]
        return Damage(f"{length} bytes of the chunks at {one[0]} and {other[0]}", bytes(data))

    def _bytes(self, span: tuple[int, int]) -> bytes:
        return self.data[span[0] : span[1]]

    def lost_write(self, rng: random.Random) -> Damage:
        """A chunk that never reached the disk."""
        start, stop = rng.choice(self.chunks)
        data = self.data[:start] + bytes(stop - start) + self.data[stop:]
        return Damage(f"the chunk at {start} is zeros", data)

    def footer(self, rng: random.Random) -> Damage:
        """Bytes of the footer."""
        data = bytearray(self.data)
        at = rng.randrange(self.end, len(data))
        length = min(rng.choice([1, 2, 8, 64]), len(data) - at)
        data[at : at + length] = rng.randbytes(length)
        return Damage(f"{length} bytes of the index at {at}", bytes(data))

    def metadata(self, rng: random.Random) -> Damage:
        """One bit of HDF5's own structures."""
        edges = [0, *(edge for span in self.chunks for edge in span), self.end]
        gaps = [(start, stop) for start, stop in list(pairwise(edges))[::2] if stop > start]
        start, stop = rng.choices(gaps, weights=[stop - start for start, stop in gaps])[0]
        data, at = bytearray(self.data), rng.randrange(start, stop)
        data[at] ^= 1 << rng.randrange(8)
        return Damage(f"a bit of byte {at} outside of chunks", bytes(data))

    def without_footer(self, rng: random.Random) -> Damage:
        """One bit of an archive that lost its footer before, so that no checksum is ours."""
        data, at = bytearray(self.data[: self.end]), rng.randrange(self.end)
        data[at] ^= 1 << rng.randrange(8)
        return Damage(f"no index, a bit of byte {at}", bytes(data))

    def swapped_without_footer(self, rng: random.Random) -> Damage:
        """Two chunks exchanged in an archive that lost its footer before."""
        found = self.swapped(rng)
        return Damage(f"no index, {found.what}", found.data[: self.end])


KINDS: dict[str, Callable[[Subject, random.Random], Damage]] = {
    "single bit": Subject.flip,
    "single bit outside of chunks": Subject.metadata,
    "single bit, no index": Subject.without_footer,
    "truncation": Subject.cut,
    "bytes behind the end": Subject.grown,
    "sector": Subject.sector,
    "chunks exchanged": Subject.swapped,
    "chunks exchanged, no index": Subject.swapped_without_footer,
    "chunk never written": Subject.lost_write,
    "footer": Subject.footer,
}


def damage(subject: Subject, kind: str, number: int, seed: int) -> Damage:
    """A damage of that kind; the same numbers give the same bytes."""
    return KINDS[kind](subject, random.Random(f"{seed}/{subject.name}/{kind}/{number}"))


# --- judgement -------------------------------------------------------------------------------

REPORTED, NOTED, UNCHANGED = "reported", "noted, nothing changed", "nothing changed"


def judge(subject: Subject, path: Path, found: Damage, *, deep: bool) -> str:
    """What came of a damaged file: one of the words above, or what must not be."""
    # Another file: HDF5 goes on with what it knows of one that is still open.
    path.unlink(missing_ok=True)
    path.write_bytes(found.data)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fields, errors = read(path)
        told = [str(each.message) for each in caught if each.category is StoredStateWarning]
        report = h5traces.verify(path, deep=deep)
    except BaseException as error:
        return f"bad: raised {error!r}"
    if wrong := _wrong(subject.fields, fields, told):
        return f"bad: reading gave another {wrong}"
    if not errors and len(fields) != len(subject.fields) and not told:
        return "bad: reading gave less, silently"
    if not report.ok:
        return REPORTED
    if errors:
        return f"bad: verified, but reading failed: {errors[0]}"
    return _unchanged(subject, path, noted=bool(report.notes))


def _wrong(expected: dict[str, str], found: dict[str, str], told: list[str]) -> str | None:
    """The first field that has another value and was not warned of."""
    if any("do not fit their digest" in each for each in told):
        return None
    return next((place for place, value in found.items() if expected.get(place) != value), None)


def _unchanged(subject: Subject, path: Path, *, noted: bool) -> str:
    try:
        if contents(Hdf5Store(path, DEFAULT_LIMITS)) != subject.by_hdf5:
            return "bad: verified, but HDF5 gives other contents"
        if contents(FooterStore(LocalFile(path), DEFAULT_LIMITS)) != subject.by_footer:
            return "bad: verified, but the index gives other contents"
    except FooterError as error:
        return NOTED if noted else f"bad: a damaged index was not noted: {error}"
    except H5TracesError as error:
        return f"bad: verified, but {error}"
    return NOTED if noted else UNCHANGED


@dataclass
class Findings:
    """What came of many damages.

    Attributes
    ----------
    outcomes
        How often what came of which kind of damage.
    bad
        Archive, kind and number of each damage that was not dealt with, what it was and what came.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def run(name: str, counts: dict[str, int], *, seed: int = 0, deep_every: int = 10) -> Findings:
    """Damage one of `ARCHIVES` so many times in each way.

    Parameters
    ----------
    name
        Which one.
    counts
        How many of which of `KINDS`.
    seed
        The same seed gives the same damages.
    deep_every
        Every so manieth is verified with ``deep``, too.
    """
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        subject, path = Subject(name, Path(folder) / "made"), Path(folder) / "damaged.h5"
        for kind, count in counts.items():

            def judged(number: int, kind: str = kind) -> str:
                found = damage(subject, kind, number, seed)
                return judge(subject, path, found, deep=number % deep_every == 0)

            for number, said, how in children.outcomes(judged, range(count), seconds=30):
                outcome = said or f"bad: ended the process by {how}"
                findings.outcomes[kind, outcome.partition(":")[0]] += 1
                if outcome.startswith("bad"):
                    what = damage(subject, kind, number, seed).what
                    findings.bad.append(f"{name}, {kind} {number} ({what}): {outcome}")
    return findings
