"""Shares a conversion or an extraction among ranks that are killed, and compares the result.

For every world size, ranks start in random order and are killed or stopped (SIGTERM, SIGUSR1) at
random times, as often as asked for; then all of them run to their end. Archives must have the same
names, ids and digests as those of one process without ranks. Ranks are forks of a process that has
imported the libraries, so that time goes into work, and kills hit it.

    python tools/rank_campaign.py convert --items 200 --sizes 1 3 8 --kills 30
    python tools/rank_campaign.py extract --items 400 --sizes 1 3 8 --kills 30
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5traces

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
MODEL = ROOT / "examples" / "tiny-llama-pydocs"


def digests(folder: Path) -> dict[str, list[tuple[object, object]]]:
    """By archive, id and digest of every sample."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5traces.open(path) as archive:
            found[path.name] = [(e.metadata.sample_id, e.metadata.digest) for e in archive]
    return found


def conversion(folder: Path, items: int) -> list[str]:
    """Make batches; the command that converts them."""
    from legacy_batches import make_batch, write_batch

    (folder / "batches").mkdir()
    for number in range(items):
        batch = make_batch("final_full", num_samples=2, seed=number)
        write_batch(folder / "batches" / f"batch_{number:04d}.pkl", batch)
    return ["convert", str(folder / "batches")]


def extraction(folder: Path, items: int) -> list[str]:
    """Make questions; the command that asks them."""
    questions = folder / "questions.jsonl"
    rows = ({"question": f"What does function {n} return?", "id": f"q{n}"} for n in range(items))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["extract", "--model-id", str(MODEL), "--dataset", str(questions)]
    return [*command, "--max-new-tokens", "4", "--shard-samples", "50", "--threads", "1"]


FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = {"convert": ["h5traces.rewriting.convert"], "extract": ["h5traces.extract.extracting"]}


def run(folder: Path, command: list[str], *options: str) -> BaseProcess:
    """Start a command; what it says goes into a file of `folder`."""
    process = FORKS.Process(target=_run, args=(folder / "said", [*command, *options]))
    process.start()
    return process


def _run(said: Path, arguments: list[str]) -> None:
    from h5traces.cli.app import main as command_line

    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for each in (1, 2):
        os.dup2(descriptor, each)
    sys.argv = ["h5traces", *arguments]
    command_line()


def at_work(out: Path, rank: int, size: int) -> int:
    """How often a rank has begun to work on its share."""
    try:
        lines = (out / "ranks" / f"{rank:05d}-of-{size:05d}.jsonl").read_bytes()
    except OSError:
        return 0
    return lines.count(b'"event": "start"')


def check(process: BaseProcess, folder: Path, what: str) -> None:
    """End where a command failed."""
    if process.exitcode:
        message = f"{what} ended with {process.exitcode}: {(folder / 'said').read_text()[-2000:]}"
        raise SystemExit(message)


STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


class Disturbed:
    """Ranks that are stopped so often, then all of them to their end.

    Three of four stops hit a rank that works on its share, the others any moment, start included.
    """

    def __init__(self, command: list[str], out: Path, size: int, chance: random.Random) -> None:
        self.command, self.out, self.size, self.chance = command, out, size, chance
        self.kills = self.kills_at_work = 0

    def rank(self, number: int) -> BaseProcess:
        ranks = ("--rank", str(number), "--world-size", str(self.size))
        return run(self.out.parent, self.command, "-o", f"{self.out}/", *ranks)

    def kill(self, process: BaseProcess, number: int, begun: int, most: float) -> None:
        """Stop a rank at a random moment, if it has not ended by then."""
        is_early = self.chance.random() < 0.25
        while process.is_alive() and not is_early:
            if at_work(self.out, number, self.size) > begun:
                break
            time.sleep(0.005)
        time.sleep(self.chance.uniform(0, most))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, self.chance.choice(STOPS))
            self.kills += 1
            self.kills_at_work += at_work(self.out, number, self.size) > begun

    def run(self, kills: int, seconds: float) -> None:
        """Lives are short enough that so many fit into the work, which takes some seconds alone."""
        while self.kills < kills:
            order = self.chance.sample(range(self.size), self.size)
            begun = [at_work(self.out, number, self.size) for number in order]
            started = [self.rank(number) for number in order]
            for each, number, before in zip(started, order, begun, strict=True):
                if self.kills < kills:
                    self.kill(each, number, before, 2 * seconds / kills)
            for each in started:
                each.join()
            is_done = (self.out / "run.json").exists() and h5traces.status(self.out).ok
            if is_done and self.kills < kills:
                message = f"all was done after {self.kills} stops; ask for more items"
                raise SystemExit(message)
        for number in self.chance.sample(range(self.size), self.size):
            each = self.rank(number)
            each.join()
            check(each, self.out.parent, f"rank {number} of {self.size}")


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["convert", "extract"])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen: Any = parser.parse_args()
    chance = random.Random(chosen.seed)
    FORKS.set_forkserver_preload(["h5traces.cli.app", *LIBRARIES[chosen.what]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = conversion if chosen.what == "convert" else extraction
        command = make(folder, chosen.items)
        started = time.monotonic()
        alone = run(folder, command, "-o", f"{folder}/alone/")
        alone.join()
        seconds = time.monotonic() - started
        check(alone, folder, "one process")
        expected = digests(folder / "alone")
        for size in chosen.sizes:
            started = time.monotonic()
            out = folder / f"ranks-{size}"
            ranks = Disturbed(command, out, size, chance)
            ranks.run(chosen.kills, seconds)
            found, state = digests(out), h5traces.status(out)
            left = [each.name for each in folder.rglob("*.part")]
            left += [each.name for each in folder.glob("*.spool")]
            is_same = found == expected and state.ok and not left
            print(
                f"{chosen.what}: {chosen.items} items, {size} ranks, {ranks.kills} stops "
                f"({ranks.kills_at_work} at work): {'equal' if is_same else 'DIFFERENT'}, "
                f"{sum(map(len, found.values()))} samples, parts left: {left}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            if not is_same:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
