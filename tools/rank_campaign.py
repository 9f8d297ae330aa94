"""Shares a conversion or an extraction among ranks that are killed, and compares the result.

For every world size, ranks start in random order and are killed or stopped (SIGTERM, SIGUSR1) at
random times, as often as asked for; then all of them run to their end. Archives must have the same
names, ids and digests as those of one process without ranks.

    python tools/rank_campaign.py convert --items 200 --sizes 1 3 8 --kills 30
    python tools/rank_campaign.py extract --items 400 --sizes 1 3 8 --kills 30
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5traces

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


def run(command: list[str], *options: str) -> subprocess.Popen[bytes]:
    """Start a command."""
    arguments = [sys.executable, "-m", "h5traces", *command, *options]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def at_work(out: Path, rank: int, size: int) -> int:
    """How often a rank has begun to work on its share."""
    try:
        lines = (out / "ranks" / f"{rank:05d}-of-{size:05d}.jsonl").read_bytes()
    except OSError:
        return 0
    return lines.count(b'"event": "start"')


class Disturbed:
    """Ranks that are stopped so often, then all of them to their end.

    Three of four stops hit a rank that works on its share, the others any moment, start included.
    """

    def __init__(self, command: list[str], out: Path, size: int, chance: random.Random) -> None:
        self.command, self.out, self.size, self.chance = command, out, size, chance
        self.kills = self.kills_at_work = 0

    def rank(self, number: int) -> subprocess.Popen[bytes]:
        ranks = ("--rank", str(number), "--world-size", str(self.size))
        return run(self.command, "-o", f"{self.out}/", *ranks)

    def kill(self, process: subprocess.Popen[bytes], number: int, begun: int, most: float) -> None:
        """Stop a rank at a random moment, if it has not ended by then."""
        is_early = self.chance.random() < 0.25
        while process.poll() is None and not is_early:
            if at_work(self.out, number, self.size) > begun:
                break
            time.sleep(0.005)
        time.sleep(self.chance.uniform(0, most))
        if process.poll() is None:
            process.send_signal(
                self.chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
            )
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
                each.communicate()
        for number in self.chance.sample(range(self.size), self.size):
            each = self.rank(number)
            _, errors = each.communicate()
            if each.returncode:
                message = f"rank {number} of {self.size}: {errors.decode()}"
                raise SystemExit(message)


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = conversion if chosen.what == "convert" else extraction
        command = make(folder, chosen.items)
        started = time.monotonic()
        alone = run(command, "-o", f"{folder}/alone/")
        _, errors = alone.communicate()
        seconds = time.monotonic() - started
        if alone.returncode:
            raise SystemExit(errors.decode())
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
