"""Every command of the migration guide runs, on files that the libraries themselves made."""

from __future__ import annotations

import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save_file

import h5traces

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
LAYERS, TOKENS, WIDTH, HEADS = 4, 7, 8, 2
ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "sources" / "recorded"
# Targets made of files that libraries recorded: samples, and layers of the first one.
OF_LIBRARIES = {
    "lens.h5": (1, (None, 0, 1)),
    "lens-batch.h5": (2, (0, 1)),
    "nnsight.h5": (1, (0, 1)),
    "stacked.h5": (1, (0, 1)),
    "sae.h5": (4, (1,)),
    "sae-mlp.h5": (4, (1,)),
    "drafts.h5": (2, (0, 1, 2, 3)),
}


def target_of(command: str) -> str:
    words = shlex.split(command)
    return words[words.index("-o") + 1]


def states(number: int) -> np.ndarray:
    """Hidden states of a sample ``(layers, tokens, hidden)``, exact in float16."""
    size = LAYERS * TOKENS * WIDTH
    return (np.arange(size).reshape(LAYERS, TOKENS, WIDTH) + number * size).astype(np.float32)


def attentions() -> np.ndarray:
    """Weights ``(layers, heads, tokens, tokens)``; one layer less: the first state is embedded."""
    causal = np.tril(np.ones((TOKENS, TOKENS), np.float32))
    return np.broadcast_to(
        causal / causal.sum(-1, keepdims=True), (LAYERS - 1, HEADS, *causal.shape)
    )


def item(number: int) -> dict[str, Any]:
    return {
        "hidden_states": list(states(number)),
        "attentions": list(attentions()),
        "tokens": np.arange(TOKENS) + number,
    }


def write_pickles(folder: Path) -> None:
    by_id = {f"q{number}": item(number) for number in range(3)}
    (folder / "by_question.pkl").write_bytes(pickle.dumps(by_id))
    (folder / "batches").mkdir()
    for number in range(2):
        batch = [{"question_id": f"q{number}", **item(number)}]
        (folder / "batches" / f"batch_{number}.pkl").write_bytes(pickle.dumps(batch))


def write_torch(folder: Path) -> None:
    def tensors(number: int) -> dict[str, Any]:
        found = item(number)
        return {
            "hidden_states": tuple(map(torch.from_numpy, found["hidden_states"])),
            "attentions": tuple(map(torch.tensor, found["attentions"])),
            "tokens": torch.from_numpy(found["tokens"]),
        }

    torch.save(
        [{"question_id": f"q{number}", **tensors(number)} for number in range(3)], folder / "run.pt"
    )
    (folder / "samples").mkdir()
    for number in range(3):
        sample = {"question_id": f"q{number}", **tensors(number)}
        torch.save(sample, folder / "samples" / f"q{number}.pt")


def write_requests(folder: Path) -> None:
    (folder / "requests").mkdir()
    for number in range(3):
        arrays = {
            "hidden_states": torch.from_numpy(states(number)).transpose(0, 1).contiguous(),
            "token_ids": torch.arange(TOKENS) + number,
        }
        save_file(arrays, folder / "requests" / f"q{number}.safetensors")


def write_numpy(folder: Path) -> None:
    (folder / "arrays").mkdir()
    for number in range(3):
        np.savez(
            folder / "arrays" / f"q{number}.npz",
            hidden_states=states(number),
            attentions=attentions(),
            input_ids=np.arange(TOKENS) + number,
        )
    np.save(folder / "states.npy", states(0))


def write_hdf5(folder: Path) -> None:
    with h5py.File(folder / "acts.h5", "w") as file:
        for number in range(3):
            for layer, values in enumerate(states(number)):
                file[f"q{number}/layer_{layer}"] = values
            file[f"q{number}/input_ids"] = np.arange(TOKENS) + number
    of_arrays, of_groups = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
    (folder / "npy.toml").write_text(of_arrays)
    (folder / "mapping.toml").write_text(of_groups)


def write_tables(folder: Path) -> None:
    rows = {
        "question_id": [f"q{number}" for number in range(3)],
        "hidden_states": [states(number).tolist() for number in range(3)],
        "attentions": [attentions().tolist()] * 3,
        "tokens": [(np.arange(TOKENS) + number).tolist() for number in range(3)],
    }
    pandas.DataFrame(rows).to_parquet(folder / "traces.parquet")
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "dataset"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("migration")
    for write in (
        write_pickles,
        write_torch,
        write_requests,
        write_numpy,
        write_hdf5,
        write_tables,
    ):
        write(found)
    return found


def write_recorded(folder: Path) -> None:
    for library in ("transformer-lens", "nnsight", "saelens"):
        shutil.copytree(RECORDED / library, folder, dirs_exist_ok=True)
    shutil.copytree(RECORDED / "specforge", folder / "specforge")
    for path in (ROOT / "examples" / "mappings").glob("*.toml"):
        shutil.copy(path, folder)


@pytest.mark.parametrize("command", [each for each in COMMANDS if target_of(each) in OF_LIBRARIES])
def test_the_command_reads_what_the_library_wrote(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are compared in `test_layouts_of_libraries`."""
    write_recorded(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-W", "ignore", "-m", "h5traces", *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count, layers = OF_LIBRARIES[target_of(command)]
    archive = h5traces.open(target_of(command), container="numpy")
    assert len(archive) == count
    assert archive[0]["hidden_states"].layers == layers


def test_every_library_has_its_commands() -> None:
    assert OF_LIBRARIES.keys() == {target_of(each) for each in COMMANDS} & OF_LIBRARIES.keys()


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if target_of(each) not in OF_LIBRARIES]
)
def test_the_command_runs_and_the_values_are_those_of_the_source(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    assert words.pop(0) == "h5traces"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "h5traces", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    target = words[words.index("-o") + 1]
    archive = h5traces.open(target, container="numpy")
    expected = {"archives/": 2, "states.h5": 1}.get(target, 3)
    assert len(archive) == expected
    assert archive.ids == (
        tuple(f"q{number}" for number in range(expected)) if target != "states.h5" else ("states",)
    )
    is_block = target in ("states.h5", "activations.h5")
    for number, trace in enumerate(archive):
        found = trace["hidden_states"]
        assert found.layers == (tuple(range(LAYERS)) if is_block else (None, *range(LAYERS - 1)))
        assert np.array_equal(np.stack(list(found)), states(number))
        if target != "states.h5":
            assert trace["tokens"].tolist() == list(range(number, number + TOKENS))


def test_the_code_for_caches_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = {}
    for layer in range(3):
        for hook in ("hook_resid_pre", "hook_resid_post"):
            place = layer + (hook == "hook_resid_post")
            cache[f"blocks.{layer}.{hook}"] = torch.full((1, 6, 8), float(place))
    torch.save(cache, "cache.pt")
    (code,) = re.findall(r"```py\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(code, {})
    (trace,) = h5traces.open("cache.h5")
    assert trace["hidden_states"].layers == (None, 0, 1, 2)
    assert [each[0, 0].item() for each in trace["hidden_states"]] == [0, 1, 2, 3]
