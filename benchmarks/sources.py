"""How fast files of each kind are converted, beside merely reading them.

    python benchmarks/sources.py [--mb 200] [--runs 3] [--tokens 256] [KIND ...]
    python benchmarks/sources.py --memory [--mb 2000] [--tokens 256] [KIND ...]

The same traces (8 layers of hidden size 1024 and attentions of 8 heads, float16) are written in
every kind. *read* is the time of reading the bytes of the files, *records* that of making records,
*convert* that of `h5traces.convert` with default options; MB/s are of raw arrays. *peak* is the
memory that the conversion takes, in a process of its own, beyond what it has after importing.

With `--memory`, one file of 2 GB of each kind that can be streamed is converted once, and the peak
is compared with 200 MB and twice the largest sample. The file lies in the folder for temporary
files, and is deleted afterwards.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import multiprocessing
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYERS, HIDDEN, HEADS = 8, 1024, 8
CHILD = """
import re, sys, time
import h5traces, h5traces.rewriting.convert
from h5traces.sources import named_arrays, torch_file

def memory(name):
    status = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) / 1024

# A process begins with the peak of the one that started it.
open("/proc/self/clear_refs", "w").write("5")
before, start = memory("VmRSS"), time.perf_counter()
target = h5traces.TargetOptions(overwrite=True)
report = h5traces.convert(sys.argv[1], sys.argv[2], merge=True, target=target)
seconds = time.perf_counter() - start
assert report.ok, report
print(seconds, memory("VmHWM") - before)
"""


def traces(megabytes: int, tokens: int) -> list[dict]:
    """Samples that compress about as traces do: float16 of numbers made in float16."""
    rng = np.random.default_rng(0)
    one = LAYERS * (tokens * HIDDEN + HEADS * tokens * tokens) * 2
    found = []
    for index in range(max(1, megabytes * 1_000_000 // one)):
        scores = np.exp(rng.normal(size=(LAYERS, HEADS, tokens, tokens)).astype(np.float32) * 2)
        scores = np.tril(scores)
        found.append(
            {
                "question_id": f"q{index}",
                "hidden_states": rng.normal(size=(LAYERS, tokens, HIDDEN)).astype(np.float16),
                "attentions": (scores / scores.sum(-1, keepdims=True)).astype(np.float16),
                "tokens": rng.integers(0, 30_000, tokens),
            }
        )
    return found


def listed(sample: dict) -> dict:
    """A sample with lists of layers, as batches have them."""
    return {**sample, **{key: list(sample[key]) for key in ("hidden_states", "attentions")}}


def in_torch(sample: dict) -> dict:
    import torch

    lists = {
        key: [torch.from_numpy(each.copy()) for each in sample[key]]
        for key in ("hidden_states", "attentions")
    }
    return {**sample, **lists, "tokens": torch.from_numpy(sample["tokens"])}


def write_pickle(folder: Path, samples: list[dict]) -> None:
    (folder / "batch.pkl").write_bytes(pickle.dumps([listed(each) for each in samples]))


def write_pickle_gz(folder: Path, samples: list[dict]) -> None:
    with gzip.open(folder / "batch.pkl.gz", "wb", compresslevel=1) as file:
        pickle.dump([listed(each) for each in samples], file)


def write_torch(folder: Path, samples: list[dict]) -> None:
    import torch

    torch.save([in_torch(each) for each in samples], folder / "batch.pt")


def write_torch_old(folder: Path, samples: list[dict]) -> None:
    import torch

    found = [in_torch(each) for each in samples]
    torch.save(found, folder / "batch.pt", _use_new_zipfile_serialization=False)


def write_safetensors(folder: Path, samples: list[dict]) -> None:
    from safetensors.numpy import save_file

    for sample in samples:
        arrays = {key: value for key, value in sample.items() if key != "question_id"}
        arrays["hidden_states"] = np.ascontiguousarray(arrays["hidden_states"].transpose(1, 0, 2))
        save_file(arrays, folder / f"{sample['question_id']}.safetensors")


def write_npz(folder: Path, samples: list[dict]) -> None:
    for sample in samples:
        np.savez(folder / f"{sample['question_id']}.npz", **sample)


def write_npz_deflated(folder: Path, samples: list[dict]) -> None:
    for sample in samples:
        np.savez_compressed(folder / f"{sample['question_id']}.npz", **sample)


KINDS = {
    "pickle": write_pickle,
    "pickle, gzip": write_pickle_gz,
    "torch.save": write_torch,
    "torch.save, old": write_torch_old,
    "safetensors": write_safetensors,
    "npz": write_npz,
    "npz, deflated": write_npz_deflated,
}


# --- one file of each kind, for memory ------------------------------------------------------------


def stream_pickle(path: Path, samples: Iterator[dict], *, compressed: bool = False) -> None:
    with gzip.open(path, "wb", compresslevel=1) if compressed else path.open("wb") as file:
        for sample in samples:
            pickle.dump([listed(sample)], file)


def stream_mapping(path: Path, samples: Iterator[dict]) -> None:
    """A dict by id."""
    found = {each["question_id"]: listed(each) for each in samples}
    with path.open("wb") as file:
        pickle.dump(found, file)


def stream_columns(path: Path, samples: Iterator[dict]) -> None:
    found: dict[str, list] = {}
    for sample in samples:
        for key, value in listed(sample).items():
            found.setdefault(key, []).append(value)
    # Lists of lists of one array are taken for steps: one column per kind holds stacked arrays.
    for key in ("hidden_states", "attentions"):
        found[key] = [[[step] for step in layers] for layers in found[key]]
    with path.open("wb") as file:
        pickle.dump({f"{key}s" if key == "question_id" else key: found[key] for key in found}, file)


def stream_torch(path: Path, samples: Iterator[dict], *, zipped: bool = True) -> None:
    import torch

    found = [in_torch(each) for each in samples]
    torch.save(found, path, _use_new_zipfile_serialization=zipped)


def stream_safetensors(path: Path, samples: Iterator[dict]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(by_prefix(samples)), path)


def stream_npz(path: Path, samples: Iterator[dict], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, value in by_prefix(samples):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value)


def by_prefix(samples: Iterator[dict]) -> Iterator[tuple[str, np.ndarray]]:
    for sample in samples:
        for key, value in sample.items():
            if key != "question_id":
                yield f"{sample['question_id']}/{key}", value


STREAMED = {
    "pickle": stream_pickle,
    "pickle, gzip": partial(stream_pickle, compressed=True),
    "pickle, by id": stream_mapping,
    "pickle, columns": stream_columns,
    "torch.save": stream_torch,
    "torch.save, old": partial(stream_torch, zipped=False),
    "safetensors": stream_safetensors,
    "npz": stream_npz,
    "npz, deflated": partial(stream_npz, method=zipfile.ZIP_DEFLATED),
}
LIMIT_MB = 200


def repeated(samples: list[dict], count: int) -> Iterator[dict]:
    """So many samples, each different in one number, in arrays of their own."""
    for index in range(count):
        sample = {key: copy.copy(value) for key, value in samples[index % len(samples)].items()}
        sample["question_id"] = f"q{index}"
        sample["hidden_states"][0, 0, 0] = index
        yield sample


def memory(names: Sequence[str], megabytes: int, tokens: int) -> bool:
    """Convert one large file of each kind; whether all stay within the limit."""
    samples = traces(100, tokens)
    one = sum(value.nbytes for value in samples[0].values() if isinstance(value, np.ndarray)) / 1e6
    limit, is_within = LIMIT_MB + 2 * one, True
    print(f"{megabytes // one:.0f} samples of {one:.1f} MB; limit {limit:.0f} MB")
    print(f"{'':18}{'file MB':>8}{'convert s':>11}{'peak MB':>9}")
    for name in names:
        with tempfile.TemporaryDirectory() as inside:
            path = Path(inside) / "batch.bin"
            write_apart(name, path, samples, int(megabytes // one))
            seconds, peak = convert(path, Path(inside) / "out.h5")
            is_within &= peak <= limit
            size = path.stat().st_size / 1e6
        print(f"{name:18}{size:8.0f}{seconds:11.2f}{peak:9.0f}", flush=True)
    return is_within


def write_apart(name: str, path: Path, samples: list[dict], count: int) -> None:
    """Write a file in a process of its own, which gives back its memory."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: STREAMED[name](path, repeated(samples, count)))
    process.start()
    process.join()
    assert process.exitcode == 0, name


def read_bytes(files: list[Path]) -> float:
    start = time.perf_counter()
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_records(files: list[Path]) -> float:
    from h5traces.sources.opening import open_source

    start = time.perf_counter()
    for path in files:
        with open_source(path) as source:
            for record in source.records():
                for kind in record.layered.values():
                    for each in kind.arrays:
                        # A strided sum touches every page.
                        each.array.load().values.reshape(-1).view(np.uint8)[::4096].sum()
                del record
    return time.perf_counter() - start


def convert(folder: Path, target: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(target)],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--memory", action="store_true", help="one file of 2 GB of each kind")
    parser.add_argument("--mb", type=int, help="raw megabytes (default: 200, with --memory 2000)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample (default: 256)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    options = parser.parse_args()
    if options.memory:
        names = options.kinds or list(STREAMED)
        sys.exit(0 if memory(names, options.mb or 2000, options.tokens) else 1)
    samples = traces(options.mb or 200, options.tokens)
    raw = sum(each[key].nbytes for each in samples for key in ("hidden_states", "attentions"))
    print(f"{len(samples)} samples of {raw / len(samples) / 1e6:.1f} MB")
    columns = f"{'records s':>11}{'convert s':>11}{'MB/s':>7}{'peak MB':>9}"
    print(f"{'':18}{'file MB':>8}{'read s':>8}{columns}")
    for name in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as inside:
            folder = Path(inside) / "in"
            folder.mkdir()
            KINDS[name](folder, samples)
            files = sorted(folder.iterdir())
            size = sum(each.stat().st_size for each in files)
            read = statistics.median(read_bytes(files) for _ in range(options.runs))
            records = statistics.median(read_records(files) for _ in range(options.runs))
            done = [convert(folder, Path(inside) / "out.h5") for _ in range(options.runs)]
            seconds = statistics.median(each for each, _ in done)
            print(
                f"{name:18}{size / 1e6:8.0f}{read:8.2f}{records:11.2f}{seconds:11.2f}"
                f"{raw / 1e6 / seconds:7.0f}{max(peak for _, peak in done):9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
