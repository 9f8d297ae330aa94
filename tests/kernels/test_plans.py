"""Plans of chunks restore what was stored, and say which row is damaged."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from h5traces.format.digests import chunk_checksum
from h5traces.precision.attention import from_levels
from h5traces.precision.channel_steps import from_steps
from h5traces.precision.scales import ChannelScale
from h5traces.storage.codecs import CODECS
from h5traces.storage.kernels import PLAN, PLAN_CODECS, ChunkError, Restoring, run_plan

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 24
RNG = np.random.default_rng(7)
STEPS = RNG.integers(0, 256, (40, WIDTH)).astype(np.uint8)
FINE = RNG.integers(0, 65536, (40, WIDTH)).astype("<u2")
LEVELS = (RNG.random((30, 50)) ** 4 * 255).astype(np.uint8)
STATES = RNG.normal(0, 1, (50, WIDTH)).astype("<f2")
SCALE = ChannelScale(
    np.float32(2.0) ** RNG.integers(-9, 3, WIDTH).astype(np.float32),
    RNG.normal(0, 9, WIDTH).astype(np.float32),
    np.ones(WIDTH, np.float32),
)


def steps_table(spacing: int) -> bytes:
    return (SCALE.step / np.float32(spacing)).tobytes() + SCALE.offset.tobytes()


def levels_table(dtype: str) -> bytes:
    return from_levels(np.arange(256, dtype=np.uint8), 255, as_half=dtype == "f2").tobytes()


# Stored values, how they are restored, its table, and what comes out.
CASES: dict[str, tuple[Any, Restoring, bytes, Any]] = {
    "float16": (STATES, Restoring.AS_STORED, b"", STATES),
    "float64": (STATES.astype("<f8"), Restoring.AS_STORED, b"", STATES.astype("<f8")),
    "bytes": (STEPS, Restoring.AS_STORED, b"", STEPS),
    "steps to float16": (
        *(STEPS, Restoring.STEPS_TO_FLOAT16, steps_table(1)),
        from_steps(STEPS, SCALE, 128, 1, as_half=True),
    ),
    "steps to float32": (
        *(STEPS, Restoring.STEPS_TO_FLOAT32, steps_table(1)),
        from_steps(STEPS, SCALE, 128, 1, as_half=False),
    ),
    "fine steps to float16": (
        *(FINE, Restoring.STEPS_TO_FLOAT16, steps_table(8)),
        from_steps(FINE, SCALE, 128, 8, as_half=True),
    ),
    "fine steps to float32": (
        *(FINE, Restoring.STEPS_TO_FLOAT32, steps_table(8)),
        from_steps(FINE, SCALE, 128, 8, as_half=False),
    ),
    "levels to float16": (
        *(LEVELS, Restoring.TABLE_OF_2_BYTES, levels_table("f2")),
        from_levels(LEVELS, 255, as_half=True),
    ),
    "levels to float32": (
        *(LEVELS, Restoring.TABLE_OF_4_BYTES, levels_table("f4")),
        from_levels(LEVELS, 255, as_half=False),
    ),
    "float16 to float32": (STATES, Restoring.FLOAT16_TO_FLOAT32, b"", STATES.astype("<f4")),
    "bfloat16 to float32": (
        *(STATES.astype("<f4").view("<u4") >> 16).astype("<u2")[None],
        *(Restoring.BFLOAT16_TO_FLOAT32, b""),
        (STATES.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4"),
    ),
}


def make_plan(names: list[str], codec: str = "gzip") -> tuple[Any, bytes, bytes]:
    """A plan of the cases, the bytes stored one after the other, and the tables."""
    plan, stored, tables, target = np.zeros(len(names), PLAN), b"", b"", 0
    for row, name in zip(plan, names, strict=True):
        values, how, table, restored = CASES[name]
        chunk = CODECS[codec].encode(values.reshape(-1).view(np.uint8).data, values.itemsize)
        row["offset"], row["nbytes"] = len(stored), len(chunk)
        row["checksum"], row["is_checked"] = chunk_checksum(chunk), 1
        row["raw_nbytes"], row["count"], row["target"] = values.nbytes, values.size, target
        row["table"], row["itemsize"], row["width"] = len(tables), values.itemsize, WIDTH
        row["zero_point"], row["restoring"] = 128, how
        row["codec"] = PLAN_CODECS.index(codec)
        stored, tables = stored + chunk, tables + table
        target += -(-restored.nbytes // 64) * 64
    return plan, stored, tables


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("codec", PLAN_CODECS)
@pytest.mark.parametrize("threads", [1, 3])
def test_all_kinds_of_chunks_come_back(codec: str, threads: int, tmp_path: Path) -> None:
    names = list(CASES) * 3
    plan, stored, tables = make_plan(names, codec)
    path = tmp_path / "chunks"
    path.write_bytes(stored)
    with path.open("rb") as file:
        for source in (stored, file.fileno()):
            arena = bytearray(b"\xaa" * (int(plan["target"][-1]) + 9999))
            run_plan(plan, source, arena, tables, threads=threads)
            expected = bytearray(b"\xaa" * len(arena))
            for row, name in zip(plan, names, strict=True):
                restored, start = CASES[name][3].tobytes(), int(row["target"])
                expected[start : start + len(restored)] = restored
            assert arena == expected


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", CASES)
def test_a_part_of_a_chunk_comes_back(name: str) -> None:
    plan, stored, tables = make_plan([name])
    restored = CASES[name][3].reshape(-1)
    first, count = 31, 77
    plan["first"], plan["count"], plan["target"] = first, count, 8
    arena = bytearray(8 + count * restored.itemsize + 8)
    run_plan(plan, stored, arena, tables)
    inner = restored[first : first + count].tobytes()
    assert bytes(arena) == bytes(8) + inner + bytes(8)


def damaged(stored: bytes, plan: Any) -> bytes:
    at = int(plan["offset"][1]) + int(plan["nbytes"][1]) // 2
    return stored[:at] + bytes([stored[at] ^ 0x55]) + stored[at + 1 :]


WRONG = {
    "checksum": ({}, "its checksum does not fit"),
    "nbytes": ({"nbytes": 10**6}, "are not in the file"),
    "offset": ({"offset": -1}, "are not in the file"),
    "no checksum": ({"is_checked": 0}, "the stored bytes are not an intact zlib stream"),
    "size": ({"raw_nbytes": 100, "is_checked": 0}, "the zlib stream"),
    "count": ({"count": 10**9}, "are not in the chunk"),
    "first": ({"first": -1}, "are not in the chunk"),
    "target": ({"target": 1 << 40}, "do not fit into"),
    "negative target": ({"target": -64}, "do not fit into"),
}


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("case", sorted(WRONG))
def test_the_damaged_row_is_named(case: str) -> None:
    plan, stored, tables = make_plan(["float16"] * 3)
    changes, message = WRONG[case]
    for name, value in changes.items():
        plan[name][1] = value
    if case in ("checksum", "no checksum"):
        stored = damaged(stored, plan)
    with pytest.raises(ChunkError, match=message) as caught:
        run_plan(plan, stored, bytearray(20_000), tables, threads=2)
    assert caught.value.row == 1


@pytest.mark.usefixtures("_kernels")
def test_an_empty_plan_does_nothing() -> None:
    run_plan(np.zeros(0, PLAN), b"", bytearray(0))


@pytest.mark.usefixtures("_kernels")
def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    plan, stored, tables = make_plan(["float16", "bytes"])
    path = tmp_path / "chunks"
    path.write_bytes(stored[:-1])
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ChunkError, match="it was truncated") as caught:
            run_plan(plan, descriptor, bytearray(20_000), tables)
    finally:
        os.close(descriptor)
    assert caught.value.row == 1
