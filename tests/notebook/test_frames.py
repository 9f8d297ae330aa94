"""Archives as tables and labelled arrays, for pandas, DuckDB, polars and xarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr

import h5traces
from h5traces.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HEADS, HIDDEN = 3, 2, 4
TEXTS = ("question", "generated_text", "generated_answer", "generated_answer_clean")


def item(number: int, length: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    states = [rng.standard_normal((length, HIDDEN)).astype("f4") for _ in range(LAYERS)]
    weights = np.tril(rng.random((HEADS, length, length))) + 1e-3 * np.eye(length)
    weights = (weights / weights.sum(-1, keepdims=True)).astype("f2")
    return {
        "question_id": f"q{number}",
        "question": f"Question {number}?",
        "hidden_states": states,
        "attentions": [weights] * LAYERS,
        "tokens": list(range(length)),
        "tokens_decoded": [f"t{each}" for each in range(length)],
        **more,
    }


@pytest.fixture
def archive(tmp_path: Path) -> h5traces.Archive:
    path = tmp_path / "run.h5"
    with h5traces.create(path, precision=h5traces.PrecisionOptions(dtype="auto")) as writer:
        writer.append(item(0, 3, label=1, prompt_length=2))
        writer.append(item(1, 5, label=0))
        writer.append(item(2, 4, generated_answer="\ud800 lone"))
    return h5traces.open(path)


def test_one_row_per_sample(archive: h5traces.Archive) -> None:
    table = archive.to_pandas()
    assert table["sample_id"].tolist() == ["q0", "q1", "q2"]
    assert table["seq_len"].tolist() == [3, 5, 4]
    assert table["label"].tolist()[:2] == [1, 0]
    assert table["label"].isna().tolist() == [False, False, True]
    assert str(table["label"].dtype) == str(table["prompt_len"].dtype) == "Int64"
    assert table["question"].tolist() == ["Question 0?", "Question 1?", "Question 2?"]
    assert table["generated_answer"].tolist() == [None, None, "\ud800 lone"]
    assert table["position_in_file"].tolist() == [0, 1, 2]
    assert table.loc[1, "path"] == str(archive.paths[0])


def test_a_view_keeps_its_order_and_ordinals(archive: h5traces.Archive) -> None:
    table = archive[::-1].to_pandas(["sample_id", "seq_len", "ordinal"])
    assert list(table.columns) == ["sample_id", "seq_len", "ordinal"]
    assert table["sample_id"].tolist() == ["q2", "q1", "q0"]
    assert [archive[each]["question_id"] for each in (2, 1, 0)] == ["q2", "q1", "q0"]


def test_arrow_has_types_of_its_columns(archive: h5traces.Archive) -> None:
    pa = pytest.importorskip("pyarrow")
    table = archive.to_arrow()
    assert table.schema.field("label").type == pa.int64()
    assert table["label"].to_pylist() == [1, 0, None]
    assert table["generated_answer"].to_pylist() == [None, None, "? lone"]
    assert table["generated_text"].type == pa.large_string()


def test_norms_are_those_of_the_states(archive: h5traces.Archive) -> None:
    table = archive.to_arrow(["sample_id", "hidden_norms"])
    for trace, norms in zip(archive, table["hidden_norms"].to_pylist(), strict=True):
        expected = [np.linalg.norm(each, axis=1).mean() for each in trace["hidden_states"]]
        np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_an_unknown_column_is_an_error(archive: h5traces.Archive) -> None:
    with pytest.raises(OptionError, match=r"column 'labels' is unknown; there are ordinal, path"):
        archive.to_pandas("labels")


def test_scores_beside_the_archive_are_columns(archive: h5traces.Archive, tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("question_id,bleurt\nq0,0.25\nq2,0.5\n")
    options = h5traces.LabelOptions(score_column="bleurt", scores_only=True)
    h5traces.label(archive.paths[0], tmp_path / "scores.csv", options=options, partial=True)
    table = h5traces.open(archive.paths[0]).to_pandas()
    np.testing.assert_array_equal(table["score_bleurt"], [0.25, np.nan, 0.5])


def test_a_trace_has_named_axes_and_tokens(archive: h5traces.Archive) -> None:
    found = archive[0].to_xarray()
    assert found["hidden_states"].dims == ("layer", "token", "hidden")
    assert found["attentions"].dims == ("layer", "head", "query", "key")
    assert found["layer"].to_numpy().tolist() == [0, 1, 2]
    assert found["token_text"].to_numpy().tolist() == ["t0", "t1", "t2"]
    assert found["key_text"].to_numpy().tolist() == ["t0", "t1", "t2"]
    assert found["token_id"].to_numpy().tolist() == [0, 1, 2]
    assert found["is_prompt"].to_numpy().tolist() == [True, True, False]
    assert found.attrs["sample_id"] == "q0"
    for kind in ("hidden_states", "attentions"):
        np.testing.assert_array_equal(found[kind], np.stack(archive[0][kind]))


@pytest.mark.parametrize(
    "key",
    [
        (1,),
        (slice(None), 0),
        ([2, 0], slice(1, None), [3, 1]),
        (slice(2, 2), 1),
        (-1, -1, -1),
        (slice(None, None, -1), slice(None), 2),
        ([], [0]),
    ],
    ids=str,
)
def test_selections_are_those_of_numpy(archive: h5traces.Archive, key: tuple[Any, ...]) -> None:
    whole = xr.DataArray(np.stack(archive[1]["hidden_states"]), dims=("layer", "token", "hidden"))
    found = archive[1].to_xarray("hidden_states")["hidden_states"]
    np.testing.assert_array_equal(found[key].to_numpy(), whole[key].to_numpy())


def test_only_what_is_used_is_read(
    archive: h5traces.Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    from h5traces.archive.stored_trace import StoredTrace

    read: list[tuple[int, str]] = []
    original = StoredTrace.read_layer

    def noted(self: StoredTrace, kind: str, name: str, *options: Any) -> Any:
        read.append((self.index, f"{kind}/{name}"))
        return original(self, kind, name, *options)

    monkeypatch.setattr(StoredTrace, "read_layer", noted)
    found = archive.to_xarray()
    assert not read
    found["hidden_states"].sel(layer=1).isel(sample=2).load()
    assert read == [(2, "hidden_states/layer_001")]


def test_samples_are_padded_with_nan(archive: h5traces.Archive) -> None:
    found = archive.to_xarray("hidden_states", layers=[0, 2])
    assert found["hidden_states"].dims == ("sample", "layer", "token", "hidden")
    assert found["hidden_states"].shape == (3, 2, 5, HIDDEN)
    assert found["seq_len"].to_numpy().tolist() == [3, 5, 4]
    assert found["sample_id"].to_numpy().tolist() == ["q0", "q1", "q2"]
    np.testing.assert_array_equal(found["label"], [1, 0, np.nan])
    for number, trace in enumerate(archive):
        length = len(trace["tokens"])
        values = found["hidden_states"][number].to_numpy()
        assert np.isnan(values[:, length:]).all()
        np.testing.assert_array_equal(
            values[:, :length], [trace["hidden_states"][0], trace["hidden_states"][2]]
        )
    by_token = found["hidden_states"].isel(token=-1, sample=[1, 0]).to_numpy()
    np.testing.assert_array_equal(by_token[0, 1], archive[1]["hidden_states"][2][-1])
    assert np.isnan(by_token[1]).all()


def test_layers_that_a_kind_lacks_are_nan(tmp_path: Path) -> None:
    """The list of states begins with the embedding, which has no attentions."""
    one = item(0, 3)
    one["hidden_states"] = [np.full((3, HIDDEN), 9, "f4"), *one["hidden_states"]]
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(one)
    found = h5traces.open(tmp_path / "run.h5")[0].to_xarray()
    assert found["layer"].to_numpy().tolist() == [-1, 0, 1, 2]
    assert (found["hidden_states"].sel(layer=-1) == 9).all()
    assert found["attentions"].sel(layer=-1).isnull().all()
    np.testing.assert_array_equal(found["attentions"].sel(layer=0), one["attentions"][0])


def test_generation_steps_fit_no_array(tmp_path: Path) -> None:
    steps = [np.ones((1, each, HIDDEN), "f4") for each in (3, 1)]
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append({"question_id": "a", "hidden_states": [steps] * LAYERS})
    with pytest.raises(OptionError, match="generation steps"):
        h5traces.open(tmp_path / "run.h5")[0].to_xarray("hidden_states")
