"""What README.md and docs/ show is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from document_pages import ROOT, blocks_of, run_page

import h5traces


def blocks(language: str, document: str = "README.md") -> list[str]:
    return [each.code for each in blocks_of(document) if each.language == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the archives that the README speaks of."""
    batch = next((ROOT / "examples" / "legacy").glob("*.pkl.gz"))
    h5traces.convert(batch, f"{tmp_path}/archives/")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_python_code_of_the_readme_runs():
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)  # the code is ours, and running it is the test
    assert names["hidden"].shape == (len(names["trace"]["tokens"]), 128)
    assert names["attention"].shape[0] == 8


@pytest.mark.usefixtures("folder")
def test_the_python_code_of_the_guide_to_reading_runs():
    names = run_page("docs/reading.md", "python")
    assert names["states"][3].shape == (len(names["trace"]["tokens"]), 128)


def test_the_first_steps_run_as_typed(tmp_path):
    """What a newcomer types after ./tools/demo, but for the virtual environment."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    steps = next(each for each in blocks("bash") if "source .venv/bin/activate\n" in each)
    convert = next(each for each in blocks("bash") if "--merge" in each)
    commands = steps.replace("source .venv/bin/activate\n", "") + convert
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Hidden states: shape=(29, 128), dtype=float16" in done.stdout
    assert len(h5traces.load(tmp_path / "run.pkl.gz")) == 8


def test_the_quickstart_shows_the_example(tmp_path):
    script = ROOT / "examples" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert "Hidden states: shape=(29, 128), dtype=float16 in every layer" in done.stdout
    assert "hidden states of layer 3: (32, 128) float16" in done.stdout


def test_the_first_two_commands_are_scripts_of_the_repository():
    first, second = blocks("bash")[:2]
    for command in (first, second):
        assert (ROOT / command.strip()).stat().st_mode & 0o111


def test_every_command_that_the_documents_name_exists():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    shown = "\n".join(re.findall(r"```bash\n.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    named = set(re.findall(r"\bh5traces (\w+)[ `]", shown))
    done = subprocess.run(
        [Path(sys.executable).with_name("h5traces"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = set(re.findall(r"^│ (\w+)  ", done.stdout, flags=re.MULTILINE))
    assert {"convert", "inspect", "seal"} <= named
    assert named <= listed


DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist_and_hold_no_placeholder(document):
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"^[A-Z][A-Z ]+$", text, flags=re.MULTILINE) == []
    for path in re.findall(r"(?:tools|tests|benchmarks|h5traces)/[\w/]+\.py", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
