"""Padding is cut where a mask marks it, counted, or kept with its mask; nothing else is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from small_traces import HIDDEN, TOKENS, dump, padded, record, trace
from typer.testing import CliRunner

import h5traces
from h5traces import ReadingOptions
from h5traces.cli.app import app
from h5traces.features import FEATURES, iterate_features
from h5traces.format.values import TorchValue
from h5traces.meaning.checks import Finding

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.format.record import TraceRecord

RIGHT = [1, 1, 1, 1, 0, 0, 0]
LEFT = [0, 0, 1, 1, 1, 1, 1]
BOTH = [0, 1, 1, 1, 1, 0, 0]


def found(made: TraceRecord, check: str) -> Finding:
    (finding,) = (each for each in made.findings if each.check == check)
    return finding  # type: ignore[no-any-return]  # findings are of a room above the record's


def assert_cut(made: TraceRecord, item: dict[str, Any], kept: slice) -> None:
    for kind, cuts in (("hidden_states", (kept,)), ("attentions", (slice(None), kept, kept))):
        for layer, whole in zip(made.layered[kind].arrays, item[kind], strict=True):
            np.testing.assert_array_equal(layer.array.load().values, whole[cuts])  # type: ignore[union-attr]
    assert made.tokens is not None
    np.testing.assert_array_equal(made.tokens, item["tokens"][kept])
    assert made.tokens_decoded == tuple(item["tokens_decoded"][kept])
    assert made.attention_mask is None


@pytest.mark.parametrize(
    ("mask", "where"),
    [(RIGHT, "on the right"), (LEFT, "on the left"), (BOTH, "at both ends")],
)
def test_pads_are_cut_from_every_axis_of_positions(mask: list[int], where: str) -> None:
    item = padded(1, mask)
    made = record(item)
    kept = slice(mask.index(1), len(mask) - mask[::-1].index(1))
    assert_cut(made, item, kept)
    np.testing.assert_array_equal(made.extra["attention_mask"], np.ones(sum(mask), dtype=np.int64))
    cut = found(made, "padding-cut")
    assert cut == Finding(
        "padding-cut", "attention_mask", f"{{number padded position}} cut {where}"
    )
    assert cut.number == len(mask) - sum(mask)


@pytest.mark.parametrize(
    "shape",
    [
        lambda mask: mask[None],
        lambda mask: mask.astype(bool),
        lambda mask: mask.astype(np.float32),
        lambda mask: mask.tolist(),
        lambda mask: TorchValue(mask[None], "int64"),
        lambda mask: TorchValue(mask.astype(bool), "bool"),
    ],
    ids=["batch_of_one", "bool", "float", "list", "tensor", "bool_tensor"],
)
def test_masks_of_all_types(shape: Any) -> None:
    item = padded(1, LEFT)
    item["attention_mask"] = given = shape(item["attention_mask"])
    made = record(item)
    assert_cut(made, item, slice(2, None))
    left = made.extra["attention_mask"]
    assert type(left) is type(given)
    plain, before = (np.asarray(getattr(each, "data", each)) for each in (left, given))
    assert plain.shape == (*before.shape[:-1], 5)
    assert plain.dtype == before.dtype
    assert plain.all()


@pytest.mark.parametrize(
    ("mask", "prompt", "left"),
    [
        (LEFT, 4, 2),  # counted with its two pads
        (LEFT, 7, 5),
        (RIGHT, 3, 3),
        (RIGHT, 7, 4),  # the padded length of a prompt without an answer
        (LEFT, 2, 2),  # would be pads alone: it counts tokens
        (BOTH, 3, 2),
        (LEFT, 0, 0),
    ],
)
def test_prompt_length_is_counted_without_pads(mask: list[int], prompt: int, left: int) -> None:
    made = record(padded(1, mask, prompt_length=prompt))
    assert made.prompt_len == left
    moved = "prompt_length counts without them" in found(made, "padding-cut").message
    assert moved == (left != prompt)
    of_numpy = record(padded(1, mask, prompt_length=np.int64(prompt))).extra["prompt_length"]
    assert of_numpy == left
    assert type(of_numpy) is np.int64


def test_a_mask_of_the_prompt_is_continued_by_ones() -> None:
    item = padded(1, LEFT, prompt_length=4)
    item["attention_mask"] = np.array([0, 0, 1, 1])
    made = record(item)
    assert_cut(made, item, slice(2, None))
    assert made.prompt_len == 2
    np.testing.assert_array_equal(made.extra["attention_mask"], [1, 1])


def test_arrays_without_the_last_position() -> None:
    """generate() returns one token more than states: the mask is of the tokens."""
    item = padded(1, RIGHT)
    item["hidden_states"] = [each[:-1] for each in item["hidden_states"]]
    item["attentions"] = [each[:, :-1, :-1] for each in item["attentions"]]
    made = record(item)
    assert [each.array.shape for each in made.layered["hidden_states"].arrays] == [(4, HIDDEN)] * 4  # type: ignore[union-attr]
    made = record({**item, "attention_mask": np.array(LEFT)})
    assert [each.array.shape for each in made.layered["hidden_states"].arrays] == [(4, HIDDEN)] * 4  # type: ignore[union-attr]
    assert made.tokens is not None
    assert len(made.tokens) == 5


def test_the_last_position_alone_stays() -> None:
    item = padded(1, LEFT)
    item["hidden_states"] = [each[-1:] for each in item["hidden_states"]]
    item["attentions"] = [each[:, -1:] for each in item["attentions"]]
    made = record(item)
    assert made.layered["hidden_states"].arrays[0].array.shape == (1, HIDDEN)  # type: ignore[union-attr]
    assert made.layered["attentions"].arrays[0].array.shape == (2, 1, 5)  # type: ignore[union-attr]


def test_fields_along_the_tokens() -> None:
    """Those that transformers names are cut; others of that length are named."""
    further = {"position_ids": np.arange(7)[None], "logprobs": np.zeros(7), "scores": [0.5]}
    made = record(padded(1, RIGHT, **further))
    np.testing.assert_array_equal(made.extra["position_ids"], [[0, 1, 2, 3]])
    assert len(made.extra["logprobs"]) == 7
    assert "left whole: logprobs" in found(made, "padding-cut").message


def test_padding_is_kept_by_option() -> None:
    item = padded(1, LEFT, prompt_length=4)
    made = record(item, keep_padding=True)
    np.testing.assert_array_equal(made.attention_mask, np.array(LEFT))  # type: ignore[arg-type]
    assert made.prompt_len == 4
    assert made.layered["hidden_states"].arrays[0].array.shape == (TOKENS, HIDDEN)  # type: ignore[union-attr]
    assert found(made, "padding-kept").number == 2


@pytest.mark.parametrize("keep", [True, False])
def test_a_mask_with_holes_is_stored_and_cuts_nothing(keep: bool) -> None:
    item = trace(1, attention_mask=np.array([0, 1, 1, 0, 1, 1, 1]))
    made = record(item, keep_padding=keep)
    assert made.tokens is not None
    assert len(made.tokens) == TOKENS
    np.testing.assert_array_equal(made.attention_mask, item["attention_mask"])  # type: ignore[arg-type]
    assert found(made, "mask-with-holes").number == 1


@pytest.mark.parametrize("mask", [np.ones(7), np.ones((1, 7), dtype=bool), [1] * 7, np.ones(5)])
def test_a_mask_of_ones_says_nothing(mask: Any) -> None:
    made = record(trace(1, attention_mask=mask))
    assert made.findings == ()
    assert made.attention_mask is None
    assert made.extra["attention_mask"] is mask


CAUSAL = np.tri(TOKENS)


@pytest.mark.parametrize(
    "mask", [CAUSAL, CAUSAL[None, None].astype(bool), np.where(CAUSAL > 0, 0, -np.inf)[None, None]]
)
def test_a_causal_mask_is_no_padding(mask: Any) -> None:
    made = record(trace(1, attention_mask=mask))
    assert made.findings == ()
    assert made.extra["attention_mask"] is mask


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.array([1, 1, 1, 0, 0]), "its length is not the number of stored positions"),
        (np.zeros(7), "it masks every position"),
        (np.full(7, -100), "it holds other values than 0 and 1"),
        (np.zeros((2, 7)), r"its shape has 2 axes, expected (positions,)"),
        (np.triu(np.ones((7, 7)), 1), r"its shape has 2 axes, expected (positions,)"),
        ("1110000", "a str is not a mask of 0 and 1"),
        ([[1], [1, 0]], "a list is not a mask of 0 and 1"),
    ],
)
def test_masks_that_say_nothing_about_positions_are_kept_and_named(mask: Any, reason: str) -> None:
    made = record(trace(1, attention_mask=mask))
    assert found(made, "mask-unused").message == reason
    assert made.extra["attention_mask"] is mask
    assert made.attention_mask is None
    assert made.tokens is not None
    assert len(made.tokens) == TOKENS


def converted(path: Path, items: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    target = path / "made.h5"
    source = dump(path / "batch.pkl", items)
    reading = ReadingOptions(**options)
    report = h5traces.convert(source, target, reading=reading)
    assert report.ok, report
    (checked,) = h5traces.validate(target)
    assert checked.problems == []
    # The archive records how its source was read.
    (compared,) = h5traces.verify(target, deep=True, against=source)
    assert compared.ok, compared.problems
    told = [each for each in compared.notes if "padded" in each]
    assert len(told) == (1 if report.files[0].num_cut else 0)
    return [each.to_dict() for each in h5traces.open(target)]


def test_the_archive_holds_rows_without_pads(tmp_path: Path) -> None:
    items = [padded(each, mask) for each, mask in enumerate((LEFT, [1] * 7, RIGHT))]
    stored = converted(tmp_path, items)
    for item, plain in zip(items, stored, strict=True):
        real = item["attention_mask"] == 1
        assert list(plain) == list(item)
        np.testing.assert_array_equal(plain["attention_mask"], np.ones(real.sum()))
        np.testing.assert_array_equal(plain["tokens"], item["tokens"][real])
        for layer, whole in zip(plain["hidden_states"], item["hidden_states"], strict=True):
            np.testing.assert_array_equal(layer, whole[real])
            assert not (layer == 99).any()
        for layer, whole in zip(plain["attentions"], item["attentions"], strict=True):
            np.testing.assert_array_equal(layer, whole[:, real][:, :, real])
    with h5traces.open(tmp_path / "made.h5") as archive:
        assert all(each.mask is None for each in archive)


def test_an_archive_without_pads_is_not_said_to_be_all_of_its_source(tmp_path: Path) -> None:
    source = dump(tmp_path / "batch.pkl", [padded(0, LEFT), padded(1, RIGHT)])
    command = ["convert", str(source), "-o", str(tmp_path / "a.h5")]
    shown = CliRunner().invoke(app, command).stdout
    assert "hold every bit of their sources but for 5 padded positions\n" in shown
    shown = CliRunner().invoke(app, [*command, "--overwrite", "--keep-padding"]).stdout
    assert "hold every bit of their sources\n" in shown


def test_kept_padding_comes_back_bit_for_bit_with_its_mask(tmp_path: Path) -> None:
    items = [padded(each, mask) for each, mask in enumerate((LEFT, [1] * 7, RIGHT))]
    stored = converted(tmp_path, items, keep_padding=True)
    for item, plain in zip(items, stored, strict=True):
        assert list(plain) == list(item)
        for key, value in item.items():
            assert type(plain[key]) is type(value)
            np.testing.assert_array_equal(plain[key], value)
        assert plain["attention_mask"].dtype == np.int64
    with h5traces.open(tmp_path / "made.h5") as archive:
        for trace_, item in zip(archive, items, strict=True):
            if item["attention_mask"].all():
                assert trace_.mask is None
                continue
            assert trace_.mask is not None
            assert trace_.mask.dtype == np.bool_
            np.testing.assert_array_equal(trace_.mask, item["attention_mask"] == 1)


def test_a_rewritten_archive_keeps_the_mask(tmp_path: Path) -> None:
    converted(tmp_path, [padded(0, LEFT), padded(1, RIGHT)], keep_padding=True)
    for name, options in (("copy", {}), ("again", {"precision": "fine"})):
        h5traces.repack(tmp_path / "made.h5", tmp_path / f"{name}.h5", **options)
        with h5traces.open(tmp_path / f"{name}.h5") as archive:
            np.testing.assert_array_equal(archive[0].mask, np.array(LEFT) == 1)  # type: ignore[arg-type]


def test_load_of_a_pickle_cuts_nothing(tmp_path: Path) -> None:
    item = padded(0, LEFT)
    (plain,) = h5traces.load(dump(tmp_path / "batch.pkl", [item]))
    np.testing.assert_array_equal(plain["hidden_states"][0], item["hidden_states"][0])
    np.testing.assert_array_equal(plain["attention_mask"], LEFT)


def test_append_cuts_padding_too(tmp_path: Path) -> None:
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(padded(0, LEFT))
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert archive[0].metadata.seq_len == 5


@pytest.mark.parametrize("mask", [LEFT, RIGHT, BOTH])
def test_kept_and_cut_padding_give_the_same_features(tmp_path: Path, mask: list[int]) -> None:
    items = [padded(each, mask, prompt_length=4) for each in range(2)]
    source = dump(tmp_path / "batch.pkl", items)
    tables = []
    for name, keep in (("cut", False), ("kept", True)):
        reading = ReadingOptions(keep_padding=keep)
        h5traces.convert(source, tmp_path / f"{name}.h5", reading=reading)
        with h5traces.open(tmp_path / f"{name}.h5") as archive:
            tables.append([each.values for each in iterate_features(archive, list(FEATURES))])
    for cut, kept in zip(*tables, strict=True):
        assert sorted(cut) == sorted(FEATURES)
        for name in FEATURES:
            np.testing.assert_allclose(kept[name], cut[name], rtol=1e-5)
