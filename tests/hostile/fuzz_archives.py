"""Damages small archives at random, repeatably, and opens what comes of it.

The bytes are changed in the superblock, in HDF5's metadata, in chunks and in the footer; mostly the
checksum of what was changed is made right again, so that the damage gets past it. Reading must end
in an error of ours or give what was stored, and never in a crash, a hang or another exception.
"""

from __future__ import annotations

import random
import struct
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import children
import numpy as np
import probe
import specimen
from children import ADDRESS_SPACE, SECONDS_PER_CASE
from object_headers import lookup3

from h5traces.checking.isolated import IsolationLimits, validate_isolated
from h5traces.checking.validate import validate
from h5traces.errors import H5TracesError
from h5traces.storage import footer
from h5traces.storage.files import LocalFile

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERESTING = (0, 1, 2, 7, 8, 255, 0xFFFF, 1 << 31, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1)
_SIGNATURES = (b"OHDR", b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHIB", b"FADB", b"FAHD",
               b"EAHD", b"EAIB", b"FSHD", b"FSSE", b"SMTB", b"\x89HDF")  # fmt: skip
_MAX_BLOCK = 1024


@dataclass(frozen=True)
class Case:
    """One damaged file.

    Attributes
    ----------
    number, seed
        Which one it is; together they make it again.
    what
        What was changed.
    data
        The file.
    forged
        Whether a checksum was made right again, so that other data may come out.
    """

    number: int
    seed: int
    what: str
    data: bytes
    forged: bool


@dataclass
class Findings:
    """What came of a run.

    Attributes
    ----------
    outcomes
        How often reading ended in what.
    bad
        Cases that ended in a crash, a hang, a foreign exception or other data.
    crashes
        Cases with forged HDF5 metadata that ended HDF5 itself. Nothing but its own process
        helps against those; they are here if `validate_isolated` reports them, else in `bad`.
    """

    crashes: list[tuple[Case, str]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[Case, str]] = field(default_factory=list)


class Fuzzer:
    """Makes damaged files out of a valid one.

    Parameters
    ----------
    seed
        The same seed gives the same files.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "archive.h5"
            specimen.write(path)
            self.whole = path.read_bytes()
            self.document, self.columns = specimen.footer_of(path)
            warnings.simplefilter("ignore")
            self.expected = probe.read(str(path))
            self.end = footer.hdf5_end(LocalFile(path))
            # The footer is derived, so the chunks it tells of are where the raw data lies.
            sizes = specimen.column(self.columns, "chunk_nbytes")
            gaps = specimen.column(self.columns, "chunk_gap")
            starts = np.cumsum(gaps + sizes) - sizes
        self.chunks = list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
        self.blocks = list(_checksummed(self.whole[: self.end]))

    def cases(self, first: int, count: int) -> Iterator[Case]:
        """So many damaged files."""
        for number in range(first, first + count):
            yield self.case(number)

    def case(self, number: int) -> Case:
        """The damaged file of that number."""
        random_ = random.Random(f"{self.seed}/{number}")
        kind = random_.choice(["metadata"] * 5 + ["column", "footer", "chunk", "anywhere", "size"])
        if kind == "column":
            return self._column(random_, number)
        with_footer = kind in ("footer", "anywhere") or random_.random() < 0.2
        data = bytearray(self.whole if with_footer else self.whole[: self.end])
        forged, what = False, kind
        if kind == "size":
            cut = random_.randrange(1, len(data))
            data = data[:cut] if random_.random() < 0.7 else data + random_.randbytes(cut)
        elif kind == "metadata":
            start, end = random_.choice(self.blocks)
            damage(random_, data, start, end)
            forged = random_.random() < 0.85
            if forged:
                struct.pack_into("<I", data, end, lookup3(bytes(data[start:end])))
            what = f"{self.whole[start : start + 4]!r} at {start}"
        else:
            start, end = {
                "footer": (self.end, len(self.whole)),
                "chunk": random_.choice(self.chunks),
                "anywhere": (0, len(data)),
            }[kind]
            damage(random_, data, start, end)
        return Case(number, self.seed, what, bytes(data), forged)

    def _column(self, random_: random.Random, number: int) -> Case:
        """A footer with a damaged column and right checksums."""
        name = random_.choice(list(self.columns))
        raw = bytearray(self.columns[name])
        damage(random_, raw, 0, len(raw))
        if random_.random() < 0.1:
            raw = raw[: random_.randrange(len(raw))]
        with tempfile.NamedTemporaryFile(suffix=".h5") as file:
            path = Path(file.name)
            path.write_bytes(self.whole[: self.end])
            specimen.seal(path, self.document, {**self.columns, name: bytes(raw)})
            data = path.read_bytes()
        return Case(number, self.seed, f"column {name}", data, forged=True)


def damage(random_: random.Random, data: bytearray, start: int, end: int) -> None:
    """Change a few bytes between `start` and `end`."""
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        at = random_.randrange(start, end)
        match random_.choice(["bit", "byte", "number", "zeros", "copy"]):
            case "bit":
                data[at] ^= 1 << random_.randrange(8)
            case "byte":
                data[at] = random_.randrange(256)
            case "number":
                width = random_.choice([1, 2, 4, 8])
                value = random_.choice(INTERESTING) & ((1 << 8 * width) - 1)
                new = value.to_bytes(width, "little")[: end - at]
                data[at : at + len(new)] = new
            case "zeros":
                length = min(random_.choice([1, 4, 8, 32]), end - at)
                data[at : at + length] = bytes(length)
            case "copy":
                length = min(random_.choice([2, 4, 8, 32]), end - at)
                origin = random_.randrange(start, end - length + 1)
                data[at : at + length] = data[origin : origin + length]


def _checksummed(data: bytes) -> Iterator[tuple[int, int]]:
    """Start of every block of metadata, and where its checksum lies."""
    for signature in _SIGNATURES:
        position = data.find(signature)
        while position >= 0:
            for end in range(position + 8, min(position + _MAX_BLOCK, len(data) - 4)):
                if lookup3(data[position:end]) == struct.unpack_from("<I", data, end)[0]:
                    yield position, end
                    break
            position = data.find(signature, position + 1)


def outcome(path: Path, case: Case, expected: str) -> str:
    """How reading and validating a case end; 'bad: …' where they must not."""
    try:
        found = "same" if probe.read(str(path)) == expected else "other"
    except H5TracesError as error:
        found = type(error).__name__
    except BaseException as error:
        return f"bad: reading raised {error!r}"
    try:
        report = validate(path)
    except BaseException as error:
        return f"bad: validating raised {error!r}"
    if found == "other" and not case.forged:
        return "bad: other data"
    if found == "other" and report.ok:
        return "other, validated"
    return found


def run(fuzzer: Fuzzer, count: int, *, first: int = 0) -> Findings:
    """Try so many cases, in child processes."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.h5"

        def judge(number: int) -> str:
            warnings.simplefilter("ignore")
            case = fuzzer.case(number)
            # Another file: HDF5 goes on with what it knows of one that is still open.
            path.unlink(missing_ok=True)
            path.write_bytes(case.data)
            return outcome(path, case, fuzzer.expected)

        for number, found, how in children.outcomes(judge, range(first, first + count)):
            if found is None:
                _add_end(findings, fuzzer.case(number), how, path)
                continue
            findings.outcomes["bad" if found.startswith("bad") else found] += 1
            if found.startswith("bad"):
                findings.bad.append((fuzzer.case(number), found))
    return findings


def _add_end(findings: Findings, case: Case, how: str, path: Path) -> None:
    """Note a case that ended its process."""
    path.write_bytes(case.data)
    limits = IsolationLimits(memory_nbytes=ADDRESS_SPACE, timeout=SECONDS_PER_CASE)
    report = validate_isolated(path, isolation=limits)
    if case.forged and case.what.startswith("b'") and not report.ok:
        findings.outcomes["crash of HDF5, reported in isolation"] += 1
        findings.crashes.append((case, f"{how}; in isolation: {report.problems[0].message}"))
    else:
        findings.outcomes["bad"] += 1
        findings.bad.append((case, f"bad: ended the process: {how}"))
