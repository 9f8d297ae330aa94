"""Output to whatever a shell gives: every encoding, closed and full files, pipes that end early.

Nothing of it ends in a traceback, and what could not be written is never exit code 0, but for a
pipe whose reader has seen enough.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces.cli.app import COMMANDS, main
from h5traces.cli.streams import _spelled

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama-pydocs"
BATCH = make_batch("full_pkl")
# Letters, symbols beyond 16 bits, and half a character, in names and ids.
ODD = "Zoë\u2013日本\U0001f600"
for _trace in BATCH:
    _trace["question_id"] = f"{_trace['question_id']}{ODD}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that commands read, under names that are not ASCII."""
    folder = tmp_path_factory.mktemp("ünïcode")
    archive = make_archive(folder, BATCH, name=f"{ODD}.pkl")
    shutil.copy(archive, folder / "other.h5")
    h5traces.convert(folder / f"{ODD}.pkl", f"{folder}/ranked/", rank=0, world_size=1)
    rows = "".join(f'"{each["question_id"]}",0.{number}\n' for number, each in enumerate(BATCH))
    (folder / "scores.csv").write_text(f"question_id,bleurt_score\n{rows}", encoding="utf-8")
    (folder / "questions.jsonl").write_text(f'{{"question": "{ODD}?"}}\n', encoding="utf-8")
    return folder


# What prints on stdout, for every command; {folder} has the inputs, {out} is new.
ARCHIVE = f"{{folder}}/{ODD}.h5"
RUNS = {
    "convert": [f"{{folder}}/{ODD}.pkl", "-o", "{out}/"],
    "calibrate": [ARCHIVE, "-o", "{out}/scales.h5"],
    "extract": ["--model-id", str(MODEL), "--dataset", "{folder}/questions.jsonl", "-o", "{out}/",
                "--max-new-tokens", "2"],
    "estimate": ["--model-id", str(MODEL)],
    "inspect": [ARCHIVE],
    "ls": [ARCHIVE],
    "head": [ARCHIVE],
    "view": [ARCHIVE, "--export", "{out}/page"],
    "plot": [ARCHIVE, "-o", "{out}/p.png"],
    "validate": [ARCHIVE],
    "verify": [ARCHIVE],
    "repack": [ARCHIVE, "-o", "{out}/a.h5"],
    "merge": [ARCHIVE, "-o", "{out}/a.h5"],
    "split": [ARCHIVE, "-n", "2", "-o", "{out}/"],
    "export": [ARCHIVE, "-o", "{out}/a.pkl"],
    "seal": [ARCHIVE],
    "salvage": [ARCHIVE, "-o", "{out}/a.h5"],
    "label": [ARCHIVE, "{folder}/scores.csv", "--overwrite"],
    "features": [ARCHIVE, "--last-token", "--allow-nan", "-o", "{out}/f.h5"],
    "fidelity": [ARCHIVE, "{folder}/other.h5"],
    "index": [ARCHIVE, "-o", "{out}/c.parquet"],
    "status": ["{folder}/ranked"],
    "collect": ["{folder}/ranked"],
}  # fmt: skip


def words(made: Path, out: Path, name: str, form: str) -> list[str]:
    if form == "help":
        return [name, "--help"]
    given = [each.format(folder=made, out=out) for each in RUNS[name]]
    return [name, *given, *(["--json"] if form == "json" else [])]


FORMS = ("text", "json", "help")
CASES = [
    (name, form)
    for name in RUNS
    for form in FORMS
    if form != "json" or name not in ("export", "view", "plot")
]  # fmt: skip


def test_every_command_is_here() -> None:
    # `finish` needs the spool of a killed run: tests/crash/test_finish.py.
    assert set(RUNS) | {"finish"} == set(COMMANDS)


@contextlib.contextmanager
def streams(stdout: Any, stderr: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stdout)
        patched.setattr("sys.stderr", stderr)
        patched.setattr("h5traces.cli.streams._lost", [])
        patched.setattr("h5traces.cli.console.errors.quiet", False)
        yield


def run_in(stdout: Any, stderr: Any, arguments: list[str], monkeypatch: Any) -> Any:
    """The exit code of the command line, run in this process."""
    with streams(stdout, stderr, monkeypatch):
        monkeypatch.setattr("sys.argv", ["h5traces", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code


def printing_to(place: Path | int, encoding: str = "utf-8") -> Any:
    return open(place, "w", encoding=encoding, errors="strict")  # noqa: PTH123


ENCODED = [(*case, encoding) for case in CASES for encoding in ("ascii", "cp1252")]
ENCODED += [("ls", form, encoding) for form in FORMS for encoding in ("latin-1", "utf-8", "utf-16")]


@pytest.mark.parametrize(("name", "form", "encoding"), ENCODED)
def test_every_encoding(
    made: Path, tmp_path: Path, monkeypatch: Any, name: str, form: str, encoding: str
) -> None:
    arguments = words(made, tmp_path / "new", name, form)
    with printing_to(tmp_path / "out", encoding) as out, printing_to(tmp_path / "err") as err:
        code = run_in(out, err, arguments, monkeypatch)
    printed = (tmp_path / "out").read_text(encoding=encoding)
    said = (tmp_path / "err").read_text(encoding="utf-8")
    assert code == 0, said
    assert "Traceback" not in said
    if form == "json":
        document = json.loads(printed)
        if name == "ls":
            assert [each["sample_id"] for each in document] == [
                each["question_id"] for each in BATCH
            ]
    elif form == "help":
        assert f"h5traces {name}" in printed
        if encoding == "ascii":
            assert printed.isascii()
            assert "+--" in printed
            assert "\\u" not in printed


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_full_disk(made: Path, tmp_path: Path, monkeypatch: Any, name: str, form: str) -> None:
    arguments = words(made, tmp_path / "new", name, form)
    with printing_to(Path("/dev/full")) as full, printing_to(tmp_path / "err") as err:
        code = run_in(full, err, arguments, monkeypatch)
    said = (tmp_path / "err").read_text(encoding="utf-8")
    assert code == 1
    assert "standard output cannot be written: No space left on device" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_pipe_that_nobody_reads(
    made: Path, tmp_path: Path, monkeypatch: Any, name: str, form: str
) -> None:
    inlet, outlet = os.pipe()
    os.close(inlet)
    arguments = words(made, tmp_path / "new", name, form)
    with printing_to(outlet) as pipe, printing_to(tmp_path / "err") as err:
        code = run_in(pipe, err, arguments, monkeypatch)
    said = (tmp_path / "err").read_text(encoding="utf-8")
    assert code == 0, said
    assert "error" not in said


# --- as a shell starts it -------------------------------------------------------------------------


def shell(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path, **environ},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )


LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "ascii, strict": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "no UTF-8 mode": {"PYTHONUTF8": "0"},
    "dumb": {"TERM": "dumb"},
    "no terminal": {"TERM": ""},
    "no colour": {"NO_COLOR": "1"},
    "narrow": {"COLUMNS": "1"},
    "no width": {"COLUMNS": "x", "LINES": "0"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_locales(made: Path, locale: str) -> None:
    for form in ("", "--json", "--help"):
        done = shell(f"h5traces ls {made}/*.h5 {form}", **LOCALES[locale])
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        if form == "--json":
            assert json.loads(done.stdout)[0]["sample_id"] == BATCH[0]["question_id"]
    missing = shell(f"h5traces validate {made}/{ODD}x.h5", **LOCALES[locale])
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
    assert "x.h5" in missing.stderr
    usage = shell(f"h5traces validate --{ODD}", **LOCALES[locale])
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        (">&-", 1),
        (">/dev/full", 1),
        ("| true", 0),
        ("| head -c 1 >/dev/null", 0),
        (">/dev/null", 0),
        ("2>&-", 0),
        ("<&-", 0),
        ("<&- 2>&-", 0),
        (">&- 2>&-", 1),
        ("<&- >&- 2>&-", 1),
        (">/dev/full 2>/dev/full", 1),
        ("2>/dev/full", 0),
    ],
)
@pytest.mark.parametrize("form", ["ls {}", "ls {} --json", "ls --help", "--help", "--version"])
def test_redirections(made: Path, redirection: str, code: int, form: str) -> None:
    script = f"set -o pipefail; h5traces {form.format(made / 'other.h5')} {redirection}"
    done = shell(script)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if code and "2>" not in redirection:
        assert "standard output cannot be written" in done.stderr


def test_an_error_stays_an_error(made: Path) -> None:
    """What a reader of the output does not see is no reason to call it well."""
    for redirection in (">&-", ">/dev/full", "| true", "2>&-", "2>/dev/full", ">&- 2>&-"):
        done = shell(f"set -o pipefail; h5traces ls {made}/nothing.h5 {redirection}")
        assert done.returncode == 2, redirection
        assert "Traceback" not in done.stderr
        usage = shell(f"set -o pipefail; h5traces ls --nothing {redirection}")
        assert usage.returncode in (1, 2), redirection
        assert "Traceback" not in usage.stderr


def test_a_warning_that_cannot_be_written(made: Path, tmp_path: Path) -> None:
    command = f"h5traces convert {made}/*.pkl -o {tmp_path}"
    assert "warning" in shell(f"{command}/a/").stderr
    assert shell(f"{command}/b/ 2>/dev/full").returncode == 1
    assert shell(f"{command}/c/ 2>&-").returncode == 0
    for each in "abc":
        assert len(list((tmp_path / each).iterdir())) == 1


def test_a_closed_stdout_is_no_archive(made: Path, tmp_path: Path) -> None:
    """The first file opened would get the number of stdout, and then what is printed."""
    done = shell(f"h5traces repack {made}/other.h5 -o {tmp_path}/new.h5 >&- 2>&- <&-")
    assert done.returncode == 1
    assert h5traces.open(tmp_path / "new.h5").ids == h5traces.open(made / "other.h5").ids


@pytest.mark.parametrize("environ", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_terminals(made: Path, environ: dict[str, str]) -> None:
    pty = pytest.importorskip("pty")
    for arguments in (["--help"], ["ls", str(made / "other.h5")], ["ls", "nothing.h5"]):
        leader, follower = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "h5traces", *arguments],
            stdout=follower,
            stderr=follower,
            stdin=follower,
            env={**os.environ, "TERM": "xterm", **environ},
        )
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while more := os.read(leader, 1 << 16):
                shown += more
        os.close(leader)
        assert child.wait() == (2 if "nothing.h5" in arguments else 0)
        assert b"Traceback" not in shown
        if environ.get("TERM") == "dumb":
            assert b"\x1b" not in shown
        if "NO_COLOR" in environ:
            assert not any(b"\x1b[3%dm" % colour in shown for colour in range(8))


def test_symbols_have_a_plain_form() -> None:
    assert [_spelled(each) for each in "✓→…≥µ─│╭"] == "ok -> ... >= u - | +".split()
    assert _spelled("é") == "\\xe9"
    assert _spelled("\udcff") == "\\udcff"
    assert _spelled("\U0001f600") == "\\U0001f600"


def test_a_stream_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """In notebooks and tests, standard output is an object."""
    monkeypatch.setattr("sys.argv", ["h5traces", "--version"])
    with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.raises(SystemExit):
        main()
    assert "h5traces" in stdout.getvalue()
