"""Three nodes of Ray on this machine; prints what became of a conversion when one was killed.

python ray_cluster.py BATCHES OUT EXAMPLES MODEL QUESTIONS
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray.cluster_utils import Cluster

import h5traces.ray.tasks
from h5traces.errors import ArchiveExistsError, OptionError, TargetError
from h5traces.extract import DatasetChoice, ModelChoice


def example(folder: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its classes travel to workers, which cannot import it.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def error_of(*arguments: Any, call: Any, **options: Any) -> str:
    try:
        call(*arguments, **options)
    except (ArchiveExistsError, OptionError, TargetError) as error:
        return f"{type(error).__mro__[0].__name__}: {error}"
    return ""


def parent_of(process: int) -> int | None:
    """Process id of the parent; None if the process has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return None


def gpus_of_a_rank(**_: Any) -> int:
    return len(ray.get_gpu_ids())


def main(batches: str, out: Path, examples: Path, model: str, questions: str) -> None:
    found: dict[str, Any] = {}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)

        raylets = {each.all_processes["raylet"][0].process.pid: each for each in nodes}

        def kill() -> None:
            """The first node, but for the head, that has begun a rank."""
            lines = out / "archives" / "ranks"
            end = time.monotonic() + 200
            while time.monotonic() < end:
                for path in lines.glob("*.jsonl"):
                    line, whole, _ = path.read_text().partition("\n")
                    process = json.loads(line)["process"] if whole else None
                    node = raylets.get(parent_of(process)) if process else None
                    if node is not None:
                        # All of a node dies at once; Ray's own workers outlive it for a while.
                        os.kill(process, signal.SIGKILL)
                        cluster.remove_node(node, allow_graceful=False)
                        return
                time.sleep(0.005)

        killer = threading.Thread(target=kill)
        killer.start()
        reports = h5traces.ray.convert(batches, f"{out}/archives/")
        killer.join()
        found["ranks"] = [report.ok for report in reports]

        choice = ModelChoice(model_id=model), DatasetChoice(dataset=questions)
        found["too_much"] = error_of(*choice, f"{out}/x/", call=h5traces.ray.extract, num_gpus=8)
        found["gpus"] = [
            report.num_written
            for report in h5traces.ray.extract(*choice, f"{out}/traces/", world_size=2)
        ]
        needed = {"num_cpus": 1, "num_gpus": 1}
        found["own_gpus"] = h5traces.ray.tasks._run_ranks(gpus_of_a_rank, (), {}, 2, needed)
        found["other"] = error_of(
            batches, f"{out}/archives/", call=h5traces.ray.convert, layers=[0], world_size=3
        )
        example(examples, "convert").main(batches, f"{out}/example-convert/")
        example(examples, "extract").main(model, questions, f"{out}/example-extract/")
        sink = example(examples, "sink")
        sink.main(model, questions, f"{out}/sink/")
        found["exists"] = error_of(model, questions, f"{out}/sink/", call=sink.main)
        # The answer of a task was lost: it runs again, on the same rows.
        again = h5traces.ray.ArchiveSink(f"{out}/again")
        row = h5traces.open(f"{out}/sink/")[0].to_dict()
        table = ray.data.from_items(
            [{"question_id": row["question_id"], "hidden_states": row["hidden_states"]}]
        )
        blocks = [ray.get(each) for each in table.get_internal_block_refs()]
        again.on_write_start()
        paths = [again.write(blocks, SimpleNamespace(task_idx=3)) for _ in range(2)]
        found["again"] = [Path(each).name for each in paths]
        found["twice"] = error_of([*blocks, *blocks], SimpleNamespace(task_idx=3), call=again.write)
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        cluster.shutdown()
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
