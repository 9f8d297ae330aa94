"""A conversion as a step of datatrove, which calls it with rank and world size.

    python examples/datatrove_convert.py traces/ archives/ [local | slurm PARTITION]

Ranks that are done are marked in `archives.logs/completions`; only the others start again.
"""

import sys
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

TASKS = 4


class Convert(PipelineStep):
    """Converts the share of a task."""

    name = "h5traces"
    type = "Convert"

    def __init__(self, traces: str, archives: str) -> None:
        super().__init__()
        self.traces, self.archives = traces, archives

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """One share; an exception keeps the task from being marked as done."""
        # Here, since a node gets this class, but not the imports of this file.
        import h5traces

        report = h5traces.convert(self.traces, self.archives, rank=rank, world_size=world_size)
        report.raise_for_errors()
        self.stat_update("files", value=len(report.files))
        return data


def main(traces: str, archives: str, cluster: str = "local", partition: str = "low") -> None:
    """Convert by tasks of datatrove."""
    options = {"tasks": TASKS, "logging_dir": f"{archives.rstrip('/')}.logs"}
    step = Convert(traces, archives)
    if cluster == "slurm":
        slurm = {"partition": partition, "time": "01:00:00", "mem_per_cpu_gb": 1, "qos": ""}
        SlurmPipelineExecutor([step], **slurm, **options).run()
    else:
        LocalPipelineExecutor([step], workers=2, **options).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
