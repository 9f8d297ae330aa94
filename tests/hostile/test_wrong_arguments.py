"""Wrong arguments of every public function and method end in an error that says what is right.

Each argument of each call is replaced by dozens of values that do not belong there. What leaves the
library is an error of `h5traces.errors`, or one of the operating system's about a file.
"""

from __future__ import annotations

import inspect
import itertools
import os
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from legacy_batches import make_archive, make_batch

import h5traces
from h5traces import extract, features, fidelity, graph, torch_data
from h5traces.errors import H5TracesError
from h5traces.extract import estimate as sizes  # noqa: F401  # its own module
from h5traces.format.limits import ReadLimits
from h5traces.storage.remote.paths import RemoteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(h5traces.__file__).parent
TINY = Path(__file__).parents[2] / "examples" / "tiny-llama-pydocs"
BATCH = make_batch("full_pkl")


class BadPath:
    """A path that cannot be asked for its name."""

    def __fspath__(self):
        message = "no name"
        raise RuntimeError(message)


class NoPath:
    """A path whose name is not text."""

    def __fspath__(self):
        return 5


class BadRepr:
    def __repr__(self):
        message = "no repr"
        raise RuntimeError(message)


class BadLength:
    def __len__(self):
        return -1

    def __iter__(self):
        message = "no items"
        raise RuntimeError(message)


def wrong_values(folder: Path) -> dict[str, Callable[[], Any]]:
    """Values that hardly any argument may have, made anew for every call."""
    archive = folder / "a.h5"
    return {
        "None": lambda: None,
        "True": lambda: True,
        "0": lambda: 0,
        "-1": lambda: -1,
        "5": lambda: 5,
        "10**30": lambda: 10**30,
        "2**63": lambda: 2**63,
        "0.5": lambda: 0.5,
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "1j": lambda: 1j,
        "np.int64": lambda: np.int64(3),
        "np.float32": lambda: np.float32(3),
        "np.bool": lambda: np.bool_(True),
        "np.str": lambda: np.str_("hidden_states"),
        "empty text": lambda: "",
        "text": lambda: "hidden",
        "long text": lambda: "x" * 100_000,
        "number as text": lambda: "5",
        "surrogate": lambda: "\ud800",
        "NUL": lambda: "a\0.h5",
        "newline": lambda: "a\n.h5",
        "bytes": lambda: b"hidden_states",
        "bytearray": lambda: bytearray(b"a.h5"),
        "list": lambda: [],
        "tuple": lambda: (),
        "dict": lambda: {},
        "set": lambda: {1, "a"},
        "[None]": lambda: [None],
        "[[]]": lambda: [[]],
        "[0.5]": lambda: [0.5],
        "[b'x']": lambda: [b"x"],
        "['hidden']": lambda: ["hidden"],
        "[10**30]": lambda: [10**30],
        "[True]": lambda: [True],
        "generator": lambda: (each for each in ("a", 5)),
        "empty generator": lambda: iter(()),
        "endless": lambda: "endless",
        "array": lambda: np.arange(3),
        "0d array": lambda: np.array(1),
        "2d array": lambda: np.ones((2, 2)),
        "text array": lambda: np.array(["a", "b"]),
        "object array": lambda: np.array([None, "a"], dtype=object),
        "structured array": lambda: np.zeros(2, dtype=[("a", int)]),
        "tensor": lambda: torch.arange(3),
        "range": lambda: range(10**12),
        "slice": lambda: slice(None),
        "bad slice": lambda: slice("a", 0.5, 0),
        "object": object,
        "class": lambda: dict,
        "function": lambda: len,
        "module": lambda: os,
        "exception": lambda: ValueError("x"),
        "nowhere": lambda: folder / "nowhere" / "a.h5",
        "folder": lambda: folder / "empty",
        "folder as text": lambda: f"{folder}/empty/",
        "pickle": lambda: folder / "a.pkl",
        "archive": lambda: archive,
        "text file": lambda: folder / "a.txt",
        "loop": lambda: folder / "loop",
        "path too long": lambda: "a/" * 5000 + "a.h5",
        "name too long": lambda: f"{folder}/{'x' * 300}.h5",
        "URL": lambda: "nope://host/a.h5",
        "broken URL": lambda: "https://[::1/a.h5",
        "bad path": BadPath,
        "no path": NoPath,
        "bad repr": BadRepr,
        "bad length": BadLength,
        "closed archive": lambda: closed(archive),
        "trace": lambda: h5traces.open(archive)[0],
        "limits": ReadLimits,
        "remote": RemoteOptions,
        "target": h5traces.TargetOptions,
    }


def closed(path: Path) -> h5traces.Archive:
    archive = h5traces.open(path)
    archive.close()
    return archive


@dataclass
class Call:
    """A public function and arguments that are right."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    # What is done with what comes back, which may read only then.
    use: Callable[[Any], Any] = lambda _: None

    def parameters(self) -> list[str]:
        """Names of the parameters that are replaced one by one."""
        found = inspect.signature(self.function).parameters.values()
        return [
            each.name for each in found if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]


def positional(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """A method without names of parameters, such as ``__getitem__``, with names."""

    def call(**arguments: Any) -> Any:
        return function(*(arguments[name] for name in names))

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return call


def calls(folder: Path) -> Iterator[Call]:
    """Every public function and method, with arguments that are right."""
    path, batch = folder / "a.h5", folder / "a.pkl"
    out = folder / "out"
    archive = h5traces.open(path)
    trace = archive[0]
    states = trace["hidden_states"]
    yield Call("open", h5traces.open, {"path": path}, use=lambda found: found.ids)
    yield Call("load", h5traces.load, {"path": batch})
    yield Call("inspect", h5traces.inspect, {"sources": path})
    yield Call("validate", h5traces.validate, {"sources": path, "quick": True})
    yield Call("verify", h5traces.verify, {"sources": path})
    yield Call("seal", h5traces.seal, {"sources": path, "dry_run": True})
    yield Call("salvage", h5traces.salvage, {"source": path, "dest": out / "s.h5", "dry_run": True})
    dry = h5traces.TargetOptions(dry_run=True)
    yield Call("convert", h5traces.convert, {"sources": batch, "dest": out / "c.h5", "target": dry})
    yield Call("repack", h5traces.repack, {"sources": path, "dest": out / "r.h5", "target": dry})
    yield Call("merge", h5traces.merge, {"sources": path, "dest": out / "m.h5", "target": dry})
    split = {"sources": path, "dest": out / "s.h5", "num_samples": 2, "target": dry}
    yield Call("split", h5traces.split, split)
    yield Call("export", h5traces.export, {"source": path, "dest": out / "e.pkl", "dry_run": True})
    calibrate = {"sources": batch, "dest": out / "k.h5", "dry_run": True}
    yield Call("calibrate", h5traces.calibrate, calibrate)
    label = {"sources": path, "table": folder / "labels.csv", "target": dry}
    yield Call("label", h5traces.label, label)
    yield Call("create", h5traces.create, {"path": out / "n.h5"}, use=lambda found: found.suspend())
    shape = extract.ModelShape(num_layers=2, hidden_size=4, num_heads=2)
    yield Call("estimate", h5traces.estimate, {"shape": shape, "lengths": 5})

    yield Call("archive.select", archive.select, use=lambda found: found.ids)
    yield Call("archive.read", archive.read, {"indices": [0]})
    yield Call("archive.by_id", archive.by_id, {"sample_id": "tc_0"})
    fetched = {"indices": [0], "kinds": ["hidden_states"]}
    yield Call("archive.fetched", archive.fetched, fetched)
    yield Call("archive[…]", positional(archive.__getitem__, "index"), {"index": 0})
    yield Call("… in archive", positional(archive.__contains__, "value"), {"value": trace})
    yield Call("archive.index", positional(archive.index, "value"), {"value": trace})
    yield Call("archive.count", positional(archive.count, "value"), {"value": trace})
    yield Call("archive ==", positional(archive.__eq__, "other"), {"other": archive})

    yield Call("trace[…]", positional(trace.__getitem__, "key"), {"key": "tokens"})
    yield Call("trace.get", positional(trace.get, "key"), {"key": "tokens"})
    yield Call("… in trace", positional(trace.__contains__, "key"), {"key": "tokens"})
    yield Call("trace ==", positional(trace.__eq__, "other"), {"other": trace})
    yield Call("trace.layer", trace.layer, {"layer": 0})
    yield Call("trace.to_dict", trace.to_dict)
    yield Call("states[…]", positional(states.__getitem__, "position"), {"position": 0})
    yield Call("… in states", positional(states.__contains__, "value"), {"value": None})

    options = {
        "TargetOptions": (h5traces.TargetOptions, {}),
        "PrecisionOptions": (h5traces.PrecisionOptions, {}),
        "ReadingOptions": (h5traces.ReadingOptions, {}),
        "LabelOptions": (h5traces.LabelOptions, {}),
        "Precision": (h5traces.Precision, {}),
        "RemoteOptions": (RemoteOptions, {}),
        "ReadLimits": (ReadLimits, {}),
        "ExtractOptions": (extract.ExtractOptions, {}),
        "GenerationOptions": (extract.GenerationOptions, {}),
        "ModelChoice": (extract.ModelChoice, {"model_id": "a"}),
        "DatasetChoice": (extract.DatasetChoice, {"dataset": "a"}),
        "Columns": (extract.Columns, {}),
        "ModelShape": (
            extract.ModelShape,
            {"num_layers": 2, "hidden_size": 4, "num_heads": 2},
        ),
        "PcaOptions": (features.PcaOptions, {"num_components": 1}),
        "Labels": (torch_data.Labels, {"values": {}}),
        "Tokens": (torch_data.Tokens, {}),
    }
    for name, (made, arguments) in options.items():
        yield Call(name, made, arguments)

    computed = {"archive": archive, "names": ["last_token"]}
    yield Call("compute_features", features.compute_features, computed)
    yield Call("iterate_features", features.iterate_features, computed, use=list)
    extracted = {"sources": path, "output": out / "f.h5", "names": ["last_token"], "dry_run": True}
    yield Call("extract_features", features.extract_features, extracted)
    fitted = {"archive": archive, "layer": 0, "num_components": 1}
    yield Call("fit_pca", features.fit_pca, fitted)
    yield Call("compare", fidelity.compare, {"a": path, "b": path})

    data = {"source": archive}
    yield Call("TraceDataset", torch_data.TraceDataset, data, use=lambda found: found[0])
    dataset = torch_data.TraceDataset(archive, tokens="mean")
    yield Call("dataset[…]", positional(dataset.__getitem__, "index"), {"index": 0})
    iterable = {"dataset": dataset}
    yield Call("IterableTraceDataset", torch_data.IterableTraceDataset, iterable, use=take_one)
    yield Call("ShardSampler", torch_data.ShardSampler, iterable, use=list)
    yield Call("pad_collate", torch_data.pad_collate, iterable)
    yield Call("pack_collate", torch_data.pack_collate, iterable)
    graphs = {"pattern": str(path)}
    yield Call("TraceGraphDataset", graph.TraceGraphDataset, graphs, use=lambda found: found[0])
    plain = {"states": np.ones((3, 4))}
    for reduce in (features.last_token, features.mean_pooled, features.max_pooled):
        yield Call(reduce.__name__, reduce, plain)
    weights = {"attention": np.ones((2, 3, 3))}
    yield Call("row_entropy", features.row_entropy, weights)
    yield Call("sink_mass", features.sink_mass, weights)
    yield Call("lookback_ratio", features.lookback_ratio, {**weights, "prompt_len": 1})
    yield Call("to_device", torch_data.to_device, {"batch": [torch.ones(1)], "device": "cpu"})
    loader = {"loader": [torch.ones(1)], "device": "cpu"}
    yield Call("DeviceLoader", torch_data.DeviceLoader, loader)
    tiny = {"model_id": str(TINY)}
    yield Call("model_shape", extract.model_shape, tiny)
    yield Call("load_tokenizer", extract.load_tokenizer, tiny)
    writer = h5traces.create(folder / "out" / "w.h5", spool=False)
    yield Call("writer.append", writer.append, {"sample": {**BATCH[0]}})
    attention = {"attention": torch.ones(2, 3, 3), "num_nodes": 3}
    yield Call("attention_edges", graph.attention_edges, attention)


def take_one(found: Any) -> Any:
    return next(iter(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("arguments")
    made = make_archive(place, BATCH, name="a.pkl")
    assert made.name == "a.h5"
    (place / "empty").mkdir()
    (place / "out").mkdir()
    (place / "a.txt").write_text("some text")
    (place / "loop").symlink_to(place / "loop")
    rows = "\n".join(f"{each['question_id']},0" for each in BATCH)
    (place / "labels.csv").write_text(f"question_id,label\n{rows}\n")
    return place


def escaped(call: Call, arguments: dict[str, Any]) -> str | None:
    """How a call ended, where not as it should."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.use(call.function(**arguments))
    except H5TracesError as error:
        text = str(error)
        given = sum(len(each) for each in arguments.values() if isinstance(each, str))
        if not text or len(text) > 4000 + given:
            return f"{type(error).__name__} with {len(text)} characters"
        return None
    except ValueError as error:
        # As `list.index` says that there is none.
        return None if call.name == "archive.index" else f"{error!r:.300}"
    except OSError:
        # FileNotFoundError, PermissionError and so on: the operating system's word about a file.
        return None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = traceback.format_exception_only(error)[-1][:200]
        return f"{line} ({place.filename}:{place.lineno})"
    return None


NAMES = [
    "open", "load", "inspect", "validate", "verify", "seal", "salvage", "convert", "repack",
    "merge", "split", "export", "calibrate", "label", "create", "estimate", "archive.select",
    "archive.read", "archive.by_id", "archive.fetched", "archive[…]", "… in archive",
    "archive.index", "archive.count", "archive ==", "trace[…]", "trace.get", "… in trace",
    "trace ==", "trace.layer", "trace.to_dict", "states[…]", "… in states", "TargetOptions",
    "PrecisionOptions", "ReadingOptions", "LabelOptions", "Precision", "RemoteOptions",
    "ReadLimits", "ExtractOptions", "GenerationOptions", "ModelChoice", "DatasetChoice", "Columns",
    "ModelShape", "PcaOptions", "Labels", "Tokens", "compute_features", "iterate_features",
    "extract_features", "fit_pca", "compare", "TraceDataset", "dataset[…]", "IterableTraceDataset",
    "ShardSampler", "pad_collate", "pack_collate", "TraceGraphDataset", "last_token",
    "mean_pooled", "max_pooled", "row_entropy", "sink_mass", "lookback_ratio", "to_device",
    "DeviceLoader", "model_shape", "load_tokenizer", "writer.append", "attention_edges",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_leaves_the_library(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Some values are names, and right.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (call,) = (each for each in calls(folder) if each.name == name)
    values = wrong_values(folder)
    assert escaped(call, call.arguments) is None
    bad = []
    for parameter, (value, make) in itertools.product(call.parameters(), values.items()):
        # What a user's own function raises is the user's.
        if parameter in ("progress", "transform") and value in ("class", "function"):
            continue
        found = escaped(call, {**call.arguments, parameter: make()})
        if found is not None:
            bad.append(f"{name}({parameter}={value}): {found}")
    assert bad == []
    assert sorted(each.name for each in (folder / "empty").iterdir()) == []


def test_every_name_is_tried(folder: Path) -> None:
    assert [each.name for each in calls(folder)] == NAMES
