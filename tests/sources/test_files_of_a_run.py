"""Files of one run tell each other what they do not say themselves."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import h5traces
from h5traces.errors import ConversionError
from h5traces.sources.opening import run_stem

if TYPE_CHECKING:
    from pathlib import Path

AUTO = h5traces.PrecisionOptions(dtype="auto")
BLOCKS, HIDDEN = 4, 8


def request(folder: Path, name: str, tokens: int, axes: str = "tlh") -> torch.Tensor:
    """One request of an engine: 4 layers."""
    rng = np.random.default_rng(tokens)
    states = torch.from_numpy(rng.normal(size=(tokens, BLOCKS, HIDDEN)).astype(np.float32))
    if axes == "lth":
        states = states.transpose(0, 1).contiguous()
    ids = torch.arange(tokens) + 1
    save_file({"hidden_states": states, "token_ids": ids}, folder / f"{name}.safetensors")
    return states


def sample(tokens: int, *, states: int = BLOCKS + 1, attentions: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    found: dict[str, Any] = {
        "question_id": f"q{tokens}",
        "hidden_states": [
            rng.normal(size=(tokens, HIDDEN)).astype(np.float32) for _ in range(states)
        ],
        "tokens": np.arange(tokens),
    }
    if attentions:
        weights = np.tril(np.ones((2, tokens, tokens), np.float32))
        found["attentions"] = [weights / weights.sum(-1, keepdims=True)] * BLOCKS
    return found


def dump(path: Path, *samples: dict[str, Any]) -> Path:
    path.write_bytes(pickle.dumps(list(samples)))
    return path


def out_of(tmp_path: Path) -> Path:
    """The folder of the archives."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return out


def first_layer(path: Path) -> Any:
    with h5traces.open(path) as archive:
        return next(iter(archive[0]["hidden_states"].layers))


def checks_of(report: Any) -> set[str]:
    return {each.check for file in report.files for each in file.findings}


@pytest.mark.parametrize("axes", ["tlh", "lth"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_as_many_layers_as_tokens(tmp_path: Path, axes: str, merge: bool, workers: int) -> None:
    lengths = (
        {"r1": 7, "r2": BLOCKS, "r3": 6} if axes == "tlh" else {"r1": BLOCKS, "r2": 7, "r3": 6}
    )
    folder = tmp_path / "run"
    folder.mkdir()
    expected = {name: request(folder, name, length, axes) for name, length in lengths.items()}
    target = tmp_path / ("run.h5") if merge else out_of(tmp_path)
    options = h5traces.TargetOptions(workers=workers)
    report = h5traces.convert(folder, target, merge=merge, precision=AUTO, target=options)
    assert report.ok, report
    with h5traces.open(target) as archive:
        for trace in archive:
            name = trace.metadata.sample_id
            assert torch.equal(trace.to_dict()["hidden_states"], expected[name])
            stored = trace._stored.children("hidden_states")
            assert len([each for each in stored if each.startswith("position")]) == BLOCKS
            assert trace._stored.typed_layer("hidden_states", "position_003").shape == (
                lengths[name],
                HIDDEN,
            )
    archives = [target] if merge else [target / f"{name}.h5" for name in lengths]
    for index, name in enumerate(lengths):
        archive = archives[0 if merge else index]
        assert h5traces.verify(archive, against=folder / f"{name}.safetensors")[0].ok
    assert len(h5traces.inspect(folder)) == 3
    kept = h5traces.convert(
        folder,
        target,
        merge=merge,
        precision=AUTO,
        target=h5traces.TargetOptions(skip_existing=True),
    )
    assert {each.status for each in kept.files} == {"skipped"}


def test_states_alone_have_as_many_layers_as_their_siblings(tmp_path: Path) -> None:
    dump(tmp_path / "batch_0.pkl", sample(5, states=BLOCKS))
    stacked = np.stack(sample(7)["hidden_states"][:BLOCKS])
    np.savez(tmp_path / "batch_1.npz", hidden_states=stacked)
    report = h5traces.convert(tmp_path, out_of(tmp_path), precision=AUTO)
    assert report.ok
    with h5traces.open(tmp_path / "out" / "batch_1.h5") as archive:
        assert archive[0]["hidden_states"].layers == tuple(range(BLOCKS))
        np.testing.assert_array_equal(archive[0].layer(2), stacked[2])


def test_a_request_alone_is_ambiguous(tmp_path: Path) -> None:
    request(tmp_path, "a", BLOCKS)
    with pytest.raises(ConversionError, match=r"fits .* and .*mapping"):
        h5traces.convert(tmp_path, tmp_path / "a.h5", merge=True).raise_for_errors()


@pytest.mark.parametrize("name", ["batch_0.pkl", "batch_2.pkl"])
@pytest.mark.parametrize("workers", [1, 2])
def test_states_follow_those_with_attentions(tmp_path: Path, name: str, workers: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dump(folder / "batch_1.pkl", sample(5))
    dump(folder / name, sample(6, attentions=False))
    options = h5traces.TargetOptions(workers=workers)
    report = h5traces.convert(folder, out_of(tmp_path), precision=AUTO, target=options)
    assert report.ok
    assert checks_of(report) >= {"embedding-first"}
    assert "first-state-unknown" not in checks_of(report)
    (told,) = [
        each.message
        for file in report.files
        for each in file.findings
        if "other samples of the run" in each.message
    ]
    assert told
    target = (out_of(tmp_path) / name).with_suffix(".h5")
    (trace,) = h5traces.open(target)
    assert list(trace["hidden_states"].layers) == [None, 0, 1, 2, 3]
    assert h5traces.verify(target, against=folder / name)[0].ok
    # Alone, it is kept by the archive that the run made, and else stays unknown.
    again = h5traces.convert(
        folder / name, target, precision=AUTO, target=h5traces.TargetOptions(skip_existing=True)
    )
    assert again.files[0].status == "skipped"
    alone = h5traces.convert(folder / name, tmp_path / "alone.h5")
    assert "first-state-unknown" in checks_of(alone)


def test_models_and_folders_are_runs_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dump(folder / "one_triviaqa_batch_0000.pkl", sample(5))
    dump(folder / "two_triviaqa_batch_0000.pkl", sample(6, attentions=False))
    (tmp_path / "run" / "other").mkdir()
    dump(folder / "other" / "one_triviaqa_batch_0001.pkl", sample(7, attentions=False))
    report = h5traces.convert(folder, out_of(tmp_path))
    unknown = [
        file.sources[0].rpartition("/")[2]
        for file in report.files
        if any(each.check == "first-state-unknown" for each in file.findings)
    ]
    assert sorted(unknown) == ["one_triviaqa_batch_0001.pkl", "two_triviaqa_batch_0000.pkl"]


def test_files_of_different_names_are_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dump(folder / "with_attentions.pkl", sample(5))
    dump(folder / "without_attentions.pkl", sample(6, attentions=False))
    report = h5traces.convert(folder, out_of(tmp_path))
    assert checks_of(report) >= {"embedding-first", "first-state-unknown"}
    with h5traces.open(out_of(tmp_path) / "without_attentions.h5") as archive:
        assert "position_000" in archive[0]._stored.children("hidden_states")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("run_batch_0003.pkl.gz", "run_batch_#"),
        ("cmpl-0a1b2c3d-4e5f.safetensors", "cmpl-#"),
        ("deadbeef.pt", "deadbeef"),
        ("layer3_v2.pt", "layer#_v#"),
        ("states.pt", "states"),
    ],
)
def test_names_of_a_run(name: str, stem: str) -> None:
    assert run_stem(name) == stem


def test_files_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dump(folder / "r1.pkl", sample(5))
    with_five = sample(6, states=BLOCKS + 1)
    with_five["attentions"] = [*with_five["attentions"], with_five["attentions"][0]]
    dump(folder / "r2.pkl", with_five)
    report = h5traces.convert(folder, out_of(tmp_path))
    (told,) = [
        each.message
        for file in report.files
        for each in file.findings
        if each.check == "unlike-earlier"
    ]
    assert "the first is the block, and the embedding in earlier samples" in told
    # Each is stored as it says itself.
    assert first_layer(out_of(tmp_path) / "r1.h5") is None
    assert first_layer(out_of(tmp_path) / "r2.h5") == 0


def test_other_axes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    request(folder, "cmpl-1f3a9c77", 7)
    expected = request(folder, "cmpl-20bb41de", 6, "lth")
    report = h5traces.convert(folder, tmp_path / "run.h5", merge=True, precision=AUTO)
    assert "unlike-earlier" in checks_of(report)
    with h5traces.open(tmp_path / "run.h5") as archive:
        assert torch.equal(archive[1].to_dict()["hidden_states"], expected)


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        [],
        {"first_states": [], "axes": 3},
        {"first_states": {"x": "block", "9" * 9: "block", "3": "tail"}, "axes": {"k": [1]}},
        {"first_states": {str(i): "block" for i in range(100)}},
    ],
)
def test_facts_that_are_none_are_left_out(recorded: Any) -> None:
    from h5traces.meaning.options import RunFacts

    assert not RunFacts.from_dict(recorded)
