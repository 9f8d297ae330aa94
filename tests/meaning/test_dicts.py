"""What an index and an axis mean: established from the other fields, said, stored, and undone."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from legacy_batches import assert_same, grouped, with_torch
from small_traces import HEADS, HIDDEN, LAYERS, TOKENS, states, trace, weights

import h5traces
from h5traces.checking.validate import validate
from h5traces.errors import ConversionError, LayerIndexError, OptionError
from h5traces.format.record import SourcePosition
from h5traces.meaning.numbering import Established
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.records import to_record
from h5traces.meaning.sample_checks import sample_findings

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.format.record import TraceRecord

PLACE = SourcePosition(file=0, position=0)
BLOCKS = [f"layer_{layer:03d}" for layer in range(LAYERS)]
POSITIONS = [f"position_{layer:03d}" for layer in range(LAYERS)]


def record(item: dict[str, Any], **options: Any) -> TraceRecord:
    layers = options.pop("layers", None)
    established = options.pop("established", None)
    return to_record(
        item,
        source=PLACE,
        layers=layers,
        established=established,
        options=ReadingOptions(**options),
    )


def names(found: TraceRecord, kind: str = "hidden_states") -> list[str]:
    return [each.name for each in found.layered[kind].arrays]


def sites(found: TraceRecord) -> list[str | None]:
    return [each.site for each in found.layered["hidden_states"].arrays]


def checks(found: TraceRecord) -> list[str]:
    return sorted({each.check for each in found.findings})


def rejected(item: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        record(item, **options)
    message = str(caught.value)
    assert len(message) < 260
    return message


# --- the first state ------------------------------------------------------------------------------


def test_one_state_more_than_attentions_begins_with_the_embedding() -> None:
    found = record(trace(hidden_states=tuple(states(0, layers=LAYERS + 1))))
    assert names(found) == ["embedding", *BLOCKS]
    assert sites(found) == ["embedding", *["block_output"] * (LAYERS - 1), "final_norm"]
    assert checks(found) == ["embedding-first"]


def test_as_many_states_as_attentions_are_blocks() -> None:
    found = record(trace())
    assert names(found) == names(found, "attentions") == BLOCKS
    assert sites(found) == [*["block_output"] * (LAYERS - 1), "final_norm"]
    assert not found.findings


@pytest.mark.parametrize("absent", ["missing", None, (), (None,) * LAYERS, [None, None]])
def test_without_attentions_positions_are_kept(absent: Any) -> None:
    item = trace(attentions=absent)
    if absent == "missing":
        del item["attentions"]
    found = record(item)
    assert (names(found), sites(found)) == (POSITIONS, [None] * LAYERS)
    is_there = absent != "missing"
    assert checks(found) == ["attentions-absent"] * is_there + ["first-state-unknown"]


@pytest.mark.parametrize(
    ("first_state", "expected"),
    [("block", BLOCKS), ("embedding", ["embedding", *BLOCKS[:-1]])],
)
def test_the_user_says_what_the_first_state_is(first_state: str, expected: list[str]) -> None:
    found = record(trace(attentions=None), first_state=first_state)
    assert names(found) == expected
    assert sites(found)[-1] == "final_norm"


@pytest.mark.parametrize(
    ("num_layers", "first"), [(LAYERS, "layer_000"), (LAYERS - 1, "embedding"), (9, "position_000")]
)
def test_the_number_of_layers_tells_it_as_well(num_layers: int, first: str) -> None:
    assert names(record(trace(attentions=None, num_layers=num_layers)))[0] == first
    item = trace(attentions=None)
    assert names(record(item, established=Established(num_layers=num_layers)))[0] == first


def test_earlier_samples_of_the_source_tell_it() -> None:
    established = Established()
    record(trace(hidden_states=states(0, layers=LAYERS + 1)), established=established)
    found = record(
        trace(hidden_states=states(1, layers=LAYERS + 1), attentions=None), established=established
    )
    assert names(found) == ["embedding", *BLOCKS]
    other = record(
        trace(hidden_states=states(1, layers=2), attentions=None), established=established
    )
    assert names(other) == POSITIONS[:2]


def test_contradictions_are_rejected() -> None:
    assert "has 6 layers for 4 of 'attentions'; expected 4, or 5 with the embedding first" in (
        rejected(trace(hidden_states=states(0, layers=6)))
    )
    assert "leave first_state out" in rejected(trace(), first_state="embedding")
    more = trace(hidden_states=states(0, layers=LAYERS + 1))
    assert "the first is the embedding, but first_state is 'block'" in (
        rejected(more, first_state="block")
    )
    means = [each.mean(0) for each in weights(0)][:2]
    assert "there are 4 attentions and 2 attention_mean" in rejected(trace(attention_mean=means))


def test_a_container_that_is_neither_is_rejected() -> None:
    item = {"tokens": np.arange(3), "question_id": "q"}
    assert "'hidden_states' and 'attentions' are missing; found tokens" in rejected(item)


# --- axes and containers --------------------------------------------------------------------------


def held(arrays: list[np.ndarray], form: str) -> Any:
    stacked = np.stack(arrays)
    return {
        "layer first": stacked,
        "batch first": stacked[None],
        "batch second": stacked[:, None],
        "batch of one": [each[None] for each in arrays],
        "by number": dict(enumerate(arrays)),
        "by name": {f"model.layers.{n}": each for n, each in enumerate(arrays)},
        "backwards": {n: arrays[n] for n in reversed(range(len(arrays)))},
    }[form]


FORMS = [
    "layer first",
    "batch first",
    "batch second",
    "batch of one",
    "by number",
    "by name",
    "backwards",
]


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("num_states", [LAYERS, LAYERS + 1])
@pytest.mark.parametrize("form", FORMS)
def test_what_held_the_layers_comes_back(
    tmp_path: Path, form: str, num_states: int, tensors: bool
) -> None:
    items = []
    for seed in range(2):
        item = trace(
            hidden_states=held(states(seed, layers=num_states), form),
            attentions=held(weights(seed), form),
        )
        items.append(with_torch(item) if tensors else item)
    target = converted(tmp_path, items)
    with h5traces.open(target, container="numpy") as archive:
        for seed, found in enumerate(archive):
            expected = states(seed, layers=num_states)
            for layer in range(LAYERS):
                offset = num_states - LAYERS
                np.testing.assert_array_equal(found.layer(layer), expected[layer + offset])
                np.testing.assert_array_equal(
                    found.layer(layer, "attentions"), weights(seed)[layer]
                )
            if num_states > LAYERS:
                np.testing.assert_array_equal(found.embedding, expected[0])
    with h5traces.open(target) as archive:
        for found, item in zip(archive, items, strict=True):
            assert_same(found.to_dict(), item)


def converted(folder: Path, items: list[dict[str, Any]], **options: Any) -> Path:
    source, target = folder / "batch.pkl", folder / "batch.h5"
    source.write_bytes(pickle.dumps(items))
    report = h5traces.convert(source, target, **grouped(**options))
    assert report.ok, report.files[0].error
    assert validate(target)[0].problems == []
    assert h5traces.verify(target, deep=True).ok
    return target


def test_states_with_the_tokens_outermost(tmp_path: Path) -> None:
    """As serving engines write them; tensors of bfloat16 keep their bits."""
    import torch

    stacked = torch.from_numpy(np.stack(states(0), axis=1)).bfloat16()
    target = converted(tmp_path, [trace(hidden_states=stacked)], dtype="auto")
    with h5traces.open(target) as archive:
        found = archive[0]
        assert torch.equal(found.layer(2), stacked[:, 2])
        assert_same(found.to_dict()["hidden_states"], stacked)


def test_one_vector_per_layer(tmp_path: Path) -> None:
    item = {"hidden_states": [each[-1] for each in states(0)], "num_layers": LAYERS}
    target = converted(tmp_path, [item])
    with h5traces.open(target) as archive:
        assert archive[0].layer(1).shape == (1, HIDDEN)
        assert_same(archive[0].to_dict(), item)


def test_a_dict_of_some_layers(tmp_path: Path) -> None:
    item = trace(
        hidden_states={5: states(0)[1], 0: states(0)[0]},
        attentions={0: weights(0)[0], 5: weights(0)[1]},
    )
    target = converted(tmp_path, [item])
    with h5traces.open(target) as archive:
        assert archive.layers == (0, 5)
        np.testing.assert_array_equal(archive[0].layer(5), states(0)[1])
        assert_same(archive[0].to_dict(), item)
        chosen = archive.select(layers=(5,))[0].to_dict()
        assert_same(chosen["hidden_states"], {5: states(0)[1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_states": [np.stack([each] * 4) for each in states(0)], "attentions": None},
            "field 'hidden_states': shape (4, 7, 8) is a batch of 4, expected one sequence",
        ),
        (
            {"hidden_states": np.zeros((3, LAYERS, TOKENS, HIDDEN), np.float16)},
            "shape (3, 4, 7, 8) is a batch of 3",
        ),
        (
            {"hidden_states": np.stack(states(0)), "tokens": None, "attentions": None},
            "fits (layer, token, hidden) and (token, layer, hidden)",
        ),
        (
            {"hidden_states": np.zeros((9, 9, HIDDEN), np.float16)},
            "shape (9, 9, 8) fits neither the number of layers nor that of tokens",
        ),
        (
            {"hidden_states": {"first": states(0)[0], "last": states(0)[1]}},
            "is a dict with the keys 'first', 'last'; expected one layer number per key",
        ),
        (
            {"hidden_states": dict(enumerate(states(0), 1))},
            "is a dict with the keys 1, 2, 3, 4; expected the layer numbers of the attentions",
        ),
        (
            {"attentions": {"embedding": weights(0)[0], **dict(enumerate(weights(0)))}},
            "is a dict with a key for the embedding, which has no attentions",
        ),
    ],
)
def test_shapes_that_fit_nothing_are_rejected(changes: dict[str, Any], message: str) -> None:
    assert message in rejected({**trace(), **changes})


def test_a_square_sample_is_read_as_those_before_it() -> None:
    """Where the number of layers is that of tokens, shapes alone cannot tell the axes."""
    established = Established()

    def stacked(tokens: int) -> dict[str, Any]:
        changes = {"hidden_states": np.stack(states(0, tokens=tokens), axis=1)}
        return trace(tokens=tokens, **changes)

    record(stacked(TOKENS), established=established)
    found = record(stacked(LAYERS), established=established)
    first = found.layered["hidden_states"].arrays[0].array.load().values
    np.testing.assert_array_equal(first, states(0, tokens=LAYERS)[0])
    assert "fits (layer, token, hidden) and (token, layer, hidden)" in rejected(stacked(LAYERS))


# --- generation steps -----------------------------------------------------------------------------


def generated(steps: int = 3, prompt: int = 4, beams: int = 1) -> dict[str, Any]:
    """What generate() returns: a tuple of steps, each a tuple of layers, the embedding first."""
    rng = np.random.default_rng(0)

    def step(number: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        rows, keys = (prompt if number == 0 else 1), prompt + number
        hidden = (rng.random((beams, rows, HIDDEN), np.float32) for _ in range(LAYERS + 1))
        seen = (rng.random((beams, HEADS, rows, keys), np.float32) for _ in range(LAYERS))
        return tuple(hidden), tuple(seen)

    made = [step(number) for number in range(steps)]
    return {
        "hidden_states": tuple(hidden for hidden, _ in made),
        "attentions": tuple(seen for _, seen in made),
        "tokens": np.arange(prompt + steps),
    }


@pytest.mark.parametrize("beams", [1, 3])
def test_steps_may_be_outermost(tmp_path: Path, beams: int) -> None:
    item = generated(beams=beams)
    found = record(item)
    assert names(found) == ["embedding", *BLOCKS]
    assert checks(found) == ["embedding-first", "steps-outermost"]
    target = converted(tmp_path, [item], dtype="float32")
    with h5traces.open(target) as archive:
        assert_same(archive[0].to_dict(), item)
        for step, (hidden, seen) in enumerate(
            zip(item["hidden_states"], item["attentions"], strict=True)
        ):
            np.testing.assert_array_equal(archive[0].layer(1)[step], hidden[2])
            np.testing.assert_array_equal(archive[0].layer(1, "attentions")[step], seen[1])
        some = archive.select(layers=(2,))[0].to_dict()
        assert_same(
            some["hidden_states"], tuple((hidden[0], hidden[3]) for hidden in item["hidden_states"])
        )


def test_one_prompt_token_and_states_alone_may_be_either() -> None:
    item = generated(prompt=1)
    del item["attentions"]
    assert "may be layers of steps or steps of layers" in rejected(item)
    item["num_layers"] = LAYERS
    assert names(record(item)) == ["embedding", *BLOCKS]


# --- lengths, other kinds, selection --------------------------------------------------------------


def test_one_state_less_than_tokens_is_said() -> None:
    found = record(
        {**trace(), "tokens": np.arange(TOKENS + 1), "tokens_decoded": ["x"] * (TOKENS + 1)}
    )
    assert "last-token-uncovered" in {each.check for each in sample_findings(found)}
    assert found.coverage() == "partial"


def test_attentions_alone_are_a_trace(tmp_path: Path) -> None:
    item = trace()
    del item["hidden_states"]
    target = converted(tmp_path, [item])
    with h5traces.open(target) as archive:
        assert archive.layers == tuple(range(LAYERS))
        assert_same(archive[0].to_dict(), item)


@pytest.mark.parametrize("absent", [None, (None,) * LAYERS, [None] * LAYERS])
def test_absent_attentions_come_back(tmp_path: Path, absent: Any) -> None:
    item = trace(attentions=absent)
    with h5traces.open(converted(tmp_path, [item])) as archive:
        assert_same(archive[0].to_dict(), item)
        assert_same(archive[0]["attentions"], absent)


# --- layers that are None, as hybrid models give attentions ---------------------------------------


def with_gaps(arrays: list[Any], kept: tuple[int, ...] = (1, 3)) -> list[Any]:
    return [each if number in kept else None for number, each in enumerate(arrays)]


HYBRIDS = {
    "list": lambda: trace(attentions=with_gaps(weights(0))),
    "tuple": lambda: trace(attentions=tuple(with_gaps(weights(0)))),
    "dict": lambda: trace(attentions=dict(enumerate(with_gaps(weights(0))))),
    "batch of one": lambda: trace(
        attentions=with_gaps([each[None] for each in weights(0)]),
        hidden_states=[each[None] for each in states(0)],
    ),
    "embedding": lambda: trace(
        attentions=with_gaps(weights(0)), hidden_states=states(0, layers=LAYERS + 1)
    ),
    "states, too": lambda: trace(
        attentions=with_gaps(weights(0)),
        hidden_states=with_gaps(states(0, layers=LAYERS + 1), (2, 4)),
    ),
    "positions": lambda: trace(attentions=None, hidden_states=with_gaps(states(0))),
    "steps": lambda: trace(
        attentions=[with_gaps([[each, each[:, :1]] for each in weights(0)])[n] for n in range(4)],
        hidden_states=[[each, each[:1]] for each in states(0)],
    ),
    "steps outermost": lambda: trace(
        attentions=tuple(tuple(with_gaps([w[:, :n] for w in weights(0)])) for n in (TOKENS, 1)),
        hidden_states=tuple(tuple(s[:n] for s in states(0)) for n in (TOKENS, 1)),
    ),
}


@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_layers_that_are_none_come_back(tmp_path: Path, name: str) -> None:
    item = HYBRIDS[name]()
    target = converted(tmp_path, [item, item])
    assert not validate(target)[0].problems
    assert not h5traces.verify(target, against=tmp_path / "batch.pkl")[0].problems
    kind = "hidden_states" if name == "positions" else "attentions"
    with h5traces.open(target) as archive:
        assert_same(archive[1].to_dict(), item)
        assert archive[0][kind].layers == (0, 1, 2, 3)
        assert archive[0][kind][2] is None
        assert "None" in archive[0][kind]._repr_html_()
        assert kind in archive[0]._repr_html_()
        assert archive[0].layer(3, kind) is not None
        with pytest.raises(
            LayerIndexError, match=r"layer 0 of \w+ is not stored; stored: \[1, 3\]"
        ):
            archive[0].layer(0, kind)
        chosen = list(archive.layers[:2])
        (read,) = archive.read(1, layers=chosen)
        assert [each is None for each in read[kind]] == [each in (0, 2) for each in chosen]
        # Selected, and copied, as a part of the list.
        expected = archive.select(layers=chosen)[0].to_dict()
    part = tmp_path / "part.h5"
    h5traces.repack(target, part, layers=chosen)
    assert not validate(part)[0].problems
    with h5traces.open(part) as archive:
        assert_same(archive[0].to_dict(), expected)
        assert archive[0][kind].layers == tuple(chosen)


def test_layers_that_are_none_are_said() -> None:
    found = record(HYBRIDS["tuple"]())
    assert (names(found, "attentions"), names(found)) == (BLOCKS[1::2], BLOCKS)
    places = [each.place for each in found.findings if each.check == "layers-absent"]
    assert places == ["attentions/layer_000", "attentions/layer_002"]


EXPORTS = {"pkl": "pickle", "pt": "torch"}


@pytest.mark.parametrize("suffix", ["npz", "parquet", "pkl", "pt", "safetensors"])
def test_layers_that_are_none_are_exported(tmp_path: Path, suffix: str) -> None:
    item = HYBRIDS["tuple"]()
    target = converted(tmp_path, [item])
    one_each = suffix in ("npz", "safetensors")
    place = tmp_path / "out" if one_each else tmp_path / f"out.{suffix}"
    if one_each:
        place.mkdir()
    made = h5traces.export(target, place, to=EXPORTS.get(suffix, suffix))  # type: ignore[arg-type]
    again = tmp_path / "again.h5"
    (made,) = made.iterdir() if one_each else [made]
    assert h5traces.convert(made, again, **grouped(dtype="auto")).ok
    with h5traces.open(again) as archive:
        for layer in (1, 3):
            found = np.asarray(archive[0].layer(layer, "attentions"))
            np.testing.assert_array_equal(found, item["attentions"][layer])


@pytest.mark.parametrize("tier", ["analysis", "compact"])
def test_layers_that_are_none_survive_tiers(tmp_path: Path, tier: str) -> None:
    target, small = converted(tmp_path, [HYBRIDS["tuple"]()] * 2), tmp_path / "small.h5"
    h5traces.repack(target, small, precision=tier)  # type: ignore[arg-type]
    assert not validate(small)[0].problems
    kind = "attentions" if tier == "analysis" else "attention_mean"
    with h5traces.open(small) as archive:
        assert [each is None for each in archive[1][kind]] == [True, False, True, False]


def further() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "mlp_outputs": [rng.random((TOKENS, 20)) for _ in range(LAYERS)],
        "heads": tuple(rng.random((HEADS, TOKENS, 5), np.float32) for _ in range(LAYERS)),
        "entropy": np.stack([rng.random(TOKENS, np.float32) for _ in range(LAYERS)]),
        "per_layer": {f"layer_{n}": rng.random((TOKENS, 3)) for n in range(LAYERS)},
    }


def test_further_kinds_describe_themselves(tmp_path: Path) -> None:
    items = [trace(seed, **further()) for seed in range(2)]
    target = converted(tmp_path, items)
    expected = {
        "mlp_outputs": '["token","channel"]',
        "heads": '["head","token","channel"]',
        "entropy": '["token"]',
        "per_layer": '["token","channel"]',
    }
    with h5traces.open(target) as archive:
        kinds = archive[0]._stored.kinds
        assert {name: kinds[name]["axes"] for name in expected} == expected
        # Their values are stored as they are, whatever the stored type of the known kinds.
        assert_same(archive[0].to_dict(), items[0])
        np.testing.assert_array_equal(archive[1].layer(2, "heads"), items[1]["heads"][2])
        found = archive.read([0, 1], kinds="mlp_outputs", layers=[3])
        np.testing.assert_array_equal(found[0]["mlp_outputs"][0], items[0]["mlp_outputs"][3])


@pytest.mark.parametrize("tier", ["fine", "compact"])
def test_further_kinds_survive_repacking_and_tiers(tmp_path: Path, tier: str) -> None:
    source = converted(tmp_path, [trace(seed, **further()) for seed in range(2)])
    for name, options in (
        ("some", {"layers": (1, 3)}),
        ("tier", {"precision": tier}),
    ):
        target = tmp_path / f"{name}.h5"
        h5traces.repack(source, target, **options)
        assert validate(target)[0].problems == []
        with h5traces.open(target) as archive:
            for layer in (1, 3):
                np.testing.assert_array_equal(
                    archive[0].layer(layer, "heads"), further()["heads"][layer]
                )


@pytest.mark.parametrize(
    "value",
    [
        [np.zeros((TOKENS, 3), np.int64)] * LAYERS,
        [np.zeros((3, 3))] * LAYERS,
        [np.zeros((TOKENS, TOKENS))] * LAYERS,
        [np.zeros((TOKENS, 3))] * (LAYERS - 1),
        [np.zeros((TOKENS, 3)), np.zeros((TOKENS, 3), np.float32)] * 2,
        np.zeros((TOKENS, 50)),
        ["a"] * LAYERS,
    ],
)
def test_what_is_not_clearly_layered_stays_a_field(value: Any) -> None:
    found = record(trace(thing=value))
    assert list(found.layered) == ["hidden_states", "attentions"]
    assert found.extra["thing"] is value


def test_layers_are_blocks_where_they_are_known_else_positions(tmp_path: Path) -> None:
    more = trace(hidden_states=states(0, layers=LAYERS + 1))
    assert names(record(more, layers=(1, 3))) == ["embedding", BLOCKS[1], BLOCKS[3]]
    alone = trace(attentions=None)
    assert names(record(alone, layers=(1, 3))) == [POSITIONS[1], POSITIONS[3]]
    assert "layer 9 was asked for, but there are 4 layers (0 to 3)" in rejected(more, layers=(9,))
    target = converted(tmp_path, [alone])
    with h5traces.open(target) as archive:
        assert archive.metadata.num_layers is None
        assert archive.layers == tuple(range(LAYERS))
        np.testing.assert_array_equal(archive[0].layer(2), states(0)[2])
        assert archive.select(layers=(2,))[0]["hidden_states"].layers == (2,)
        with pytest.raises(LayerIndexError):
            archive[0].layer(7)


def test_samples_that_contradict_each_other_name_the_option(tmp_path: Path) -> None:
    source = tmp_path / "batch.pkl"
    items = [trace(attentions=None), trace(1)]
    source.write_bytes(pickle.dumps(items))
    report = h5traces.convert(source, tmp_path / "a.h5")
    assert "hidden_states has layers [0, 1, 2, 3]" in str(report.files[0].error)
    assert "pass first_state, which says what the first entry is" in str(report.files[0].error)
    reading = ReadingOptions(first_state="block")
    assert h5traces.convert(source, tmp_path / "b.h5", reading=reading).ok


def test_a_writer_takes_what_a_converter_takes(tmp_path: Path) -> None:
    items = [
        trace(hidden_states=np.stack(states(seed, layers=LAYERS + 1)), **further())
        for seed in range(2)
    ]
    with h5traces.create(tmp_path / "run.h5") as writer:
        for item in items:
            writer.append(item)
    with h5traces.open(tmp_path / "run.h5") as archive:
        for found, item in zip(archive, items, strict=True):
            assert_same(found.to_dict(), item)
        np.testing.assert_array_equal(archive[0].embedding, states(0, layers=LAYERS + 1)[0])


def test_gaps_in_a_dict_claim_no_number_of_layers(tmp_path: Path) -> None:
    source, target = tmp_path / "some.pkl", tmp_path / "some.h5"
    item = trace()
    for kind, arrays in (("hidden_states", states(0)), ("attentions", weights(0))):
        item[kind] = dict(zip((0, 5, 10), arrays[:3], strict=True))
    source.write_bytes(pickle.dumps([item]))
    h5traces.convert(source, target)
    with h5traces.open(target) as archive:
        assert archive.layers == (0, 5, 10)
        assert archive.metadata.num_layers is None
    assert not validate(target)[0].problems


@pytest.mark.filterwarnings("ignore")
def test_positions_are_called_positions_in_reports(tmp_path: Path) -> None:
    source, target = tmp_path / "states.pkl", tmp_path / "states.h5"
    item = trace()
    del item["attentions"]
    source.write_bytes(pickle.dumps([item]))
    h5traces.convert(source, target)
    assert h5traces.inspect(source)[0].by_position
    assert h5traces.inspect(target)[0].by_position


# --- names that come later ------------------------------------------------------------------------

ALONE = {
    "list": lambda: trace(attentions=None),
    "tuple": lambda: trace(attentions=None, hidden_states=tuple(states(0))),
    "stacked": lambda: trace(attentions=None, hidden_states=np.stack(states(0))),
    "dict": lambda: trace(attentions=None, hidden_states=dict(enumerate(states(0)))),
    "gaps": lambda: trace(attentions=None, hidden_states=with_gaps(states(0))),
    "steps": lambda: trace(
        attentions=None, num_layers=9, hidden_states=[[each, each[:1]] for each in states(0)]
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ALONE))
@pytest.mark.parametrize("first", ["embedding", "block"])
def test_positions_become_what_a_conversion_makes(tmp_path: Path, name: str, first: Any) -> None:
    items = [ALONE[name]()] * 2
    source = tmp_path / "batch.pkl"
    before, named, expected = (tmp_path / f"{each}.h5" for each in ("before", "named", "expected"))
    source.write_bytes(pickle.dumps(items))
    assert h5traces.convert(source, before, **grouped(dtype="auto")).ok
    reading = ReadingOptions(first_state=first)
    h5traces.repack(before, named, first_state=first)
    assert h5traces.convert(source, expected, **grouped(dtype="auto"), reading=reading).ok
    assert not validate(named)[0].problems
    assert not h5traces.verify(named, against=source)[0].problems
    with h5traces.open(named) as found, h5traces.open(expected) as wanted:
        for one, other, item in zip(found, wanted, items, strict=True):
            assert_same(one.to_dict(), item)
            assert one._stored.objects.keys() == other._stored.objects.keys()
            first_site = "embedding" if first == "embedding" else None
            assert set(one["hidden_states"].sites) <= {first_site, None}
        assert found.layers == wanted.layers


@pytest.mark.filterwarnings("ignore")
def test_some_positions_take_names(tmp_path: Path) -> None:
    source = tmp_path / "batch.pkl"
    source.write_bytes(pickle.dumps([ALONE["list"]()]))
    h5traces.convert(source, tmp_path / "whole.h5")
    h5traces.repack(tmp_path / "whole.h5", tmp_path / "repacked.h5", layers=[0, 2])
    h5traces.convert(source, tmp_path / "converted.h5", layers=[0, 2])
    for name in ("repacked", "converted"):
        assert not h5traces.verify(tmp_path / f"{name}.h5", against=source)[0].problems
        named = tmp_path / f"{name}-named.h5"
        h5traces.repack(tmp_path / f"{name}.h5", named, first_state="embedding")
        with h5traces.open(named) as archive:
            assert archive[0]["hidden_states"].layers == (None, 1)


@pytest.mark.filterwarnings("ignore")
def test_only_positions_take_names(tmp_path: Path) -> None:
    target = converted(tmp_path, [trace()])
    other = tmp_path / "other.h5"
    with pytest.raises(
        OptionError, match=r"stored by position, and there are blocks; leave it out"
    ):
        h5traces.repack(target, other, first_state="block")
    for options in ({"layers": [0]}, {"precision": "compact"}):
        with pytest.raises(OptionError, match=r"first_state comes without layers and precision"):
            h5traces.repack(target, other, first_state="block", **options)
    assert not other.exists()


@pytest.mark.filterwarnings("ignore")
def test_other_positions_are_another_archive(tmp_path: Path) -> None:
    source, target = tmp_path / "batch.pkl", tmp_path / "batch.h5"
    source.write_bytes(pickle.dumps([ALONE["list"]()]))
    assert h5traces.convert(source, target, layers=[0, 1]).ok
    kept = h5traces.convert(source, target, layers=[0, 1], **grouped(skip_existing=True))
    assert kept.files[0].status == "skipped"
    for layers in ([0, 2], None):
        report = h5traces.convert(source, target, layers=layers, **grouped(skip_existing=True))
        assert "it was written with layers=[0, 1]" in str(report.files[0].error)
