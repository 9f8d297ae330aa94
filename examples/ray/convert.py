"""Batches to a catalogue on a cluster of Ray.

    python examples/ray/convert.py traces/ archives/

Folders are known to all nodes. A task whose node is lost starts again, and goes on where it was.
"""

import sys

import h5traces
import h5traces.ray


def main(traces: str, archives: str) -> None:
    """Convert, check, and catalogue; `h5traces estimate --pilot traces/` says what it will take."""
    for rank, report in enumerate(h5traces.ray.convert(traces, archives)):
        print(f"rank {rank}: {'done' if report.ok else 'failed'}, {len(report.files)} files")
    found = h5traces.collect(archives, f"{archives.rstrip('/')}/catalogue.parquet", verify="all")
    print("complete" if found.ok else found)


if __name__ == "__main__":
    main(*sys.argv[1:])
