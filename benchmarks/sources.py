"""How fast files of each kind are converted, beside merely reading them.

    python benchmarks/sources.py [--mb 200] [--runs 3] [--tokens 256] [KIND ...]

The same traces (8 layers of hidden size 1024 and attentions of 8 heads, float16) are written in
every kind. *read* is the time of reading the bytes of the files, *records* that of making records,
*convert* that of `h5traces.convert` with default options; MB/s are of raw arrays. *peak* is the
memory that the conversion takes, in a process of its own, beyond what it has after importing.
"""

from __future__ import annotations

import argparse
import gzip
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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
    parser.add_argument("--mb", type=int, default=200, help="raw megabytes (default: 200)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample (default: 256)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    options = parser.parse_args()
    samples = traces(options.mb, options.tokens)
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
