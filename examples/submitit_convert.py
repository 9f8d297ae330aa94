"""Ranks as jobs of submitit: on this machine, or on SLURM.

    python examples/submitit_convert.py traces/ archives/ [local|slurm]

submitit numbers the tasks of one job, not the jobs of an array, so each is told its rank.
"""

import sys

import submitit

import h5traces

WORLD_SIZE = 4


def main(traces: str, archives: str, cluster: str = "local") -> None:
    """Convert by jobs of an array, and make a catalogue."""
    executor = submitit.AutoExecutor(folder=f"{archives.rstrip('/')}.jobs", cluster=cluster)
    executor.update_parameters(timeout_min=60, cpus_per_task=1)
    if cluster == "slurm":
        executor.update_parameters(slurm_additional_parameters={"requeue": True})
    with executor.batch():
        jobs = [
            executor.submit(h5traces.convert, traces, archives, rank=rank, world_size=WORLD_SIZE)
            for rank in range(WORLD_SIZE)
        ]
    for rank, job in enumerate(jobs):
        print(f"rank {rank}: {'done' if job.result().ok else 'failed'}")
    found = h5traces.collect(archives, f"{archives.rstrip('/')}/catalogue.parquet")
    print("complete" if found.ok else found)


if __name__ == "__main__":
    main(*sys.argv[1:])
