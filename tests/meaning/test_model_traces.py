"""Traces of real models pass every check, padded or not; cut rows are those of the model alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from small_traces import record

pytest.importorskip("transformers")
import torch
from transformers import AutoModelForCausalLM

from h5traces.format.values import TorchValue
from h5traces.meaning.sample_checks import Look, sample_findings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "extract"))

from tiny_models import FAMILIES, TINY_LLAMA, shared_model, tokenizer  # noqa: E402

TEXTS = ["The quick brown fox", "def main(arguments):\n    return 0", "Hi"]
LOOKS = [Look(), Look(full_mapper=map)]


def model(family: str) -> Any:
    if family != "trained":
        return shared_model(family)
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, attn_implementation="eager").eval()


def item(outputs: Any, ids: Any, row: int, **fields: Any) -> dict[str, Any]:
    """One row of a batch as studies save it, the embedding left out."""

    def plain(tensor: Any) -> TorchValue:
        return TorchValue(tensor.detach().numpy(), str(tensor.dtype).removeprefix("torch."))

    return {
        "hidden_states": [plain(each[row]) for each in outputs.hidden_states[1:]],
        "attentions": [plain(each[row]) for each in outputs.attentions],
        "tokens": plain(ids[row]),
        "tokens_decoded": [tokenizer().decode([each]) for each in ids[row].tolist()],
        "generated_answer": "an answer",
        **{key: plain(value[row]) for key, value in fields.items()},
    }


def run(family: str, ids: Any, mask: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(family)(
            ids,
            attention_mask=mask,
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
            **inputs,
        )


@pytest.mark.parametrize("family", ["trained", *FAMILIES])
@pytest.mark.parametrize("look", LOOKS, ids=["quick", "full"])
def test_a_models_own_traces_have_no_findings(family: str, look: Look) -> None:
    for text in TEXTS:
        ids = torch.tensor([tokenizer()(text * 3)["input_ids"]])
        outputs = run(family, ids, torch.ones_like(ids))
        assert sample_findings(record(item(outputs, ids, 0)), look) == []


@pytest.mark.parametrize("family", ["trained", "llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_rows_are_those_of_the_model_alone(family: str, side: str) -> None:
    rows = [tokenizer()(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    pairs = zip(rows, pads, strict=True)
    ids = torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])
    mask = torch.tensor(
        [
            [1] * len(row) + [0] * len(pad) if side == "right" else [0] * len(pad) + [1] * len(row)
            for row, pad in zip(rows, pads, strict=True)
        ]
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = run(family, ids, mask, position_ids=positions)
    for number, row in enumerate(rows):
        made = record(item(outputs, ids, number, attention_mask=mask))
        checks = {each.check for each in sample_findings(made, LOOKS[1])}
        assert checks == ({"padding-cut"} if len(row) < width else set())
        alone = torch.tensor([row])
        expected = record(item(run(family, alone, torch.ones_like(alone)), alone, 0))
        assert made.tokens is not None
        assert made.tokens.tolist() == row
        assert made.tokens_decoded == expected.tokens_decoded
        for kind in ("hidden_states", "attentions"):
            for cut, whole in zip(
                made.layered[kind].arrays, expected.layered[kind].arrays, strict=True
            ):
                values = torch.tensor(whole.array.load().values)  # type: ignore[union-attr]
                # The model computes in float16, and processors order sums by the shape of a batch:
                # what is rounded differently differs in proportion to the largest values.
                torch.testing.assert_close(
                    torch.tensor(cut.array.load().values),  # type: ignore[union-attr]
                    values,
                    rtol=1e-3,
                    atol=torch.finfo(torch.float16).eps * float(values.abs().max()),
                )


@pytest.mark.parametrize("family", ["trained", "llama", "gpt2"])
def test_pads_that_no_mask_marks_are_suspected(family: str) -> None:
    row = tokenizer()(TEXTS[1])["input_ids"]
    ids = torch.tensor([[2] * 4 + row])
    mask = torch.tensor([[0] * 4 + [1] * len(row)])
    outputs = run(family, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    made = record(item(outputs, ids, 0))
    for look in LOOKS:
        found = [each for each in sample_findings(made, look) if each.check == "padding-suspected"]
        assert found, family
        assert {each.number for each in found} == {4}
