"""Samples as trainers of draft models save them: EAGLE, SpecForge, speculators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import h5traces
from h5traces.errors import ConversionError

if TYPE_CHECKING:
    from pathlib import Path

AUTO = h5traces.PrecisionOptions(dtype="auto")
TOKENS, HIDDEN = 6, 8


def specforge(seed: int = 0, **more: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "input_ids": torch.arange(TOKENS) + seed,
        "loss_mask": torch.ones(TOKENS, dtype=torch.long),
        "hidden_state": torch.randn(TOKENS, HIDDEN).bfloat16(),
        "aux_hidden_state": torch.randn(TOKENS, 3 * HIDDEN).bfloat16(),
        **more,
    }


def is_same(found: dict[str, Any], source: dict[str, Any]) -> bool:
    """Whether a sample has every number of its source."""
    *aside, last = found["hidden_states"]
    return bool(
        torch.equal(torch.cat(aside, dim=-1), source["aux_hidden_state"])
        and torch.equal(last, source["hidden_state"])
        and torch.equal(found["tokens"], source["input_ids"].reshape(-1))
        and torch.equal(found["loss_mask"], source["loss_mask"])
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_specforge(tmp_path: Path, zipped: bool, batched: bool) -> None:
    folder = tmp_path / "rows_0-2000"
    folder.mkdir()
    expected = [specforge(seed) for seed in range(3)]
    for index, each in enumerate(expected):
        if batched:
            for name in ("input_ids", "hidden_state", "aux_hidden_state"):
                each[name] = each[name][None]
        path = folder / f"data_{index}.ckpt"
        torch.save(each, path, _use_new_zipfile_serialization=zipped)
    found = h5traces.load(folder)
    assert all(map(is_same, found, expected))
    assert [each["question_id"] for each in found] == ["data_0", "data_1", "data_2"]
    target = tmp_path / "run.h5"
    report = h5traces.convert(folder, target, merge=True, precision=AUTO)
    assert report.ok
    assert any("3 states side by side" in each for each in report.files[0].understood)
    with h5traces.open(target) as archive:
        assert all(map(is_same, (trace.to_dict() for trace in archive), expected))
        names = archive[0]._stored.children("hidden_states")
        assert [each for each in names if each.startswith("position")] == [
            f"position_{i:03}" for i in range(4)
        ]
    assert h5traces.verify(target, against=folder / "data_1.ckpt")[0].ok


def test_eagle_has_one_state(tmp_path: Path) -> None:
    source = specforge()
    del source["aux_hidden_state"]
    source["target"] = torch.randn(TOKENS, HIDDEN)
    torch.save(source, tmp_path / "data_0.ckpt")
    (found,) = h5traces.load(tmp_path / "data_0.ckpt")
    assert len(found["hidden_states"]) == 1
    assert torch.equal(found["hidden_states"][0], source["hidden_state"])
    assert torch.equal(found["target"], source["target"])


def test_speculators_lists_states(tmp_path: Path) -> None:
    states = [torch.randn(TOKENS, HIDDEN) for _ in range(4)]
    source = {
        "input_ids": torch.arange(TOKENS),
        "hidden_states": states,
        "loss_mask": torch.ones(TOKENS),
    }
    torch.save(source, tmp_path / "data_0.pt")
    (found,) = h5traces.load(tmp_path / "data_0.pt")
    assert all(map(torch.equal, found["hidden_states"], states))
    assert torch.equal(found["tokens"], source["input_ids"])


def test_a_list_of_them(tmp_path: Path) -> None:
    expected = [specforge(seed) for seed in range(3)]
    torch.save(expected, tmp_path / "all.pt")
    found = h5traces.load(tmp_path / "all.pt")
    assert all(map(is_same, found, expected))
    assert [each["question_id"] for each in found] == ["all", "all-1", "all-2"]


def test_in_safetensors(tmp_path: Path) -> None:
    source = specforge()
    save_file(source, tmp_path / "data_0.safetensors")
    (found,) = h5traces.load(tmp_path / "data_0.safetensors")
    assert is_same(found, source)


def test_states_that_do_not_fit_stay_apart(tmp_path: Path) -> None:
    source = specforge(aux_hidden_state=torch.randn(TOKENS, 2 * HIDDEN + 1).bfloat16())
    torch.save(source, tmp_path / "data_0.ckpt")
    (found,) = h5traces.load(tmp_path / "data_0.ckpt")
    assert len(found["hidden_states"]) == 1
    assert torch.equal(found["aux_hidden_state"], source["aux_hidden_state"])


def test_without_tokens_it_is_none(tmp_path: Path) -> None:
    source = specforge()
    del source["input_ids"]
    torch.save(source, tmp_path / "data_0.ckpt")
    with pytest.raises(ConversionError, match="'hidden_state'"):
        h5traces.load(tmp_path / "data_0.ckpt")


def test_other_dicts_keep_their_names(tmp_path: Path) -> None:
    source = {"input_ids": torch.arange(3), "hidden_states": [torch.zeros(3, 4)]}
    torch.save([source], tmp_path / "a.pt")
    assert set(h5traces.load(tmp_path / "a.pt")[0]) == set(source)
