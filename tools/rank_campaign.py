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


def disturbed(command: list[str], out: Path, size: int, kills: int, chance: random.Random) -> None:
    """Ranks that are stopped so often, then those that are missing."""
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]
    while kills > 0:
        order = chance.sample(range(size), size)
        started = [
            run(command, "-o", f"{out}/", "--rank", str(rank), "--world-size", str(size))
            for rank in order
        ]
        for each in started:
            time.sleep(chance.uniform(0, 3) / size)
            if each.poll() is None:
                each.send_signal(chance.choice(signals))
                kills -= 1
        for each in started:
            each.communicate()
        if h5traces.status(out).ok if (out / "run.json").exists() else False:
            break
    for rank in chance.sample(range(size), size):
        each = run(command, "-o", f"{out}/", "--rank", str(rank), "--world-size", str(size))
        _, errors = each.communicate()
        if each.returncode:
            message = f"rank {rank} of {size}: {errors.decode()}"
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
        alone = run(command, "-o", f"{folder}/alone/")
        _, errors = alone.communicate()
        if alone.returncode:
            raise SystemExit(errors.decode())
        expected = digests(folder / "alone")
        for size in chosen.sizes:
            started = time.monotonic()
            out = folder / f"ranks-{size}"
            disturbed(command, out, size, chosen.kills, chance)
            found, state = digests(out), h5traces.status(out)
            is_same = found == expected and state.ok
            left = [each.name for each in out.rglob("*.part")]
            print(
                f"{chosen.what}: {chosen.items} items, {size} ranks, {chosen.kills} kills: "
                f"{'equal' if is_same else 'DIFFERENT'}, {sum(map(len, found.values()))} samples, "
                f"{len(left)} parts left, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if not is_same:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
