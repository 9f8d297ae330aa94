"""How fast files of each kind are converted, beside merely reading them.

    python benchmarks/sources.py [--mb 200] [--runs 3] [--tokens 256] [KIND ...]
    python benchmarks/sources.py --memory [--mb 2000] [--tokens 256] [KIND ...]

The same traces (8 layers of hidden size 1024 and attentions of 8 heads, float16) are written in
every kind. *read* is the time of reading the bytes of the files, *records* that of making records,
*convert* that of `h5traces.convert` with default options; MB/s are of raw arrays. *peak* is the
memory that the conversion takes, in a separate process, beyond what it has after importing.

With `--memory`, one file of 2 GB of each kind that can be streamed is converted once, and the peak
is compared with 200 MB and twice the largest sample. The file lies in the folder for temporary
files, and is deleted afterwards. JSON Lines take five times the bytes of their numbers.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
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

    import pyarrow as pa

LAYERS, HIDDEN, HEADS = 8, 1024, 8
CHILD = """
import re, sys, time
import h5traces, h5traces.rewriting.convert
from h5traces.sources import arrow, mapped_source, named_arrays, torch_file

def memory(name):
    status = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) / 1024

# A process begins with the peak of the one that started it.
open("/proc/self/clear_refs", "w").write("5")
before, start = memory("VmRSS"), time.perf_counter()
target = h5traces.TargetOptions(overwrite=True)
reading = h5traces.ReadingOptions(mapping=sys.argv[3] if sys.argv[3:] else None)
report = h5traces.convert(sys.argv[1], sys.argv[2], merge=True, target=target, reading=reading)
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


def stream_raw(path: Path, samples: Iterator[dict]) -> None:
    with path.open("wb") as file:
        for sample in samples:
            file.write(sample["hidden_states"])


def stream_folder(path: Path, samples: Iterator[dict]) -> None:
    """A file of every layer, for all samples."""
    path.mkdir()
    first = next(samples)["hidden_states"]
    files = [(path / f"hidden_{layer:03d}.npy").open("wb") for layer in range(LAYERS)]
    places = [each.seek(128) for each in files]
    count = 0
    for sample in itertools.chain([{"hidden_states": first}], samples):
        count += 1
        for file, layer in zip(files, sample["hidden_states"], strict=True):
            file.write(layer)
    head = {"descr": "<f2", "fortran_order": False, "shape": (count, *first.shape[1:])}
    for file, place in zip(files, places, strict=True):
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, head)
        assert file.tell() == place
        file.close()


def stream_hdf5(path: Path, samples: Iterator[dict], **options: object) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for sample in samples:
            for key in ("hidden_states", "attentions"):
                file.create_dataset(f"{sample['question_id']}/{key}", data=sample[key], **options)


def stream_hdf5_layers(path: Path, samples: Iterator[dict]) -> None:
    """A dataset of every layer, for all samples."""
    import h5py

    with h5py.File(path, "w") as file:
        for index, sample in enumerate(samples):
            for layer, states in enumerate(sample["hidden_states"]):
                name, shape = f"layer_{layer}/inputs", states.shape
                if not index:
                    file.create_dataset(name, (0, *shape), "<f2", maxshape=(None, *shape))
                file[name].resize(index + 1, axis=0)
                file[name][index] = states


def nested(array: np.ndarray) -> pa.Array:
    """One cell: lists of lists of numbers."""
    import pyarrow as pa

    found = pa.array(array.reshape(-1))
    for size in reversed(array.shape):
        ends = pa.array(range(0, len(found) + 1, size), pa.int32())
        found = pa.ListArray.from_arrays(ends, found)
    return found


def batches(samples: Iterator[dict], rows: int = 1) -> Iterator[pa.RecordBatch]:
    """Record batches of so many rows."""
    import pyarrow as pa

    cells = (
        pa.record_batch(
            {
                key: nested(value) if isinstance(value, np.ndarray) else pa.array([value])
                for key, value in sample.items()
            }
        )
        for sample in samples
    )
    while part := list(itertools.islice(cells, rows)):
        yield pa.concat_batches(part)


def stream_parquet(path: Path, samples: Iterator[dict], rows: int = 1) -> None:
    from pyarrow import parquet

    every = batches(samples, rows)
    first = next(every)
    with parquet.ParquetWriter(path, first.schema, use_dictionary=False) as writer:
        for batch in itertools.chain([first], every):
            writer.write_batch(batch)


def stream_arrow(path: Path, samples: Iterator[dict], rows: int = 1) -> None:
    from pyarrow import ipc

    every = batches(samples, rows)
    first = next(every)
    with ipc.new_file(path, first.schema) as writer:
        for batch in itertools.chain([first], every):
            writer.write_batch(batch)


def stream_datasets(path: Path, samples: Iterator[dict]) -> None:
    """As `save_to_disk` of datasets writes it, which would copy all by itself: a stream."""
    from pyarrow import ipc

    path.mkdir()
    every = batches(samples, 20)
    first = next(every)
    with ipc.new_stream(path / "data-00000-of-00001.arrow", first.schema) as writer:
        for batch in itertools.chain([first], every):
            writer.write_batch(batch)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


def stream_jsonl(path: Path, samples: Iterator[dict]) -> None:
    texts: dict[int, str] = {}
    with path.open("w") as file:
        for index, sample in enumerate(samples):
            kept = index % 8
            if kept not in texts:
                rest = {key: sample[key].tolist() for key in ("hidden_states", "tokens")}
                texts[kept] = json.dumps(rest).removeprefix("{")
            file.write(f'{{"question_id": "{sample["question_id"]}", {texts[kept]}\n')


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
    "npz, mapping": stream_npz,
    "raw, mapping": stream_raw,
    "npy, mapping": stream_folder,
    "hdf5, mapping": stream_hdf5,
    "hdf5, gzip": partial(stream_hdf5, chunks=True, compression="gzip", compression_opts=1),
    "hdf5, layers": stream_hdf5_layers,
    "parquet": stream_parquet,
    "parquet, 20 rows": partial(stream_parquet, rows=20),
    "arrow": stream_arrow,
    "arrow, 20 rows": partial(stream_arrow, rows=20),
    "datasets": stream_datasets,
    "jsonl": stream_jsonl,
}
BY_ID = """
[fields.hidden_states]
name = "{id}/hidden_states"
axes = "layer token hidden"
[fields.attentions]
name = "{id}/attentions"
axes = "layer head query key"
"""
BY_LAYER = """
folder = FOLDER
first_state = "block"
[fields.hidden_states]
name = "NAME"
axes = "sample token hidden"
"""
MAPPINGS = {
    "npz, mapping": f"{BY_ID}[fields.tokens]\nname = '{{id}}/tokens'\n",
    "raw, mapping": f"""
[array]
dtype = "float16"
shape = [-1, {LAYERS}, TOKENS, {HIDDEN}]
[fields.hidden_states]
name = "array"
axes = "sample layer token hidden"
""",
    "npy, mapping": BY_LAYER.replace("FOLDER", "true").replace("NAME", "hidden_{layer}"),
    "hdf5, mapping": BY_ID,
    "hdf5, gzip": BY_ID,
    "hdf5, layers": BY_LAYER.replace("FOLDER", "false").replace("NAME", "layer_{layer}/inputs"),
}
LIMIT_MB = 200
LAYERED = ("hidden_states", "attentions")
# These files hold no attentions.
STATES_ALONE = ("raw, mapping", "npy, mapping", "hdf5, layers", "jsonl")
SPEEDS = [*KINDS, *(name for name in STREAMED if name not in KINDS)]


def repeated(samples: list[dict], count: int) -> Iterator[dict]:
    """This many samples, each different in one number, in separate arrays."""
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
            mapping = Path(inside) / "mapping.toml"
            mapping.write_text(MAPPINGS.get(name, "").replace("TOKENS", str(tokens)))
            seconds, peak = convert(
                path, Path(inside) / "out.h5", mapping if name in MAPPINGS else None
            )
            is_within &= peak <= limit
            files = [path, *path.rglob("*")]
            size = sum(each.stat().st_size for each in files if each.is_file()) / 1e6
        print(f"{name:18}{size:8.0f}{seconds:11.2f}{peak:9.0f}", flush=True)
    return is_within


def write_apart(name: str, path: Path, samples: list[dict], count: int) -> None:
    """Write a file in a separate process, which gives back its memory."""
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


def read_records(sources: list[Path], mapping: Path | None) -> float:
    from h5traces import ReadingOptions
    from h5traces.sources.opening import open_source

    reading = ReadingOptions(mapping=mapping)
    start = time.perf_counter()
    for path in sources:
        with open_source(path, reading) as source:
            for record in source.records():
                for kind in record.layered.values():
                    for each in kind.arrays:
                        steps = getattr(each.array, "steps", None) or (each.array.load(),)
                        for step in steps:
                            # A strided sum touches every page.
                            step.values.reshape(-1).view(np.uint8)[::4096].sum()
                del record
    return time.perf_counter() - start


def convert(folder: Path, target: Path, mapping: Path | None = None) -> tuple[float, float]:
    options = [] if mapping is None else [str(mapping)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(target), *options],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(SPEEDS)}")
    parser.add_argument("--memory", action="store_true", help="one file of 2 GB of each kind")
    parser.add_argument("--mb", type=int, help="raw megabytes (default: 200, with --memory 2000)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample (default: 256)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    options = parser.parse_args()
    if options.memory:
        names = options.kinds or list(STREAMED)
        sys.exit(0 if memory(names, options.mb or 2000, options.tokens) else 1)
    speed(options.kinds or list(SPEEDS), traces(options.mb or 200, options.tokens), options)


def speed(names: Sequence[str], samples: list[dict], options: argparse.Namespace) -> None:
    """Convert files of each kind, beside reading their bytes and making records of them."""
    sizes = {key: sum(each[key].nbytes for each in samples) / 1e6 for key in LAYERED}
    print(f"{len(samples)} samples of {sum(sizes.values()) / len(samples):.1f} MB")
    columns = f"{'records s':>11}{'convert s':>11}{'MB/s':>7}{'peak MB':>9}"
    print(f"{'':18}{'file MB':>8}{'read s':>8}{columns}")
    for name in names:
        with tempfile.TemporaryDirectory() as inside:
            folder, mapping = Path(inside) / "in", None
            folder.mkdir()
            if name in KINDS:
                KINDS[name](folder, samples)
                source, sources = folder, sorted(folder.iterdir())
            else:
                source = folder / "batch.bin"
                sources = [source]
                write_apart(name, source, samples, len(samples))
            if name in MAPPINGS:
                mapping = Path(inside) / "mapping.toml"
                mapping.write_text(MAPPINGS[name].replace("TOKENS", str(options.tokens)))
            files = sorted(each for each in folder.rglob("*") if each.is_file())
            size = sum(each.stat().st_size for each in files) / 1e6
            raw = sizes["hidden_states"] if name in STATES_ALONE else sum(sizes.values())
            read = statistics.median(read_bytes(files) for _ in range(options.runs))
            records = statistics.median(read_records(sources, mapping) for _ in range(options.runs))
            done = [convert(source, Path(inside) / "out.h5", mapping) for _ in range(options.runs)]
            seconds = statistics.median(each for each, _ in done)
            print(
                f"{name:18}{size:8.0f}{read:8.2f}{records:11.2f}{seconds:11.2f}"
                f"{raw / seconds:7.0f}{max(peak for _, peak in done):9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
