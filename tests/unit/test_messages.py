"""What users are told of bad input: the file, the sample, the field, and what to do."""

from __future__ import annotations

import ast
import gzip
import pickle
import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import grouped, make_batch, write_batch

import h5traces
from h5traces.errors import ConversionError, TargetError, UnsafePickleError
from h5traces.rewriting.convert import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def sample(**fields: Any) -> dict[str, Any]:
    states = np.ones((3, 4), np.float16)
    return {
        "hidden_states": [states, states],
        "attentions": [np.ones((2, 3, 3), np.float16)] * 2,
        "tokens": np.arange(3),
        "tokens_decoded": ["a", "b", "c"],
        **fields,
    }


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in sample().items() if name != key}


class Foreign:
    """Something that no batch holds."""


STATES = np.ones((3, 4), np.float16)
BAD_SAMPLES = {
    "neither states nor attentions": (
        {"tokens": np.arange(3)},
        "fields 'hidden_states' and 'attentions' are missing; found tokens",
    ),
    "no list": (sample(hidden_states="x"), "'hidden_states' is a str, expected a list"),
    "an array of other lengths": (
        sample(hidden_states=STATES),
        "field 'hidden_states': shape (3, 4) fits neither the number of layers nor that of tokens",
    ),
    "no fields": ({}, "'hidden_states' and 'attentions' are missing; found no fields"),
    "layers of other lengths": (
        sample(hidden_states=[STATES, STATES[:2]]),
        "hidden_states/layer_001: shape (2, 4) has 2 on the token axis, but layer_000 has 3",
    ),
    "attentions of another length": (
        sample(attentions=[np.ones((2, 5, 5), np.float16)] * 2),
        "5 query positions, but hidden states have 3 tokens",
    ),
    "a step without a layer": (
        sample(hidden_states=[[STATES, None], [STATES, STATES]]),
        "field 'hidden_states', layer 0, step 1: found NoneType, expected a numpy array",
    ),
    "too few axes": (
        sample(attentions=[STATES, STATES]),
        "layer_000: shape (3, 4) has 2 axes, expected 3: (head, query, key)",
    ),
    "integers": (
        sample(hidden_states=[STATES.astype(int)] * 2),
        "field 'hidden_states', layer 0: dtype is int64, expected one of float16",
    ),
    "a number for a name": (sample() | {5: 1}, "field 5 is named by int, expected str"),
    "mixed layers": (
        sample(hidden_states=[STATES, [STATES]]),
        "field 'hidden_states' mixes arrays and lists of generation steps",
    ),
    "steps of several types": (
        sample(hidden_states=[[STATES[None], STATES[None].astype(np.float32)]] * 2),
        "hidden_states/layer_000: generation steps have several types: float16, float32",
    ),
    "other numbers of steps": (
        sample(hidden_states=[[STATES[None]], [STATES[None]] * 2]),
        "hidden_states: layers have different numbers of generation steps",
    ),
    "too deep": (
        sample(x=reduce(lambda value, _: [value], range(70), None)),
        "nested",
    ),
}


def error_of(source: Path, target: Path, **options: Any) -> str:
    report = convert(source, target, **grouped(**options))
    assert not report.ok
    (file,) = report.files
    assert file.status == "failed"
    assert file.error is not None
    assert not target.exists()
    return file.error


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_named(tmp_path: Path, name: str) -> None:
    bad, message = BAD_SAMPLES[name]
    source = write_batch(tmp_path / "batch.pkl", [sample(), sample(), bad, sample()])
    error = error_of(source, tmp_path / "a.h5")
    assert error.startswith(f"{source}: ")
    assert re.search(r"sample 2\b|item 2\b", error)
    assert message in error


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    other = sample(hidden_states=[STATES] * 3, attentions=[np.ones((2, 3, 3), np.float16)] * 3)
    source = write_batch(tmp_path / "batch.pkl", [sample(), other])
    error = error_of(source, tmp_path / "a.h5")
    assert "sample 1" in error
    assert "hidden_states has" in error
    assert "one model" in error


def test_an_overflow_may_be_an_error(tmp_path: Path) -> None:
    wide = STATES.astype(np.float32)
    wide[1, 1] = 1e6
    source = write_batch(tmp_path / "batch.pkl", [sample(hidden_states=[wide, wide])])
    error = error_of(source, tmp_path / "a.h5", on_overflow="error")
    assert "sample 0: hidden_states/layer_000: 1 finite values lie beyond float16" in error


def foreign_global() -> bytes:
    return pickle.dumps([sample(x=Foreign())])


def bomb() -> bytes:
    return b"\x80\x04cos\nsystem\n\x8c\x0etouch /tmp/evil\x85R."


BAD_FILES: dict[str, tuple[str, Callable[[], bytes], type[Exception], str]] = {
    "not a pickle": ("a.pkl", lambda: b"PK\x03\x04 zip", ConversionError, "a zip file"),
    "an archive": (
        "a.pkl",
        lambda: b"\x89HDF\r\n\x1a\n" + bytes(99),
        ConversionError,
        "is HDF5, but no",
    ),
    "empty": ("a.pkl", lambda: b"", ConversionError, r"is empty \(0 bytes\)"),
    "text": ("a.pkl", lambda: b"hello there", ConversionError, "a.pkl"),
    "truncated": (
        "a.pkl",
        lambda: pickle.dumps(make_batch("full_pkl"))[:-500],
        ConversionError,
        "truncated pickle: .*unfinished write",
    ),
    "truncated gzip": (
        "a.pkl.gz",
        lambda: gzip.compress(pickle.dumps(make_batch("full_pkl")))[:-500],
        ConversionError,
        "truncated gzip file: .*unfinished write",
    ),
    "damaged gzip": (
        "a.pkl.gz",
        lambda: gzip.compress(pickle.dumps([sample()]))[:-8] + bytes(8),
        ConversionError,
        "corrupted gzip file",
    ),
    "a foreign class": ("a.pkl", foreign_global, UnsafePickleError, "Foreign"),
    "an attack": ("a.pkl", bomb, UnsafePickleError, "os.*system"),
    "a dict": (
        "a.pkl",
        lambda: pickle.dumps({"a": 1}),
        ConversionError,
        "expected a list of dicts",
    ),
    "a list of numbers": ("a.pkl", lambda: pickle.dumps([1, 2]), ConversionError, "a.pkl"),
    "a pickle and more": (
        "a.pkl",
        lambda: pickle.dumps([sample()]) + bytes(9),
        ConversionError,
        "other bytes than those of a pickle follow the end of the pickle",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    file_name, content, kind, message = BAD_FILES[name]
    source = tmp_path / file_name
    source.write_bytes(content())
    error = error_of(source, tmp_path / "a.h5")
    assert str(source) in error
    assert re.search(message, error, flags=re.DOTALL), error
    if name.startswith(("a ", "an attack", "truncated", "two")) and not file_name.endswith(".gz"):
        with pytest.raises(kind, match=re.escape(str(source))):
            h5traces.load(source)


def test_layers_that_the_model_does_not_have(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "batch.pkl", [sample()])
    error = error_of(source, tmp_path / "a.h5", layers=[0, 7])
    assert "layer 7 was asked for, but there are 2 layers (0 to 1)" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [-1]}, "0-based layer numbers"),
        ({"shard_samples": 0}, "shard_samples is 0, expected at least 1"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write_batch(tmp_path / "batch.pkl", [sample()])
    with pytest.raises((ConversionError, TargetError), match=message):
        convert(source, tmp_path / "a.h5", **grouped(**options))
    assert not (tmp_path / "a.h5").exists()


def test_impossible_plans(tmp_path: Path) -> None:
    one = write_batch(tmp_path / "one" / "a.pkl", [sample()])
    two = write_batch(tmp_path / "two" / "a.pkl.gz", [sample()])
    with pytest.raises(ConversionError, match=r"2 batches cannot all become .*merge=True"):
        convert([one, two], tmp_path / "x.h5")
    with pytest.raises(ConversionError, match=r"would both become .*a\.h5"):
        convert([one, two], f"{tmp_path}/out/")
    with pytest.raises(FileNotFoundError, match="missing"):
        convert(tmp_path / "missing.pkl", f"{tmp_path}/out/")
    with pytest.raises(ConversionError, match="nothing to convert"):
        convert([], f"{tmp_path}/out/")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds no batch"):
        convert(tmp_path / "empty", f"{tmp_path}/out/")
    assert not (tmp_path / "out").exists()


def test_nothing_of_a_pickle_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    source = tmp_path / "a.pkl"

    class Attack:
        def __reduce__(self) -> Any:
            return open, (str(marker), "w")

    source.write_bytes(pickle.dumps([sample(x=Attack())]))
    assert "open" in error_of(source, tmp_path / "a.h5")
    with pytest.raises(UnsafePickleError):
        h5traces.load(source)
    assert not marker.exists()


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string of a module but docstrings."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        yield from literals(node)


# An option of another program.
RSYNC = "rsync --append"


def test_the_library_names_no_options_of_commands() -> None:
    """Errors name parameters of Python; the command line adds its own options."""
    package = Path(h5traces.__file__).parent
    found = [
        f"{path.relative_to(package)}:{node.lineno}: {node.value}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] != "cli"
        for node in literals(ast.parse(path.read_text(encoding="utf-8")))
        if re.search(r"--[a-z]", node.value.replace(RSYNC, ""))
    ]
    assert not found, "\n".join(found)
