"""The mappings in examples/mappings, each on a file of the layout that it is named for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import h5py
import numpy as np
import pytest
import torch

import h5traces

if TYPE_CHECKING:
    from collections.abc import Callable

MAPPINGS = Path(__file__).parents[2] / "examples" / "mappings"
LAYERS, TOKENS, HIDDEN = 3, 7, 16


def states(seed: int = 0) -> Any:
    """``(layers, tokens, hidden)``."""
    return np.random.default_rng(seed).normal(size=(LAYERS, TOKENS, HIDDEN)).astype(np.float32)


def _hdf5(path: Path, arrays: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value


def _by_sentence(path: Path) -> None:
    _hdf5(path, {"0": states(0), "1": states(1), "sentence_to_index": np.array([b'{"a": "0"}'])})


def _transformer_lens(path: Path) -> None:
    batch = torch.tensor(np.stack([states(0), states(1)]))
    weights = torch.full((2, 2, TOKENS, TOKENS), 1 / TOKENS)
    names = {f"blocks.{n}.hook_resid_post": batch[:, n] for n in range(LAYERS)}
    torch.save({**names, **{f"blocks.{n}.attn.hook_pattern": weights for n in range(LAYERS)}}, path)


def _nnsight(path: Path) -> None:
    ids = torch.arange(TOKENS)[None]
    torch.save({"activations": torch.tensor(states())[:, None], "input_ids": ids}, path)


def _probes(path: Path) -> None:
    last = np.stack([states(0)[:, -1], states(1)[:, -1]])
    layers = {f"activations/layer_{n}": last[:, n] for n in range(LAYERS)}
    _hdf5(path, {**layers, "labels": np.array([0, 1])})


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            **{"a/states": states(0), "b/states": states(1)},
            **{"a/ids": np.arange(TOKENS), "b/ids": np.arange(TOKENS)},
        )


def _memmap(path: Path) -> None:
    values = torch.tensor(states()).bfloat16().transpose(0, 1).contiguous()
    path.write_bytes(values.view(torch.uint16).numpy().tobytes())


def _rows(path: Path) -> None:
    rows = [{"qid": f"q{n}", "prompt": "?", "response": "!", "hs": states(n)} for n in range(2)]
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def _saelens(path: Path) -> None:
    hook = "blocks.1.hook_mlp_out"
    features = datasets.Features(
        {
            hook: datasets.Array2D((TOKENS, HIDDEN), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=TOKENS),
        }
    )
    rows = [{hook: states(n)[1], "token_ids": list(range(TOKENS))} for n in range(2)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(path))


LAYOUTS: dict[str, tuple[Callable[[Path], object], int]] = {
    "transformer-lens-batch": (_transformer_lens, 2),
    "nnsight-stacked": (_nnsight, 1),
    "elmo-hdf5": (_by_sentence, 2),
    "neurox-hdf5": (_by_sentence, 2),
    "layers-hdf5": (
        lambda path: _hdf5(path, {f"layer_{n}/inputs": states()[n] for n in range(LAYERS)}),
        1,
    ),
    "probes-hdf5": (_probes, 2),
    "prompts-npz": (_npz, 2),
    "memmap-bfloat16": (_memmap, 1),
    "datasets-rows": (_rows, 2),
    "saelens-mlp": (_saelens, 2),
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in MAPPINGS.glob("*.toml")} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_example(tmp_path: Path, name: str) -> None:
    write, count = LAYOUTS[name]
    path = tmp_path / "q1.bin"
    write(path)
    reading = h5traces.ReadingOptions(mapping=MAPPINGS / f"{name}.toml")
    report = h5traces.convert(
        path,
        tmp_path / "out.h5",
        reading=reading,
        precision=h5traces.PrecisionOptions(dtype="auto"),
    )
    assert report.ok, report.problems
    traces = h5traces.open(tmp_path / "out.h5", container="numpy")
    assert len(traces) == count
    expected = states(count - 1)
    found = traces[count - 1]["hidden_states"]
    if name == "saelens-mlp":
        np.testing.assert_array_equal(found[0], expected[1])
    elif name == "memmap-bfloat16":
        rounded = torch.tensor(expected).bfloat16().float().numpy()
        np.testing.assert_array_equal(np.stack(list(found)).astype(np.float32), rounded)
    elif name == "probes-hdf5":
        np.testing.assert_array_equal(np.stack(list(found))[:, 0], expected[:, -1])
    else:
        np.testing.assert_array_equal(np.stack(list(found)), expected)


def test_a_cache_of_transformer_lens_needs_no_mapping(tmp_path: Path) -> None:
    arrays = {f"blocks.{n}.hook_resid_post": torch.tensor(states()[n])[None] for n in range(LAYERS)}
    start = torch.ones(1, TOKENS, HIDDEN)
    torch.save(
        {"hook_embed": start * 2, "blocks.0.hook_resid_pre": start, **arrays}, tmp_path / "a.pt"
    )
    report = h5traces.convert(tmp_path / "a.pt", tmp_path / "out.h5")
    assert report.ok, report.problems
    (trace,) = h5traces.open(tmp_path / "out.h5", container="numpy")
    assert trace["hidden_states"].layers == (None, 0, 1, 2)
    assert (trace.embedding == 1).all()
    assert trace["hook_embed"].shape == (1, TOKENS, HIDDEN)
