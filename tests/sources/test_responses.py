"""What serving engines write, with what the file does not hold: layers, prompts, answers."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
import zstandard
from commands import run
from safetensors.torch import save_file

import h5traces
from h5traces.errors import ConversionError, OptionError

AUTO = h5traces.PrecisionOptions(dtype="auto")
TOKENS, HIDDEN = 6, 8
IDS = (0, 2, 3)
STEMS = ("0-0a1b2c3d", "1_3-0a1b2c3e", "cmpl-00112233445566aa-0-0a1b2c3f")


def states(seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((TOKENS, len(IDS), HIDDEN)).astype("<f4"))


def written(folder, stems=STEMS):
    folder.mkdir(exist_ok=True)
    for number, stem in enumerate(stems):
        content = {"hidden_states": states(number), "token_ids": torch.arange(TOKENS) + number}
        save_file(content, folder / f"{stem}.safetensors")
    return folder


def response(number, **more):
    """A response of a server whose prompt has 4 tokens and whose answer 3, the last without row."""
    tokens = [each + number for each in range(TOKENS)]
    choice = {"index": 0, "text": f"answer {number}", "finish_reason": "stop"}
    choice |= {"prompt_token_ids": tokens[:4], "token_ids": [*tokens[4:], 99]}
    return {"object": "text_completion", "usage": {"prompt_tokens": 4}, "choices": [choice], **more}


def rows(path, *found):
    path.write_text("".join(json.dumps(each) + "\n" for each in found))
    return path


def test_layers_and_answers_of_a_run(tmp_path):
    folder = written(tmp_path / "run")
    two = response(1, id="3")
    two["choices"] = [{"index": 0, "text": "no"}, {**two["choices"][0], "index": 1}]
    two["choices"][1]["prompt_token_ids"] = [1, 2, 3, 4]
    path = {"hidden_states_path": f"/server/{STEMS[0]}.safetensors"}
    responses = rows(
        tmp_path / "responses.jsonl",
        response(2, id="cmpl-00112233445566aa"),
        response(0, id="unlike", kv_transfer_params=path, score=0.5),
        two,
    )
    reading = h5traces.ReadingOptions(layer_ids=(3, 0, 2), responses=responses)
    target = tmp_path / "a.h5"
    assert h5traces.convert(folder, target, merge=True, reading=reading, precision=AUTO).ok
    (result,) = [h5traces.validate(target)]
    assert result.ok
    with h5traces.open(target) as archive:
        assert list(archive.ids) == list(STEMS)
        for number, trace in enumerate(archive):
            np.testing.assert_array_equal(trace.embedding, states(number)[:, 0])
            for slot, block in ((1, 1), (2, 2)):
                np.testing.assert_array_equal(trace.layer(block), states(number)[:, slot])
            assert trace["generated_answer"] == f"answer {number}"
            assert trace["finish_reason"] == "stop"
            assert list(trace["output_ids"]) == [4 + number, 5 + number, 99]
            assert trace.metadata.prompt_len == 4
        assert archive[0]["score"] == 0.5
        stored = archive[0]._stored.children("hidden_states")
        assert {"embedding", "layer_001", "layer_002"} == set(stored)
    first = folder / f"{STEMS[0]}.safetensors"
    one = tmp_path / "one.h5"
    h5traces.convert(first, one, reading=reading, precision=AUTO)
    assert all(each.ok for each in h5traces.verify(one, against=first, reading=reading))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([response(0, id="0-0a1b2c3")], "has no response with the id '0-0a1b2c3d' or '0'; it has"),
        ([response(0, id="0"), response(0, id="0")], "has 2 responses with the id '0'"),
        ([response(1, id="0")], "has the token 1 at place 0, but the file has 0"),
        ([{"id": "0", "prompt_length": 7}], "has a prompt of 7 tokens, but the file has 6"),
        ([{"answer": "x"}], "line 1: has no id"),
        ([{"id": "0", "prompt_length": "x"}], "prompt_length is 'x', expected a number"),
    ],
)
def test_responses_that_do_not_match(tmp_path, found, message):
    folder = written(tmp_path / "run", STEMS[:1])
    responses = rows(tmp_path / "responses.jsonl", *found)
    with pytest.raises(ConversionError, match=message) as raised:
        h5traces.load(
            folder / f"{STEMS[0]}.safetensors",
            reading=h5traces.ReadingOptions(responses=responses),
        )
    assert "responses.jsonl" in str(raised.value)


def test_layers_that_do_not_fit(tmp_path):
    path = written(tmp_path / "run", STEMS[:1]) / f"{STEMS[0]}.safetensors"
    reading = h5traces.ReadingOptions(layer_ids=(0, 1))
    report = h5traces.convert(path, tmp_path / "a.h5", reading=reading)
    assert "has 3 states, but layer_ids names 2: 0, 1" in report.files[0].error
    for ids in ((), (1, 1), (-1,)):
        with pytest.raises(OptionError, match="expected different numbers"):
            h5traces.ReadingOptions(layer_ids=ids)
    with pytest.raises(OptionError, match="leave one out"):
        h5traces.ReadingOptions(layer_ids=(1,), first_state="block")


def test_ids_on_the_command_line_may_be_ranges(tmp_path):
    folder = written(tmp_path / "requests")
    command = ["convert", str(folder), "--merge", "-o"]
    result = run(*command, tmp_path / "a.h5", "--layer-ids", "0, 3-4")
    with h5traces.open(tmp_path / "a.h5") as archive:
        assert archive[0]["hidden_states"].layers == (None, 2, 3)
    for wrong in ("0,x", "0--3", "2-", ""):
        arguments = [*command, str(tmp_path / "b.h5"), "--layer-ids", wrong]
        result = run(*arguments, code=2)
        text = " ".join(result.output.replace("│", " ").split())
        assert "expected numbers and ranges such as 0,8,16-20" in text


def lens(**changes):
    numbers = np.random.default_rng(0).standard_normal((3, TOKENS, HIDDEN)).astype("<f4")
    data = base64.b64encode(zstandard.ZstdCompressor().compress(numbers.tobytes())).decode()
    stream = {"data": data, "dtype": "float32", "shape": [3, TOKENS, HIDDEN], "compression": "zstd"}
    return numbers, response(0, id="cmpl-1", activations={"residual_stream": {**stream, **changes}})


def test_a_response_of_vllm_lens(tmp_path):
    numbers, row = lens()
    path = tmp_path / "answer.json"
    path.write_text(json.dumps([row]))
    reading = h5traces.ReadingOptions(layer_ids=(1, 2, 3))
    target = tmp_path / "a.h5"
    assert h5traces.convert(path, target, reading=reading, precision=AUTO).ok
    with h5traces.open(target) as archive:
        (trace,) = archive
        for block in range(3):
            np.testing.assert_array_equal(trace.layer(block), numbers[block])
        assert trace.metadata.sample_id == "cmpl-1"
        assert (trace["generated_answer"], trace["prompt_length"]) == ("answer 0", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": "cloudpickle"}, "pickled activations are never read"),
        ({"dtype": "object"}, "has dtype 'object'"),
        ({"shape": [3, 6, 9]}, "has 576 bytes, but float32 of shape"),
        ({"shape": [3, 48]}, "expected \\(layers, tokens, hidden\\)"),
        ({"data": "AAAA"}, "is not zstd in base64"),
    ],
)
def test_damaged_responses_of_vllm_lens(tmp_path, changes, message):
    path = tmp_path / "answer.json"
    path.write_text(json.dumps([lens(**changes)[1]]))
    with pytest.raises(ConversionError, match=message):
        h5traces.load(path)


def test_responses_without_files_are_named(tmp_path):
    """And files without responses; neither ends well."""
    folder = written(tmp_path / "run", STEMS[:2])
    known = [response(0, id="0"), response(1, id="3", choices=[])]
    more = [response(n, id=f"lost-{n}", request_id=f"other-{n}") for n in range(7)]
    responses = rows(tmp_path / "responses.jsonl", *known, *more)
    reading = h5traces.ReadingOptions(layer_ids=IDS, responses=responses)
    report = h5traces.convert(folder, tmp_path / "a.h5", merge=True, reading=reading)
    assert not report.ok
    (problem,) = report.problems
    assert problem == (
        f"{responses}: 7 responses of 9 belong to no file that is converted: other-0, other-1, "
        "other-2, other-3, other-4 and 2 more; name their files as well, or leave these responses "
        "out"
    )
    assert len(h5traces.open(tmp_path / "a.h5")) == 2
    command = ["convert", str(folder), "-o", str(tmp_path / "b.h5"), "--merge"]
    result = run(*command, "--responses", responses, code=1)
    assert "7 responses of 9 belong to no file" in " ".join(result.output.split())
    rows(responses, known[0])
    report = h5traces.convert(folder, f"{tmp_path}/c/", reading=reading)
    (problem,) = report.problems
    assert STEMS[1] in problem
    assert "has no response with the id '1_3-0a1b2c3e' or '3'" in problem
    assert [each.status for each in report.files] == ["converted", "failed"]
