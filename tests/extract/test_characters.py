"""Characters of tokens, spans, and parts of sequences."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import run
from tiny_models import TINY_LLAMA, shared_model, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import h5traces
from h5traces.errors import ExtractionError, FieldNotFoundError, OptionError
from h5traces.extract import (
    Columns,
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    extract,
    extract_dataset,
)
from h5traces.extract.characters import decoded_offsets

MODEL = ModelChoice(model_id=str(TINY_LLAMA), threads=1)
SHORT = GenerationOptions(max_new_tokens=6)
GIVEN = {"question": "Why?", "given": " It is naïve, and 42 km away.", "question_id": "g"}


def records(questions, **options):
    options.setdefault("generation", SHORT)
    chosen = ExtractOptions(**options)
    return list(extract(shared_model("llama"), tokenizer(), questions, chosen, dtype="float32"))


def stored(tmp_path, questions, name="run.h5", **options):
    with h5traces.create(tmp_path / name) as writer:
        for each in records(questions, **options):
            writer.append(each)
    assert h5traces.validate(tmp_path / name).ok
    return h5traces.open(tmp_path / name)


def test_every_token_has_its_characters(tmp_path):
    with stored(tmp_path, [GIVEN, "What is it?"], layers=[1]) as archive:
        for trace in archive:
            text = trace["prompt"] + trace["generated_answer"]
            offsets = trace["char_offsets"]
            assert offsets.dtype == np.int32
            assert offsets.shape == (len(trace["tokens"]), 2)
            # No character between tokens is lost but spaces, which tokenizers may leave out.
            covered = np.zeros(len(text), dtype=bool)
            for (start, end), token in zip(offsets, trace["tokens_decoded"], strict=True):
                covered[start:end] = True
                if end > start and "\ufffd" not in token:
                    assert text[start:end].strip() == token.strip()
            assert not "".join(np.array(list(text))[~covered]).strip()


def test_characters_of_a_given_answer_are_found(tmp_path):
    with stored(tmp_path, [GIVEN], layers=[1]) as archive:
        trace = archive[0]
        answer = trace["generated_answer"]
        assert answer == GIVEN["given"]
        start = answer.index("42 km")
        found = trace.tokens_of(start, start + 5)
        assert "".join(trace["tokens_decoded"][each] for each in found).strip() == "42 km"
        # All tokens of a character of several bytes have it.
        place = answer.index("ï")
        parts = trace.tokens_of(place, place + 1)
        ids = [int(trace["tokens"][each]) for each in parts]
        assert "ï" in tokenizer().decode(ids)
        assert len(trace.tokens_of(3, 3)) == 0
        asked = trace.tokens_of(0, 4, "question")
        assert "Why?" in "".join(trace["tokens_decoded"][each] for each in asked)
        labels = trace.token_labels([(start, start + 5)])
        prompt_len = trace["prompt_length"]
        assert set(labels[:prompt_len]) == {-100}
        assert set(labels[prompt_len:]) == {0, 1}
        assert np.array_equal(np.flatnonzero(labels == 1), found)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda t: t.tokens_of(0, 500), OptionError, "0 to 500 lie outside of generated_answer"),
        (lambda t: t.tokens_of(0, 1, "tokens"), OptionError, "field is 'tokens', expected gen"),
        (lambda t: t.token_labels([(1,)]), OptionError, "a span is .*, expected its first"),
        (lambda t: t.token_labels(), FieldNotFoundError, "there is no field 'spans'"),
    ],
)
def test_characters_that_are_not_there(ask, error, message, tmp_path):
    with (
        stored(tmp_path, [GIVEN], layers=[1]) as archive,
        pytest.raises(error, match=message),
    ):
        ask(archive[0])


def test_archives_of_others_have_no_characters(tmp_path):
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append({"hidden_states": [np.zeros((2, 4), "f4")], "tokens": [1, 2]})
    with (
        h5traces.open(tmp_path / "run.h5") as archive,
        pytest.raises(FieldNotFoundError, match="no field 'prompt'; characters of tokens are"),
    ):
        archive[0].tokens_of(0, 1)


def _metaspace():
    """A tokenizer like Llama 2's: a word's space is lost where its token is decoded alone."""
    words = ["<unk>", "▁It", "▁is", "▁so", "!", "<0xC3>", "<0xAF>"]
    tokens = Tokenizer(models.BPE({each: n for n, each in enumerate(words)}, [], unk_token="<unk>"))
    tokens.normalizer = normalizers.Prepend("▁")
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def test_characters_of_tokens_that_decode_otherwise_alone():
    tokens = _metaspace()
    ids = [1, 2, 3, 5, 6, 4] * 3
    text = tokens.decode(ids)
    assert text.startswith("It is soï! It")
    offsets = decoded_offsets(tokens, ids, text)
    pieces = [text[start:end] for start, end in offsets]
    assert pieces == ["It", " is", " so", "ï", "ï", "!", *[" It", " is", " so", "ï", "ï", "!"] * 2]


PARTS = {
    "all": lambda prompt, length: range(length),
    "prompt": lambda prompt, length: range(prompt),
    "answer": lambda prompt, length: range(prompt, length),
    "prompt_last": lambda prompt, length: [prompt - 1],
    "last": lambda prompt, length: [length - 1],
    "every:4": lambda prompt, length: range(0, length, 4),
}


@pytest.mark.parametrize("tokens", sorted(PARTS))
def test_parts_of_a_sequence_are_those_of_the_whole(tokens, tmp_path):
    """Also in a batch, where sequences are padded."""
    asked = [GIVEN, "What is it?"]
    kinds = ("hidden_states", "attentions", "keys", "state_norms", "logprobs", "entropy")
    options = {"kinds": kinds, "layers": [1, 3], "batch_size": 2, "embedding": True}
    with (
        stored(tmp_path, asked, **options) as whole,
        stored(tmp_path, asked, "part.h5", tokens=tokens, **options) as part,
    ):
        for one, other in zip(whole, part, strict=True):
            prompt = one["prompt_length"]
            kept = np.array(PARTS[tokens](prompt, len(one["tokens"])))
            assert np.array_equal(other["tokens"], one["tokens"][kept])
            assert other["tokens_decoded"] == [one["tokens_decoded"][each] for each in kept]
            assert other["prompt_length"] == np.sum(kept < prompt)
            assert other.metadata.coverage == "full"
            assert np.array_equal(other["char_offsets"], one["char_offsets"][kept])
            assert np.array_equal(other.embedding, one.embedding[kept])
            for layer in (1, 3):
                states, heads = one.layer(layer), one.layer(layer, "attentions")
                assert np.array_equal(other.layer(layer), states[kept])
                assert np.array_equal(other.layer(layer, "attentions"), heads[:, kept][:, :, kept])
                assert np.array_equal(other.layer(layer, "keys"), one.layer(layer, "keys")[:, kept])
            assert np.array_equal(other["entropy"], one["entropy"][kept])
            assert np.array_equal(other["logprobs"], one["logprobs"][kept], equal_nan=True)
            assert ("positions" in other) == (tokens != "all")
            if tokens != "all":
                assert np.array_equal(other["positions"], kept)
                assert np.array_equal(other["sequence"], one["tokens"])
            if one.metadata.sample_id == "g":
                labels = one.token_labels([(1, 9)])
                assert np.array_equal(other.token_labels([(1, 9)]), labels[kept])


def test_tokens_of_spans(tmp_path):
    answer = GIVEN["given"]
    start = answer.index("42")
    asked = {**GIVEN, "spans": [{"start": start, "end": start + 5, "text": "42 km"}, (1, 3)]}
    with stored(tmp_path, [asked], tokens="spans", layers=[1]) as archive:
        trace = archive[0]
        words = "".join(trace["tokens_decoded"])
        assert [each.strip() for each in words.split()] == ["It", "42", "km"]
        assert trace.token_labels().tolist() == [1] * len(trace["tokens"])
        assert list(trace["spans"][0]) == ["start", "end", "text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": [(3, 99)]}, "g: the span 3 to 99 lies outside of the given answer, which has"),
        ({"spans": [(3, 3)]}, "g: the span 3 to 3 holds nothing; expected"),
        ({"spans": [(4, 3)]}, "g: the span 4 to 3 holds nothing; expected"),
        ({"spans": [(-2, 3)]}, "g: the span -2 to 3 lies outside of the given answer"),
        ({"spans": [{"start": 1, "end": 3, "text": "no"}]}, "1 to 3 of the given .* expected 'no'"),
        ({"spans": [(0, 1)], "given": [5, 6]}, "g: has spans, which need one given answer as text"),
        ({}, "g: has no spans whose tokens could be stored"),
        ({"spans": []}, "g: has no spans whose tokens could be stored"),
    ],
)
def test_spans_that_do_not_fit(change, message):
    with pytest.raises(ExtractionError, match=message):
        records([{**GIVEN, **change}], tokens="spans")


@pytest.mark.parametrize("tokens", ["first", "every:0", "every:", "every:2.5"])
def test_choices_of_tokens_that_there_are_not(tokens):
    with pytest.raises(ExtractionError, match=r"tokens is .*, expected all, prompt, answer"):
        ExtractOptions(tokens=tokens)


def test_prompts_alone_have_no_answer_to_keep():
    with pytest.raises(ExtractionError, match="0: has no answer whose tokens could be stored"):
        records(["Why?"], tokens="answer", generation=GenerationOptions(max_new_tokens=0))


def test_a_column_of_spans_and_parts_by_command(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [
        {"question": "Why?", "question_id": "a", "said": " It is so.", "marked": [[1, 3]]},
        {"question": "Why?", "question_id": "b", "said": " It is so.", "marked": [[1, 30]]},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = ["extract", "--model-id", str(TINY_LLAMA), "--dataset", str(path)]
    columns = ["--given-column", "said", "--spans-column", "marked", "--tokens", "answer"]
    out = tmp_path / "run.h5"
    result = run(*command, *columns, "-o", out, "--layers", "1", code=1)
    assert "left out: b: the span 1 to 30 lies outside" in result.output
    # Rows of weights that miss the prompt are no finding.
    assert "do not sum to 1" not in result.output
    with h5traces.open(out) as archive:
        assert archive.metadata.extraction.tokens == "answer"
        trace = archive[0]
        assert trace["prompt_length"] == 0
        assert trace["tokens_decoded"][int(np.flatnonzero(trace.token_labels() == 1)[0])] == " It"
    path.write_text(json.dumps({**rows[0], "marked": "no"}))
    dataset = DatasetChoice(dataset=str(path), columns=Columns(given="said", spans="marked"))
    with pytest.raises(ExtractionError, match="the column 'marked' holds 'no', expected a list"):
        extract_dataset(MODEL, dataset, tmp_path / "other.h5")
