"""The table of families, a dozen of them in every run; tools/gen_families.py --check tries all."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from family_models import FAMILIES, make_family
from family_table import row_of
from tiny_models import tokenizer

import h5traces
from h5traces.errors import ExtractionError
from h5traces.extract import ExtractOptions, GenerationOptions, extract
from h5traces.extract.anatomy import anatomy_of, check_decoder_only

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TABLE = PAGE.read_text().partition("|---|")[2].splitlines()[1:]
ROWS = {each.split(" | ")[0][2:]: each for each in TABLE if each.startswith("| ")}
# Every form: hybrids, state spaces, linear attention, shared blocks, a decoder with a head.
DOZEN = (
    *("jamba", "llama4_text", "mamba", "minimax", "modernbert-decoder", "nemotron_h", "gpt_oss"),
    *("openai-gpt", "qwen3_5_text", "recurrent_gemma", "xlstm", "zamba2"),
)


@pytest.mark.parametrize("family", DOZEN)
def test_rows_of_the_table(family):
    assert row_of(family) == ROWS[family]


def test_the_table_has_every_family():
    assert list(ROWS) == list(FAMILIES)
    batches = [each for each in ROWS.values() if each.endswith("| yes |")]
    assert len(ROWS) >= 60
    assert len(batches) >= 45
    summary = f"{len(ROWS)} families: all with hidden states, {len(batches)} in batches."
    assert summary in PAGE.read_text()


def test_a_hybrid_in_an_archive(tmp_path):
    """Attentions of the blocks that have them, in batches, next to states of every block."""
    options = ExtractOptions(generation=GenerationOptions(max_new_tokens=4), batch_size=2)
    records = extract(make_family("qwen3_next"), tokenizer(), ["Why?", "How so, then?"], options)
    with h5traces.create(tmp_path / "hybrid.h5", num_layers=4) as writer:
        for record in records:
            writer.append(record)
    with h5traces.open(tmp_path / "hybrid.h5") as archive:
        assert archive.metadata.layers is None
        for trace in archive:
            assert list(trace["hidden_states"].layers) == [0, 1, 2, 3]
            assert list(trace["attentions"].layers) == [1, 3]
            num_tokens = len(trace["tokens"])
            assert trace.layer(3, "attentions").shape == (4, num_tokens, num_tokens)
    assert h5traces.validate(tmp_path / "hybrid.h5").ok


def test_layers_without_attention_alone():
    options = ExtractOptions(layers="0,2", generation=GenerationOptions(max_new_tokens=2))
    model = make_family("jamba")
    with pytest.raises(ExtractionError, match=r"none of the layers 0, 2 has attentions; .* 1, 3"):
        list(extract(model, tokenizer(), ["Why?"], options))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "is an encoder-decoder .t5."),
        (transformers.BartConfig(), "is an encoder-decoder .bart."),
        (transformers.BertConfig(), "is an encoder .bert., which generates no text"),
        (transformers.ModernBertConfig(), "is an encoder .modernbert."),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_models_are_told_what_they_are(config, message):
    with pytest.raises(ExtractionError, match=f"mine {message}"):
        check_decoder_only(config, "mine")


def test_an_encoder_used_as_a_decoder_is_one():
    config = transformers.BertConfig(is_decoder=True, num_hidden_layers=2, hidden_size=48)
    assert anatomy_of(transformers.BertLMHeadModel(config)).num_layers == 2
