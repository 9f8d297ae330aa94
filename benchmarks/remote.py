"""What reading from a server costs: by ranges, after a download, and with h5py over fsspec.

Run ``python benchmarks/remote.py`` (a minute); it prints a markdown table. A web server of the
standard library in a separate process answers every request after ``--latency`` milliseconds;
the network itself is the machine's own and so faster than any other, which flatters downloads.
Data are synthetic, at Llama-2-7B's shape (32 layers, 43 tokens), from ``tools/make_synthetic.py``.

*first array* opens and reads one hidden state of one sample; *arrays* reads ``--arrays`` random
(sample, layer) pairs of what is open then, one by one; *batch* reads all layers of hidden states of
these samples, in one call where there is one. Every method gives the same numbers, which is
checked. In every round all methods run one after the other; the first round, which imports
libraries, is not counted; medians, with the range of the rounds in brackets. Requests and megabytes
are of the first array and the arrays together.

Prediction, written before the first run (latency 20 ms, 8 samples): the first array comes 20 times
sooner than by download, with 2 requests against 1; h5py over fsspec takes 10 times the requests of
h5traces for it and several times its bytes, since it fetches blocks of 5 MB.

Outcome on two shared cores: the first array came 5.7 times sooner than by download (4.6 to 7.1),
not 20: within one machine 91 MB take a quarter of a second. Against the pickle it was 18 times. All
17 arrays took 18 requests and 5.2 MB, with h5py over fsspec 69 and 258 MB, and its first array took
8.8 times as long. Once downloaded, arrays are read 28 times faster than one by one over 20 ms of
latency: who reads nearly everything several times should use the cache, or download.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import multiprocessing
import os
import pickle
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fsspec
import h5py
from make_synthetic import Generator, Shape
from suite.folder import made_folder

import h5traces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    import numpy as np

Pair = tuple[int, int]


class Handler(http.server.BaseHTTPRequestHandler):
    """Files by range, each answer after a pause; counts what it sends."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder, latency = Path(), 0.0
    counts: ClassVar[list[int]] = [0, 0]
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/counts":
            body = " ".join(map(str, self.counts)).encode()
            self.counts[:] = [0, 0]
            self.answer(200, len(body), b"", body)
            return
        time.sleep(self.latency)
        path = self.folder / self.path.lstrip("/")
        size = path.stat().st_size
        first, stop, status = 0, size, 200
        found = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found:
            first = int(found[1]) if found[1] else max(0, size - int(found[2]))
            stop = min(size, int(found[2]) + 1) if found[1] and found[2] else size
            status = 206
        with path.open("rb") as file:
            body = os.pread(file.fileno(), stop - first, first) if self.command == "GET" else b""
        with self.lock:
            self.counts[0] += 1
            self.counts[1] += len(body)
        self.answer(status, stop - first, f"bytes {first}-{stop - 1}/{size}".encode(), body)

    def answer(self, status: int, length: int, content_range: bytes, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"benchmark"')
        if content_range:
            self.send_header("Content-Range", content_range.decode())
        self.end_headers()
        self.wfile.write(body)


def serve(folder: Path, latency: float, port: Connection) -> None:
    Handler.folder, Handler.latency = folder, latency
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


@dataclass(frozen=True)
class Cost:
    """Seconds of each step, requests and megabytes of the first two."""

    first: float
    arrays: float
    batch: float
    requests: int
    megabytes: float


Method = tuple["Callable[[Pair], np.ndarray]", "Callable[[Sequence[int]], Any]"]


def by_ranges(url: str, _: Path) -> Method:
    archive = h5traces.open(f"{url}/run.h5")
    return (
        lambda pair: archive[pair[0]]["hidden_states"][pair[1]],
        lambda samples: archive.read(samples, kinds=["hidden_states"]),
    )


def by_download(url: str, folder: Path) -> Method:
    target = folder / "run.h5"
    urllib.request.urlretrieve(f"{url}/run.h5", target)
    archive = h5traces.open(target)
    return (
        lambda pair: archive[pair[0]]["hidden_states"][pair[1]],
        lambda samples: archive.read(samples, kinds=["hidden_states"]),
    )


def by_pickle(url: str, folder: Path) -> Method:
    target = folder / "run.pkl.gz"
    urllib.request.urlretrieve(f"{url}/run.pkl.gz", target)
    with gzip.open(target) as file:
        batch = pickle.load(file)  # written by this script
    return (
        lambda pair: batch[pair[0]]["hidden_states"][pair[1]],
        lambda samples: [batch[each]["hidden_states"] for each in samples],
    )


def by_h5py(url: str, _: Path) -> Method:
    file = h5py.File(fsspec.open(f"{url}/run.h5").open())

    def array(pair: Pair) -> np.ndarray:
        return file[f"samples/{pair[0]:08d}/hidden_states/layer_{pair[1]:03d}"][:]

    def batch(samples: Sequence[int]) -> Any:
        return [[array((each, layer)) for layer in range(32)] for each in samples]

    return array, batch


METHODS = {
    "h5traces, by ranges": by_ranges,
    "download, then h5traces": by_download,
    "download .pkl.gz, then pickle": by_pickle,
    "h5py over fsspec": by_h5py,
}


def measured(
    method: Callable[[str, Path], Method], url: str, pairs: Sequence[Pair], truth: Sequence[bytes]
) -> Cost:
    counts(url)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        array, batch = method(url, Path(folder))
        found = [array(pairs[0])]
        first = time.perf_counter()
        found += [array(pair) for pair in pairs[1:]]
        arrays = time.perf_counter()
        requests, nbytes = counts(url)
        before = time.perf_counter()
        batch([sample for sample, _ in pairs])
        done = time.perf_counter()
    assert [each.tobytes() for each in found] == list(truth)
    return Cost(first - started, arrays - first, done - before, requests, nbytes / 1e6)


def counts(url: str) -> tuple[int, int]:
    with urllib.request.urlopen(f"{url}/counts") as answer:
        requests, nbytes = answer.read().split()
    return int(requests), int(nbytes)


def cell(values: Sequence[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def make_files(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = Generator(Shape(32, options.hidden, options.heads))
    samples = [generator.sample(number, 43) for number in range(options.samples)]
    with gzip.open(folder / "run.pkl.gz", "wb", compresslevel=6) as file:
        pickle.dump(samples, file)
    h5traces.convert(folder / "run.pkl.gz", folder / "run.h5")
    return samples


def report(rounds: Sequence[dict[str, Cost]]) -> None:
    print("| method | first array, s | arrays, s | batch, s | requests | MB | first / by ranges |")
    print("|---|---|---|---|---|---|---|")
    for name in METHODS:
        costs = [each[name] for each in rounds]
        row = [
            cell([each.first for each in costs], ".3f"),
            cell([each.arrays for each in costs], ".3f"),
            cell([each.batch for each in costs], ".3f"),
            f"{statistics.median(each.requests for each in costs):.0f}",
            f"{statistics.median(each.megabytes for each in costs):.1f}",
            cell([each[name].first / each["h5traces, by ranges"].first for each in rounds], ".1f"),
        ]
        print(f"| {name} | {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of reading traces from a server.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--arrays", type=int, default=16)
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--folder", type=made_folder, help="where the served files go")
    options = parser.parse_args()
    chosen = random.Random(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        samples = make_files(folder, options)
        pairs = [
            (chosen.randrange(options.samples), chosen.randrange(32))
            for _ in range(options.arrays + 1)
        ]
        truth = [samples[sample]["hidden_states"][layer].tobytes() for sample, layer in pairs]
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe()
        arguments = (folder, options.latency / 1000, sending)
        server = context.Process(target=serve, args=arguments, daemon=True)
        server.start()
        url = f"http://127.0.0.1:{receiving.recv()}"
        rounds = [
            {each: measured(method, url, pairs, truth) for each, method in METHODS.items()}
            for _ in range(1 + options.rounds)
        ][1:]
        server.terminate()
    report(rounds)


if __name__ == "__main__":
    main()
