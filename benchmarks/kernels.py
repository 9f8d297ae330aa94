"""Each compiled kernel beside what Python does without it, and beside the libraries it replaces.

Run ``python benchmarks/kernels.py`` (one minute); it prints a markdown table. Data are of
``benchmarks/encoder.py``: hidden states and causal attentions of Llama-2-7B's shape, 43 tokens.
All rows of a table see the same data one after the other in every round, so the ratios hold on a
busy machine, and megabytes of raw data per second do not; medians of the rounds. A *limit* does
nothing but inflate, without checksums, shuffles and files.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import xxhash
from encoder import attentions, hidden_states

from h5traces.format import dtypes
from h5traces.format.digests import chunk_checksum
from h5traces.format.dtypes import TypedArray, cast_for_storage, count_not_finite
from h5traces.format.native import NATIVE, describe
from h5traces.precision import attention, channel_steps
from h5traces.precision.scales import ChannelScale
from h5traces.storage import deflate, kernels
from h5traces.storage.kernels import PLAN, run_plan

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ARRAYS, NUM_TOKENS = 16, 43
PLAIN = deflate.Engines(
    deflate.ENGINES.isal_zlib, deflate.ENGINES.igzip_lib, deflate.ENGINES.zlib_ng
)


def plain(module: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call without compiled kernels."""

    def run() -> None:
        with (
            mock.patch.object(module, "NATIVE", None),
            mock.patch.object(deflate, "ENGINES", PLAIN),
        ):
            call()

    return run


def plan_of(arrays: list[np.ndarray]) -> tuple[Any, bytes, list[bytes]]:
    """A plan that restores the arrays one after the other, and their chunks."""
    chunks = [deflate.encode(each, itemsize=each.itemsize) for each in arrays]
    plan = np.zeros(len(arrays), PLAN)
    for row, values, chunk in zip(plan, arrays, chunks, strict=True):
        row["nbytes"], row["raw_nbytes"] = len(chunk), values.nbytes
        row["count"], row["itemsize"] = values.size, values.itemsize
        row["checksum"], row["is_checked"] = chunk_checksum(chunk), 1
    for place, size in (("offset", "nbytes"), ("target", "raw_nbytes")):
        plan[place] = np.cumsum(plan[size]) - plan[size]
    return plan, b"".join(chunks), chunks


def reading(arrays: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    plan, stored, chunks = plan_of(arrays)
    arena = np.empty(sum(each.nbytes for each in arrays), np.uint8)

    def run(threads: int = 1) -> None:
        run_plan(plan, stored, arena, threads=threads)

    def inflate(call: Callable[[bytes, int], Any]) -> Callable[[], None]:
        def all_chunks() -> None:
            for chunk, values in zip(chunks, arrays, strict=True):
                call(chunk, values.nbytes)

        return all_chunks

    def run_alone() -> None:
        for row in range(len(plan)):
            run_plan(plan[row : row + 1], stored, arena)

    isal, zlib_ng = deflate.ENGINES.isal_zlib, deflate.ENGINES.zlib_ng
    cases = {
        "plan": run,
        "plan, a chunk in a call": run_alone,
        "plan, 2 threads": lambda: run(2),
        "plan, Python": plain(kernels, run),
    }
    if isal:
        cases["limit: ISA-L"] = inflate(lambda chunk, size: isal.decompress(chunk, bufsize=size))
    if zlib_ng:
        cases["limit: zlib-ng"] = inflate(
            lambda chunk, size: zlib_ng.decompress(chunk, bufsize=size)
        )
    try:
        from deflate import zlib_decompress
    except ImportError:
        return cases
    return cases | {"limit: libdeflate": inflate(zlib_decompress)}


def writing(arrays: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    def run() -> None:
        for each in arrays:
            deflate.encode(each, itemsize=each.itemsize)

    return {"encode": run, "encode, Python": plain(deflate, run)}


def both(name: str, module: Any, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    return {name: call, f"{name}, Python": plain(module, call)}


def numbers(states: np.ndarray, weights: np.ndarray) -> dict[str, dict[str, Callable[[], Any]]]:
    """Casts and tiers, of hidden states and attention weights in float16."""
    wide = TypedArray(states.astype(np.float32), "float32")
    sigma = states.astype(np.float32).std(axis=0) + np.float32(1e-3)
    found = {}
    for name, step in (("one byte", 0.25), ("two bytes", 0.05)):
        scale = ChannelScale(sigma * np.float32(step), np.zeros_like(sigma), sigma)
        form = channel_steps.StepFormat.of(step)
        stored, _ = channel_steps.to_steps(states, scale, step)

        def encode(scale: ChannelScale = scale, step: float = step) -> None:
            channel_steps.to_steps(states, scale, step)

        def decode(
            scale: ChannelScale = scale, form: Any = form, stored: np.ndarray = stored
        ) -> None:
            channel_steps.from_steps(stored, scale, form.zero_point, form.spacing, as_half=True)

        found[f"to steps of {name}"] = both("to_steps", channel_steps, encode)
        found[f"from steps of {name}"] = both("from_steps", channel_steps, decode)
    levels, _ = attention.to_levels(weights)
    return found | {
        "to levels": both("to_levels", attention, lambda: attention.to_levels(weights)),
        "from levels": both(
            "from_levels", attention, lambda: attention.from_levels(levels, 255, as_half=True)
        ),
        "float32 to float16, counted": both("cast", dtypes, lambda: cast_for_storage(wide)),
        "count of NaN": both(
            "count", dtypes, lambda: count_not_finite(TypedArray(states, "float16"))
        ),
    }


def stepped(states: list[np.ndarray], step: float) -> list[np.ndarray]:
    """Hidden states as a tier with this step, in sigma, stores them."""
    found = []
    for each in states:
        sigma = each.astype(np.float32).std(axis=0) + np.float32(1e-3)
        scale = ChannelScale(sigma * np.float32(step), np.zeros_like(sigma), sigma)
        found.append(channel_steps.to_steps(each, scale, step)[0])
    return found


def checksums(data: np.ndarray) -> dict[str, Callable[[], Any]]:
    return {
        "xxh3-128": lambda: NATIVE.store(((data, 0, b"head", -1),)),
        "xxh3-128, xxhash": lambda: xxhash.xxh3_128_digest(data),
    }


def measure(cases: dict[str, Callable[[], Any]], nbytes: int, rounds: int) -> dict[str, float]:
    """Raw bytes per second of every case."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: nbytes / statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if NATIVE is None:
        parser.error(describe())
    rng = np.random.default_rng(1)
    states = [hidden_states(rng, NUM_TOKENS).astype("<f2") for _ in range(NUM_ARRAYS)]
    weights = [attentions(rng, NUM_TOKENS).astype("<f2") for _ in range(NUM_ARRAYS)]
    tables: dict[str, tuple[dict[str, Callable[[], Any]], int]] = {}
    kinds = {
        "hidden states": states,
        "hidden states of fine": stepped(states, 0.02),
        "hidden states of compact": stepped(states, 0.4),
        "attentions": weights,
    }
    for name, arrays in kinds.items():
        nbytes = sum(each.nbytes for each in arrays)
        tables[f"reading {name}"] = reading(arrays), nbytes
        tables[f"writing {name}"] = writing(arrays), nbytes
    for name, cases in numbers(states[0], weights[0]).items():
        nbytes = weights[0].nbytes if "level" in name else states[0].nbytes
        tables[name] = cases, nbytes
    tables["checksums"] = (
        checksums(np.concatenate(states).view(np.uint8).ravel()),
        sum(each.nbytes for each in states),
    )
    print(f"{describe()}\n\n| | case | MB/s | of the first |\n|---|---|---:|---:|")
    for name, (cases, nbytes) in tables.items():
        speeds = measure(cases, nbytes, options.rounds)
        first = next(iter(speeds.values()))
        for case, speed in speeds.items():
            print(f"| {name} | {case} | {speed / 1e6:.0f} | {speed / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
