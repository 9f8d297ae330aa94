"""Prompts alone, answers that are given, and threads."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from tiny_models import TINY_LLAMA, shared_model, tokenizer

import h5traces
from h5traces.errors import ExtractionError
from h5traces.extract import (
    Columns,
    DatasetChoice,
    ExtractOptions,
    GenerationOptions,
    ModelChoice,
    Question,
    extract,
    extract_dataset,
)
from h5traces.extract.models import set_threads

PROMPT_ONLY = GenerationOptions(max_new_tokens=0)
MODEL = ModelChoice(model_id=str(TINY_LLAMA), threads=1)


def records(questions, **options):
    chosen = ExtractOptions(**options)
    return list(extract(shared_model("llama"), tokenizer(), questions, chosen, dtype="float32"))


def test_prompts_alone():
    (record,) = records(["What is it?"], generation=PROMPT_ONLY)
    assert record.prompt_len == len(record.tokens)
    assert record.extraction.finish_reason == "none"
    assert record.texts["generated_answer"] == ""
    (longer,) = records(["What is it?"], generation=GenerationOptions(max_new_tokens=3))
    prompt = longer.tokens[: longer.prompt_len]
    assert np.array_equal(prompt, record.tokens)
    state, of_longer = (
        each.layered["hidden_states"].arrays[1].array.values for each in (record, longer)
    )
    assert np.allclose(state, of_longer[: len(state)], rtol=1e-4, atol=1e-4)


def test_a_given_answer_is_run_as_one_that_was_generated():
    (made,) = records(["Why?"], generation=GenerationOptions(max_new_tokens=5))
    answer = tuple(made.tokens[made.prompt_len :].tolist())
    (given,) = records([Question("Why?", "0", given=answer)])
    assert given.extraction.finish_reason == "given"
    assert np.array_equal(given.tokens, made.tokens)
    for kind, layered in made.layered.items():
        for one, other in zip(layered.arrays, given.layered[kind].arrays, strict=True):
            assert np.array_equal(one.array.values, other.array.values)


def test_given_and_generated_answers_in_one_batch():
    questions = [
        {"question": "Why?", "given": " Because it is."},
        "What is it?",
        {"question": "How so?", "given": [5, 6, 7]},
    ]
    found = records(questions, batch_size=3, generation=GenerationOptions(max_new_tokens=2))
    reasons = [each.extraction.finish_reason for each in found]
    assert reasons[0] == reasons[2] == "given" != reasons[1]
    assert found[0].texts["generated_answer"] == " Because it is."
    assert found[2].tokens[found[2].prompt_len :].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "0: the given answer is empty"),
        ((5, 99999), "0: the given answer has the token 99999, expected 0 to 2047"),
    ],
)
def test_given_answers_that_do_not_fit(given, message):
    with pytest.raises(ExtractionError, match=message):
        records([Question("Why?", "0", given=given)])


def test_a_column_of_given_answers(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [
        {"question": "Why?", "said": " Because."},
        # One token with the end of the prompt.
        {"question": "How?", "said": ":", "question_id": "joined"},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    dataset = DatasetChoice(dataset=str(path), columns=Columns(given="said"))
    options = ExtractOptions(prompt_template="Q: {question} A:", layers=[1])
    report = extract_dataset(MODEL, dataset, tmp_path / "run.h5", options)
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive[0]["generated_answer"] == " Because."
        assert archive.metadata.extraction.threads == 1
    left_out = {each.sample_id: each.reason for each in report.skipped}
    assert left_out == {"joined": "unfit_answer"}
    assert "joined: with the given answer ':' behind it, the prompt has other tokens" in str(
        report.skipped
    )
    path.write_text('{"question": "Why?"}\n')
    with pytest.raises(ExtractionError, match="found no text in the column 'said'"):
        extract_dataset(MODEL, dataset, tmp_path / "other.h5", options)


@pytest.mark.parametrize(("load", "expected"), [(0.1, 4), (2.6, 1), (90.0, 1)])
def test_threads_are_the_cores_that_are_free(monkeypatch, load, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(os, "process_cpu_count", lambda: 4, raising=False)
        set_threads(None)
        assert torch.get_num_threads() == expected
        set_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
