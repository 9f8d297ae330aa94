"""Prompts alone, answers given or drawn, chats, prompts as token ids; and threads."""

from __future__ import annotations

import copy
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

MODEL = ModelChoice(model_id=str(TINY_LLAMA), threads=1)
PROMPT_ONLY = GenerationOptions(max_new_tokens=0)
DRAWN = GenerationOptions(max_new_tokens=5, do_sample=True, temperature=2.0, num_generations=3)
TEMPLATE = (
    "{% if tools %}tools: {% for t in tools %}{{ t.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatty():
    found = copy.deepcopy(tokenizer())
    found.chat_template = TEMPLATE
    return found


def records(questions, tokens=None, **options):
    chosen = ExtractOptions(**options)
    found = extract(
        shared_model("llama"), tokens or tokenizer(), questions, chosen, dtype="float32"
    )
    return list(found)


def answers(found):
    return {
        (each.sample_id, each.generation_index): each.tokens[each.prompt_len :].tolist()
        for each in found
    }


def test_answers_are_drawn_with_seeds_of_their_own():
    """Neither neighbours in a batch nor the number of answers changes one."""
    asked = ["Why?", "What is it?"]
    found = answers(records(asked, generation=DRAWN))
    assert list(found) == [(name, n) for name in ("0", "1") for n in range(3)]
    assert len({tuple(each) for each in found.values()}) == 6
    assert answers(records(asked, generation=DRAWN, batch_size=4)) == found
    fewer = GenerationOptions(max_new_tokens=5, do_sample=True, temperature=2.0)
    alone = answers(records(asked[:1], generation=fewer))
    assert alone == {("0", 0): found["0", 0]}


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "max_new_tokens": 0}], ids=["greedy", "prompts"]
)
def test_answers_that_would_be_the_same_are_rejected(options):
    with pytest.raises(ExtractionError, match="num_generations is 2, but answers that are not"):
        GenerationOptions(num_generations=2, **options)


def test_given_answers_are_not_drawn():
    with pytest.raises(ExtractionError, match="0: has a given answer, and num_generations is 3"):
        records([{"question": "Why?", "given": " So."}], generation=DRAWN)


def test_a_stopped_run_of_several_answers_goes_on(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(3)))
    dataset = DatasetChoice(dataset=str(path))
    options = ExtractOptions(layers=[1], generation=DRAWN, batch_size=2)

    def run(output, stop_before=99):
        batches = iter(range(100))
        return extract_dataset(
            MODEL, dataset, output, options, should_stop=lambda: next(batches) >= stop_before
        )

    whole, stopped = tmp_path / "whole.h5", tmp_path / "stopped.h5"
    assert run(whole).num_written == 9
    # In the middle of the answers to the second question.
    assert run(stopped, 2).num_written == 4
    again = run(stopped)
    assert (again.num_planned, again.num_before, again.num_written) == (9, 4, 5)
    # Several answers to one question are not samples of one id by mistake.
    assert not [each for each in again.findings if each.check == "repeated-id"]
    with h5traces.open(whole) as one, h5traces.open(stopped) as other:
        assert [each.metadata.digest for each in one] == [each.metadata.digest for each in other]
        assert [each.metadata.generation_index for each in one] == [0, 1, 2] * 3
        assert one.metadata.extraction.generation["num_generations"] == 3
        assert np.array_equal(other.by_id("asked_1", 2)["tokens"], one[5]["tokens"])
        assert len({each.metadata.extraction.seed for each in one}) == 9
    assert run(stopped).status == "finished"


def test_an_answer_that_was_left_out_does_not_hide_a_later_one(tmp_path):
    path = tmp_path / "asked.jsonl"
    row = {"question": "Why?", "question_id": "why", "said": ["", " Because.", [5, 6]]}
    path.write_text(json.dumps(row) + "\n")
    dataset = DatasetChoice(dataset=str(path), columns=Columns(given="said"))
    for status in ("finished", "finished"):
        report = extract_dataset(MODEL, dataset, tmp_path / "run.h5", ExtractOptions(layers=[1]))
        assert (report.status, report.num_planned) == (status, 3)
        assert [(each.key, each.reason) for each in report.skipped] == [
            (("why", 0), "unfit_answer")
        ]
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert [each.metadata.generation_index for each in archive] == [1, 2]
        assert archive.by_id("why", 1)["generated_answer"] == " Because."


def test_samples_say_what_they_were_computed_with():
    found = records(["Why?", "What is it, then?", "How?"], batch_size=2, generation=DRAWN)
    together = [each.extraction.num_together for each in found]
    assert together == [2] * 8 + [1]
    for first, second in zip(found[:8:2], found[1:8:2], strict=True):
        lengths = [len(each.tokens) for each in (first, second)]
        padding = [each.extraction.num_padding for each in (first, second)]
        assert padding == [max(lengths) - each for each in lengths]
    assert found[-1].extraction.num_padding == 0


def test_chats_with_tools():
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    chat = {"messages": messages, "tools": [{"name": "search"}], "question_id": "c"}
    (found,) = records([chat], chatty(), layers=[1], generation=GenerationOptions(max_new_tokens=2))
    text = "tools: search <system>Be short.</system>\n<user>Why?</user>\n<assistant>"
    assert (
        found.tokens[: found.prompt_len].tolist()
        == tokenizer()(text, add_special_tokens=False)["input_ids"]
    )
    assert found.texts["question"] == "Why?"
    assert found.extraction.finish_reason != "given"


def test_the_last_message_of_an_assistant_is_the_answer():
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because it is."},
    ]
    (found,) = records([{"messages": messages}], chatty(), layers=[1])
    assert found.extraction.finish_reason == "given"
    assert found.texts["generated_answer"] == "Because it is.</assistant>\n"
    whole = chatty().apply_chat_template(messages, tokenize=False)
    ids = tokenizer()(whole, add_special_tokens=False)["input_ids"]
    assert found.tokens.tolist() == ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "0: the chat template rejects the messages.*no sys"),
        ("{{ messages | length }}", "0: the chat template writes the prompt otherwise"),
    ],
)
def test_chats_that_the_template_does_not_take(template, message):
    tokens = copy.deepcopy(tokenizer())
    tokens.chat_template = template
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ExtractionError, match=message):
        records([{"messages": chat}], tokens)


def test_prompts_as_token_ids():
    (asked,) = records(["Why?"], layers=[1])
    prompt = tuple(asked.tokens[: asked.prompt_len].tolist())
    (found,) = records([Question("", "0", prompt_ids=prompt)], layers=[1])
    assert np.array_equal(found.tokens, asked.tokens)
    (given,) = records([{"prompt_ids": prompt, "given": [7, 8]}], layers=[1])
    assert given.tokens.tolist() == [*prompt, 7, 8]
    with pytest.raises(ExtractionError, match="0: the prompt has the token 5000, expected 0 to"):
        records([{"prompt_ids": [5000]}])


def test_columns_of_chats_and_ids(tmp_path):
    lines = tmp_path / "asked.csv"
    lines.write_text('ids,said\n"[5, 6, 7]","[8, 9]"\n"[5]","["" a"", "" b""]"\n')
    columns = Columns(prompt_ids="ids", given="said")
    report = extract_dataset(
        MODEL,
        DatasetChoice(dataset=str(lines), columns=columns),
        tmp_path / "run.h5",
        ExtractOptions(layers=[1]),
    )
    assert report.ok
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive[0]["tokens"].tolist() == [5, 6, 7, 8, 9]
        assert [each["generated_answer"] for each in archive][1:] == [" a", " b"]


@pytest.mark.parametrize(
    ("cell", "columns", "message"),
    [
        ([], {"given": "c"}, "found no text in the column 'c'"),
        ([1, "a"], {"given": "c"}, "the column 'c' mixes token ids and answers"),
        ("x", {"messages": "c"}, "the column 'c' holds 'x', expected a list of messages"),
        ([1.5], {"prompt_ids": "c"}, r"the column 'c' holds \[1.5\], expected a list of token"),
        (7, {"tools": "c"}, "the column 'c' holds 7, expected a list of tools"),
    ],
)
def test_cells_that_hold_something_else(cell, columns, message, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "Why?", "c": cell}))
    dataset = DatasetChoice(dataset=str(path), columns=Columns(**columns))
    with pytest.raises(ExtractionError, match=f"line 1: {message}"):
        extract_dataset(MODEL, dataset, tmp_path / "run.h5")


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
    assert "joined: with the given answer ':' after it, the prompt has other tokens" in str(
        report.skipped
    )
    path.write_text('{"question": "Why?"}\n')
    with pytest.raises(ExtractionError, match="line 1: has no column 'said'; its columns are"):
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
