"""Every block of code in README.md and docs/ runs: here, or in the test that is named here."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import torch
from document_pages import ROOT, Block, blocks_of, run_code, run_command
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable

LEGACY = ROOT / "examples" / "legacy"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# Tests that run blocks and look at what comes out, by page and language.
ELSEWHERE = {
    ("README.md", "python"): "tests/docs/test_readme.py",
    ("docs/exporting.md", "console"): "tests/exports/test_exports.py",
    ("docs/exporting.md", "python"): "tests/exports/test_exports.py",
    ("docs/extraction.md", "bash"): "tests/docs/test_extraction_docs.py",
    ("docs/extraction.md", "python"): "tests/docs/test_extraction_docs.py",
    ("docs/features.md", "bash"): "tests/docs/test_labels_and_features.py",
    ("docs/features.md", "python"): "tests/docs/test_labels_and_features.py",
    ("docs/fidelity.md", "bash"): "tests/docs/test_fidelity_docs.py",
    ("docs/fidelity.md", "python"): "tests/docs/test_fidelity_docs.py",
    ("docs/labels.md", "bash"): "tests/docs/test_labels_and_features.py",
    ("docs/labels.md", "python"): "tests/docs/test_labels_and_features.py",
    ("docs/migration.md", "console"): "tests/docs/test_migration.py",
    ("docs/migration.md", "py"): "tests/docs/test_migration.py",
    ("docs/precision.md", "bash"): "tests/docs/test_precision_docs.py",
    ("docs/precision.md", "python"): "tests/docs/test_precision_docs.py",
    ("docs/reading.md", "python"): "tests/docs/test_readme.py",
    ("docs/remote.md", "python"): "tests/remote/test_documents.py",
    ("docs/sources.md", "python"): "tests/sources/test_added_readers.py",
    ("docs/spans.md", "bash"): "tests/docs/test_spans_docs.py",
    ("docs/spans.md", "python"): "tests/docs/test_spans_docs.py",
    ("docs/training.md", "python"): "tests/docs/test_training.py",
    ("docs/tutorial.md", "bash"): "tests/docs/test_tutorial.py",
    ("docs/tutorial.md", "python"): "tests/docs/test_tutorial.py",
    ("docs/viewing.md", "python"): "tests/view/test_shipped_example.py",
    ("docs/writing.md", "py"): "tests/writing/test_from_python.py",
    ("docs/writing.md", "python"): "tests/crash/test_long_runs.py",
    # Needs vLLM, which does not go into the environment of the tests.
    ("docs/vllm.md", "bash"): "tools/check_vllm.py",
    ("docs/vllm.md", "python"): "tools/check_vllm.py",
    # Needs a model, GPUs and a data set of Ray; the test runs the programs in examples/ray/.
    ("docs/cluster.md", "python"): "tests/engines/test_ray.py",
}
# Tests that run the same calls, and not the block of the page.
INDIRECT = ("docs/vllm.md", "docs/cluster.md")
# What lines of a shell begin with that are not run, and what runs or stands for it.
NOT_RUN = {
    "./tools/check": "it runs these tests",
    "./tools/demo": "tests/docs/test_readme.py looks for it; CI starts with it",
    "for run in run.h5": "a spool that was killed: tests/crash/test_finish.py",
    "h5traces index run.h5 run-rank1.h5": "the same",
    "mkdocs serve": "tests/docs/test_site.py builds the site",
    "pip install": "tools/check does",
    "python benchmarks/precision.py": "tests/docs/test_precision_study.py, in small",
    "python examples/train_probes.py": "tests/docs/test_training.py, in small",
    "python3 -m venv": "whoever runs the tests did",
    "source .venv/bin/activate": "whoever runs the tests did",
    "sbatch": "tests/scale/test_slurm.py",
    "ssh": "needs a second machine",
    # A server, which ends with Ctrl-C.
    "h5traces view archives/": "tests/view",
}
# Names in commands that stand for something of the reader's.
PLACEHOLDER = re.compile(r"^(MODEL|s3://.*)$")
# The pages that show results in blocks of these, which nothing runs.
SHOWN = {"text", "json"}
TOML = "toml"


def why_not(words: list[str]) -> str | None:
    """Why a line of a shell is not run; None if it is."""
    line = " ".join(words)
    if line.endswith("--rank auto"):
        return "tests/ranks: a launcher gives the ranks"
    found = (reason for start, reason in NOT_RUN.items() if line.startswith(start))
    return next(found, "placeholder" if any(map(PLACEHOLDER.match, words)) else None)


def is_run_here(block: Block) -> bool:
    shown = block.language in {*SHOWN, TOML}
    shown |= block.code.startswith("#!")
    return not shown and (block.page, block.language) not in ELSEWHERE


def in_shell(block: Block) -> bool:
    """Whether it is lines for a terminal, and no script for a scheduler."""
    return block.language in ("bash", "console") and not block.code.startswith("#!")


# What a page's code begins from, beside `run.h5`, `archives/`, `traces/` and `examples/`.


def by_position(number: int) -> None:
    """Hidden states alone, of which nothing says what the first is."""
    states = [np.ones((3, 4), np.float16)] * 3
    torch.save([{"hidden_states": states, "tokens": [1, 2, 3]}], "batch.pt")
    shutil.move("batch.pt", "batch.pkl")
    if number == 1:
        Path("batch.h5").unlink()
        h5traces.convert("batch.pkl", "batch.h5")


def of_all_ranks(number: int) -> None:
    """What the seven other ranks write."""
    if number == 0:
        shutil.rmtree("archives")
        for rank in (0, 1, 2, 4, 5, 6, 7):
            h5traces.convert("traces/", "archives/", rank=rank, world_size=8)


def without_archives(number: int) -> None:
    if number == 1:
        shutil.rmtree("archives", ignore_errors=True)


def activations(_: int) -> None:
    """The file that the first mapping of the page describes."""
    first = next(block for block in blocks_of("docs/mappings.md") if block.language == TOML)
    Path("activations.toml").write_text(first.code, encoding="utf-8")
    with h5py.File("activations.h5", "w") as file:
        for layer in range(3):
            file[f"layer_{layer}/inputs"] = np.full((5, 8), layer, np.float32)


def tensors(_: int) -> None:
    item = {"hidden_states": [torch.ones(3, 4)] * 3, "attentions": [torch.ones(2, 3, 3) / 3] * 3}
    shutil.rmtree("archives", ignore_errors=True)
    Path("run/samples").mkdir(parents=True, exist_ok=True)
    torch.save([item], "run/hidden_states.pt")
    for number in range(2):
        torch.save([item], f"run/samples/{number}.pt")


BEFORE: dict[str, Callable[[int], None]] = {
    "docs/axes.md": by_position,
    "docs/cluster.md": of_all_ranks,
    "docs/converting.md": without_archives,
    "docs/mappings.md": activations,
    "docs/sources.md": tensors,
}
# Commands that say that something is missing.
EXIT_CODES = {"h5traces inspect activations.h5": 1}
# What the text of a page speaks of, and its code takes.
GIVEN: dict[str, dict[str, Any]] = {
    "docs/viewing.md": {
        "np": np,
        "features": {"layers": np.arange(6), "archive": np.array(["a"] * 8), "index": np.arange(8)},
        "coef": np.zeros((6, 128)),
        "intercept": np.zeros(6),
        "probabilities": np.zeros((8, 6)),
    },
    "docs/large-models.md": {"questions": ["q0", "q1", "q2"], "replica": 0, "replicas": 2},
}
# Of a machine that the tests do not have.
REPLACED = {'device="cuda"': 'device="cpu"'}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pages begin from: a batch, its archives, and the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(LEGACY, tmp_path / "traces")
    h5traces.convert(LEGACY, tmp_path / "run.h5", merge=True)
    h5traces.convert(LEGACY, f"{tmp_path}/archives/")
    monkeypatch.chdir(tmp_path)
    return tmp_path


HERE = sorted({block.page for block in BLOCKS if is_run_here(block)})


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", HERE)
def test_the_code_of_a_page_runs(page: str) -> None:
    names: dict[str, Any] = {"h5traces": h5traces, **GIVEN.get(page, {})}
    run = [block for block in BLOCKS if block.page == page and is_run_here(block)]
    for number, block in enumerate(run):
        BEFORE.get(page, lambda _: None)(number)
        if not in_shell(block):
            code = block.code
            for given, here in REPLACED.items():
                code = code.replace(given, here)
            run_code(code, names)
            continue
        for words in block.commands:
            if why_not(words) is None:
                run_command(words, EXIT_CODES.get(" ".join(words), 0))


def test_every_block_is_of_a_language_that_a_test_knows() -> None:
    known = {"bash", "console", "python", "py", TOML, *SHOWN}
    assert {block.language for block in BLOCKS} <= known
    for block in BLOCKS:
        if block.language == TOML:
            assert tomllib.loads(block.code), block
        if block.code.startswith("#!"):
            subprocess.run(["bash", "-n", "-c", block.code], check=True)


def test_what_runs_elsewhere_is_there_and_nothing_is_named_in_vain() -> None:
    shown = {(block.page, block.language) for block in BLOCKS}
    assert set(ELSEWHERE) <= shown
    for (page, _), test in ELSEWHERE.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        assert Path(page).name in text or page in INDIRECT, test
    lines = [" ".join(words) for block in BLOCKS if in_shell(block) for words in block.commands]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), start
    assert set(BEFORE) <= set(HERE)


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            words[1]
            for block in BLOCKS
            if in_shell(block)
            for words in block.commands
            if words[0] == "h5traces"
        }
    ),
)
def test_options_in_documents_exist(name: str) -> None:
    """Also of the commands that are not run."""
    help_text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    known = set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", help_text))
    for block in BLOCKS:
        for words in block.commands if in_shell(block) else ():
            if words[:2] == ["h5traces", name]:
                named = {each for each in words[2:] if re.match(r"--?[a-z]", each)}
                assert named <= known, (block.page, words)
