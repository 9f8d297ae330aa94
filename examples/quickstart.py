"""Convert a legacy batch, look at the archive and read one layer of it."""

import subprocess
import sys
from pathlib import Path

import h5traces

here = Path(__file__).parent
out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
command = Path(sys.executable).with_name("h5traces")


def run(*arguments: str) -> None:
    """Run h5traces as one would in a shell, and show the command."""
    print(f"\n$ h5traces {' '.join(arguments)}", flush=True)
    subprocess.run([command, *arguments], check=True)


run("convert", str(here / "legacy"), "-o", f"{out}/", "--overwrite")
run("inspect", f"{out}/")

print(f"\n>>> archive = h5traces.open('{out}/')")
with h5traces.open(out) as archive:
    trace = archive.by_id("py_0003")
    states = trace["hidden_states"][3]  # reads this one array and nothing else
    attention = trace["attentions"][3]
    print(f"{archive}\n{trace}")
    print(f"hidden states of layer 3: {states.shape} {states.dtype}, last token {states[-1, :4]} …")
    print(f"attention of layer 3: {attention.shape}, row sums {attention.sum(-1).mean():.3f}")
    print(f"answer: {trace['generated_answer_clean']!r}")
