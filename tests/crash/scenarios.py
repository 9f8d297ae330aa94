"""What is stopped in all kinds of ways: a long run, conversions and rewrites, on tiny batches."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import h5traces
from h5traces.errors import ArchiveExistsError, H5TracesError
from h5traces.format.record import SourcePosition, TraceRecord
from h5traces.meaning.records import to_record
from h5traces.rewriting.repack import repack
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

Ack = Callable[..., None]
LAYERS, HIDDEN, HEADS = 2, 8, 2
BATCH = 4


def item(number: int) -> dict[str, Any]:
    """A trace; the same number gives the same bits."""
    rng = np.random.default_rng(number)
    seq_len = 4 + number % 3
    return {
        "hidden_states": [
            rng.standard_normal((seq_len, HIDDEN)).astype(np.float16) for _ in range(LAYERS)
        ],
        "attentions": [
            rng.random((HEADS, seq_len, seq_len)).astype(np.float16) for _ in range(LAYERS)
        ],
        "tokens": rng.integers(0, 100, seq_len),
        "question_id": f"q{number}",
    }


def record(number: int) -> TraceRecord:
    """The same as a writer's record."""
    found = to_record(item(number), source=SourcePosition(file=0, position=0))
    return found.model_copy(update={"source": None})


def is_same(found: Any, expected: Any) -> bool:
    """Whether two values are equal in type, shape and every bit."""
    if isinstance(expected, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            and found.tobytes() == expected.tobytes()
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            is_same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return type(found) is type(expected) and found == expected


@dataclass(frozen=True)
class Scenario:
    """One command, its inputs and what it must leave.

    Attributes
    ----------
    prepare
        Makes the inputs in a folder.
    run
        Does the work from the folder of inputs to another one, and acknowledges sample numbers.
        Running it again must finish what was stopped.
    targets
        The archives and the numbers of their samples when all is done.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path, Path, Ack], None]
    targets: dict[str, list[int]]


def problems_left(out: Path, acked: Counter[int]) -> list[str]:
    """What is wrong in a folder after a stop: broken archives, lost samples."""
    found: list[str] = []
    there: Counter[int] = Counter()
    for path in sorted(out.rglob("*")):
        if path.suffix not in (".h5", ".sample"):
            continue
        try:
            numbers = _numbers(path)
        except (H5TracesError, OSError, Warning) as error:
            found.append(f"{path.name} is broken: {error!r}")
            continue
        there.update(numbers)
    lost = acked - there
    return found + [f"acknowledged sample {number} is lost" for number in lost]


def problems_done(out: Path, scenario: Scenario) -> list[str]:
    """What is wrong in a folder when all is said to be done."""
    found = []
    files = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if files != set(scenario.targets):
        found.append(f"files are {sorted(files)}, expected {sorted(scenario.targets)}")
    for name, expected in scenario.targets.items():
        try:
            numbers = _numbers(out / name) if name in files else expected
        except (H5TracesError, OSError, Warning) as error:
            found.append(f"{name} is broken: {error!r}")
            continue
        if numbers != expected:
            found.append(f"{name} holds {numbers}, expected {expected}")
    found += [f"{path.name} was left" for path in out.rglob("*.spool")]
    return found


def _numbers(path: Path) -> list[int]:
    """The samples of an archive, each compared with its source bit by bit."""
    numbers = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with h5traces.open(path) as archive:
            for trace in archive:
                number = int(trace["question_id"].removeprefix("q"))
                if not is_same(trace.to_dict(), item(number)):
                    message = f"sample {number} has other values than its source"
                    raise H5TracesError(message)
                numbers.append(number)
    return numbers


def _nothing(inputs: Path) -> None:
    pass


def _long_run(
    target: str, num_samples: int, *, shard_samples: int | None = None
) -> Callable[[Path, Path, Ack], None]:
    def run(_inputs: Path, out: Path, ack: Ack) -> None:
        with h5traces.create(
            f"{out}/{target}", target=TargetOptions(workers=1, shard_samples=shard_samples)
        ) as writer:
            for number in range(num_samples):
                if f"q{number}" in writer.done:
                    continue
                try:
                    writer.append(item(number))
                except OSError:
                    # A caller may try again; the sample must not be there twice then.
                    writer.append(item(number))
                ack(number)

    return run


def _run_of_groups(_inputs: Path, out: Path, ack: Ack) -> None:
    """As an extraction: what waits is stored together."""
    with h5traces.create(f"{out}/run/", target=TargetOptions(workers=1, shard_samples=4)) as writer:
        numbers = [n for n in range(8) if f"q{n}" not in writer.done]
        for together in (numbers[start : start + 3] for start in range(0, len(numbers), 3)):
            try:
                writer.append_records([record(n) for n in together])
            except OSError:
                # Some of them may be there.
                left = [n for n in together if f"q{n}" not in writer.done]
                writer.append_records([record(n) for n in left])
            ack(*together)


def _batches(inputs: Path) -> None:
    for number in range(2):
        items = [item(index) for index in range(BATCH * number, BATCH * (number + 1))]
        (inputs / f"b{number}.pkl").write_bytes(pickle.dumps(items))


def _archives(inputs: Path) -> None:
    _batches(inputs)
    h5traces.convert(sorted(inputs.glob("*.pkl")), inputs)


def _convert(
    dest: str = "", shard_samples: int | None = None, **options: Any
) -> Callable[[Path, Path, Ack], None]:
    options["target"] = TargetOptions(skip_existing=True, shard_samples=shard_samples)

    def run(inputs: Path, out: Path, ack: Ack) -> None:
        sources = sorted(inputs.glob("*.pkl"))
        report = h5traces.convert(sources, f"{out}/{dest}", **options)
        if not report.ok:
            raise H5TracesError("; ".join(str(each.error) for each in report.files))
        ack(*range(2 * BATCH))

    return run


def _repack(dest: str, **options: Any) -> Callable[[Path, Path, Ack], None]:
    def run(inputs: Path, out: Path, ack: Ack) -> None:
        # A target that exists: the run before was stopped behind its end.
        with contextlib.suppress(ArchiveExistsError):
            repack(sorted(inputs.glob("*.h5")), out / dest, **options)
        ack(*range(2 * BATCH))

    return run


def _shards(name: str, size: int, total: int) -> dict[str, list[int]]:
    starts = range(0, total, size)
    return {
        f"{name}-{number:05d}.h5": list(range(start, min(start + size, total)))
        for number, start in enumerate(starts)
    }


_BOTH = [list(range(BATCH)), list(range(BATCH, 2 * BATCH))]
_ALL = list(range(2 * BATCH))

SCENARIOS = {
    "run into shards": Scenario(
        _nothing,
        _long_run("long/run/", 8, shard_samples=3),
        _shards("long/run/traces", 3, 8),
    ),
    "run of groups": Scenario(_nothing, _run_of_groups, _shards("run/traces", 4, 8)),
    "run into one archive": Scenario(_nothing, _long_run("run.h5", 3), {"run.h5": [0, 1, 2]}),
    "convert": Scenario(
        _batches, _convert("new/archives/"), {f"new/archives/b{n}.h5": _BOTH[n] for n in (0, 1)}
    ),
    "convert to shards": Scenario(
        _batches, _convert("run.h5", merge=True, shard_samples=3), _shards("run", 3, 8)
    ),
    "merge": Scenario(_archives, _repack("run.h5"), {"run.h5": _ALL}),
    "repack": Scenario(
        _archives, _repack("run.h5", precision=PrecisionOptions(codec="zstd")), {"run.h5": _ALL}
    ),
    "split": Scenario(
        _archives,
        _repack("new/run.h5", target=TargetOptions(shard_samples=3)),
        _shards("new/run", 3, 8),
    ),
}


def long_scenario(num_samples: int) -> Scenario:
    """A run of so many samples into shards of 10, for kills at random moments."""
    return Scenario(
        _nothing,
        _long_run("run/", num_samples, shard_samples=10),
        _shards("run/traces", 10, num_samples),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of conversions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
