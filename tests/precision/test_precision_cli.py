"""Precision on the command line: options, the one warning of loss, and messages that help."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
from commands import run
from legacy_batches import make_batch, write_batch, write_layout

import h5traces
from h5traces.format.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path


LOSS = "hold less than their sources"


def plain(text: str) -> str:
    """What is printed, without the breaks and frames of lines."""
    return re.sub(r"[\s│]+", " ", text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_layout(tmp_path, "full_pkl")


@pytest.fixture
def exact(source: Path) -> Path:
    target = source.with_name("exact.h5")
    h5traces.convert(source, target)
    return target


def precision_of(path: Path) -> Precision | None:
    return h5traces.open(path).metadata.precision


@pytest.mark.parametrize("tier", ["fine", "analysis", "compact", "native"])
def test_converting_to_a_tier_says_once_what_is_lost(
    source: Path, tmp_path: Path, tier: str
) -> None:
    found = run("convert", source, "-o", tmp_path / "out.h5", "--tier", tier)
    assert plain(found.stderr).count(LOSS) == 1
    assert LOSS not in found.stdout
    assert tier in plain(found.stderr)
    assert precision_of(tmp_path / "out.h5") == Precision.of(tier)  # type: ignore[arg-type]


def test_many_batches_are_one_warning(tmp_path: Path) -> None:
    for number in range(3):
        write_batch(tmp_path / "in" / f"m_d_batch_{number:04d}.pkl", make_batch("full_pkl"))
    found = run("convert", tmp_path / "in", "-o", f"{tmp_path}/out/", "--tier", "compact")
    assert plain(found.stderr).count(LOSS) == 1
    assert len(list((tmp_path / "out").glob("*.h5"))) == 3


@pytest.mark.parametrize("options", [[], ["--tier", "exact"]])
def test_exact_says_nothing(source: Path, tmp_path: Path, options: list[str]) -> None:
    found = run("convert", source, "-o", tmp_path / "out.h5", *options)
    assert LOSS not in plain(found.stderr)
    assert precision_of(tmp_path / "out.h5") is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--step", "0.3"], Precision(step=0.3)),
        (["--attention-bits", "8"], Precision(attention_bits=8)),
        (["--head-mean", "beside"], Precision(head_mean="beside")),
        (["--head-mean", "only"], Precision(head_mean="only")),
        (["--mantissa-bits", "3"], Precision(mantissa_bits=3)),
        (
            ["--step", "0.05", "--attention-bits", "8", "--head-mean", "beside"],
            Precision(step=0.05, attention_bits=8, head_mean="beside"),
        ),
        (
            ["--tier", "fine", "--step", "0.04"],
            Precision(step=0.04, attention_bits=8, head_mean="beside"),
        ),
        (
            ["--tier", "compact", "--attention-bits", "8"],
            Precision(step=0.4, attention_bits=8, head_mean="beside"),
        ),
        (["--tier", "analysis", "--head-mean", "only"], Precision(step=0.1, head_mean="only")),
        (["--tier", "fine", "--step", "0.1"], Precision.of("analysis")),
    ],
)
@pytest.mark.parametrize("command", ["convert", "repack"])
def test_parameters_by_themselves_and_with_a_tier(
    source: Path, tmp_path: Path, command: str, options: list[str], expected: Precision
) -> None:
    if command == "repack":
        run("convert", source, "-o", tmp_path / "exact.h5")
        source = tmp_path / "exact.h5"
    found = run(command, source, "-o", tmp_path / "out.h5", *options)
    assert plain(found.stderr).count(LOSS) == expected.is_lossy
    assert precision_of(tmp_path / "out.h5") == expected
    assert h5traces.validate(tmp_path / "out.h5").ok
    run("verify", tmp_path / "out.h5", "--deep")


def test_inspect_shows_the_precision(source: Path, tmp_path: Path) -> None:
    for tier, words in [
        ("exact", "precision: exact"),
        ("fine", "precision: fine (hidden states in steps of 0.02 sigma, attentions in 8 bits"),
        ("compact", "head mean only) lossless: no (compact"),
        ("native", "5 mantissa bits) lossless: no (native"),
    ]:
        run("convert", source, "-o", tmp_path / f"{tier}.h5", "--tier", tier)
        assert words in plain(run("inspect", tmp_path / f"{tier}.h5").stdout)
        found = json.loads(run("inspect", tmp_path / f"{tier}.h5", "--json").stdout)
        assert ("compact" in json.dumps(found)) == (tier == "compact")
    twice = tmp_path / "twice.h5"
    run("repack", tmp_path / "fine.h5", "-o", twice, "--tier", "compact")
    shown = plain(run("inspect", twice).stdout)
    assert re.search(r"precision: fine \(.*then compact \(.*lossless: no \(fine", shown)


# --- calibrate -------------------------------------------------------------------------------


def test_calibrating_and_using_what_came_of_it(source: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales.h5"
    found = run("calibrate", source, "-o", scales)
    assert re.search(
        r"wrote .*scales\.h5: 3 layers, 8 channels, measured on \d+ tokens of 6 samples",
        plain(found.stdout),
    )
    # One sample holds NaN and Inf.
    assert "1 tokens hold NaN or Inf" in plain(found.stderr)
    run("convert", source, "-o", tmp_path / "a.h5", "--tier", "fine", "--scales", scales)
    run("convert", source, "-o", tmp_path / "exact.h5")
    run(
        "repack",
        tmp_path / "exact.h5",
        "-o",
        tmp_path / "b.h5",
        "--tier",
        "fine",
        "--scales",
        tmp_path / "a.h5",
    )
    with h5py.File(tmp_path / "a.h5") as one, h5py.File(tmp_path / "b.h5") as other:
        path = "scales/hidden_states/layer_001/step"
        assert np.array_equal(one[path], other[path])
        path = "samples/00000005/hidden_states/layer_001"
        assert np.array_equal(one[path], other[path])


def test_calibrate_as_json_and_without_writing(source: Path, tmp_path: Path) -> None:
    found = run("calibrate", source, "-o", tmp_path / "s.h5", "--json", "--dry-run", "-n", 4)
    report = json.loads(found.stdout)
    assert report["num_samples"] == 4
    assert report["hidden_size"] == 8
    assert not (tmp_path / "s.h5").exists()
    assert "would write" in plain(
        run("calibrate", source, "-o", tmp_path / "s.h5", "--dry-run").stdout
    )
    some = json.loads(
        run("calibrate", source, "-o", tmp_path / "s.h5", "--layers", "0,2", "--json").stdout
    )
    assert some["layers"] == ["hidden_states/layer_000", "hidden_states/layer_002"]


def test_calibrate_overwrites_on_request_only(source: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales.h5"
    scales.write_bytes(b"mine")
    found = run("calibrate", source, "-o", scales, code=2)
    assert "--overwrite" in plain(found.stderr)
    assert scales.read_bytes() == b"mine"
    run("calibrate", source, "-o", scales, "--overwrite")
    assert scales.read_bytes() != b"mine"


def test_calibrate_without_anything_to_measure(tmp_path: Path) -> None:
    source = write_layout(tmp_path, "step_min")
    found = run("calibrate", source, "-o", tmp_path / "scales.h5", code=2)
    assert "nothing to measure" in plain(found.stderr)
    assert not (tmp_path / "scales.h5").exists()


# --- wrong usage -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head-mean", "only", "--attention-bits", "8"], "--head-mean beside, or leave"),
        (["--tier", "fine", "--head-mean", "only", "--attention-bits", "8"], "beside"),
        (["--tier", "best"], "exact"),
        (["--step", "0"], "step is 0.0: .*greater than or equal to 0.001"),
        (["--step", "9"], "step is 9.0: .*less than or equal to 4"),
        (["--step", "nan"], "step"),
        (["--attention-bits", "6"], "attention-bits is 6: input should be 8"),
        (["--mantissa-bits", "10"], "mantissa-bits is 10: .*less than or equal to 9"),
        (["--tier", "fine", "--dtype", "float32"], "float16, not float32; leave one"),
        (["--step", "0.1", "--dtype", "bfloat16"], "float16, not bfloat16; leave one"),
        (["--tier", "fine", "--scales", "nowhere.h5"], "nowhere.h5"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "repack"])
def test_bad_combinations_say_what_to_do(
    source: Path, exact: Path, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    given = source if command == "convert" else exact
    found = run(command, given, "-o", tmp_path / "out.h5", *options, code=2)
    assert re.search(message, plain(found.stderr)), found.stderr
    assert not (tmp_path / "out.h5").exists()


def test_scales_of_what_has_none(source: Path, exact: Path, tmp_path: Path) -> None:
    for command, given in (("convert", source), ("repack", exact)):
        found = run(
            command, given, "-o", tmp_path / "out.h5", "--tier", "fine", "--scales", exact, code=2
        )
        assert "holds no scales" in plain(found.stderr)
        assert "calibrate" in plain(found.stderr)


def test_an_archive_does_not_become_exact_again(source: Path, tmp_path: Path) -> None:
    run("convert", source, "-o", tmp_path / "fine.h5", "--tier", "fine")
    found = run(
        "repack", tmp_path / "fine.h5", "-o", tmp_path / "out.h5", "--tier", "exact", code=2
    )
    assert "what is lost cannot be restored" in plain(found.stderr)
    found = run("repack", tmp_path / "fine.h5", "-o", tmp_path / "out.h5", "--tier", "compact")
    assert plain(found.stderr).count("add up") == 1
    assert "Warning:" not in found.stderr
    assert ".py" not in found.stderr


def test_exporting_a_lossy_archive_warns(source: Path, tmp_path: Path) -> None:
    run("convert", source, "-o", tmp_path / "fine.h5", "--tier", "fine")
    found = run("export", tmp_path / "fine.h5", "-o", tmp_path / "out.pkl")
    assert plain(found.stderr).count("holds less than its source") == 1
    assert ".py" not in found.stderr


def test_a_dry_run_writes_nothing_and_warns_of_nothing(
    source: Path, exact: Path, tmp_path: Path
) -> None:
    for command, given in (("convert", source), ("repack", exact)):
        found = run(command, given, "-o", tmp_path / "o.h5", "--tier", "compact", "--dry-run")
        assert not (tmp_path / "o.h5").exists()
        assert LOSS not in plain(found.stderr)


def test_reports_are_json(source: Path, exact: Path, tmp_path: Path) -> None:
    for number, (command, given) in enumerate((("convert", source), ("repack", exact))):
        target = tmp_path / f"{number}.h5"
        found = run(command, given, "-o", target, "--tier", "native", "--json")
        assert "native" in json.loads(found.stdout)["precision"]


@pytest.mark.parametrize("command", ["convert", "repack", "calibrate"])
def test_help_teaches(command: str) -> None:
    shown = plain(run(command, "--help").stdout)
    words = (
        ["scales.h5"] if command == "calibrate" else ["--tier", "sigma", "--calibration-samples"]
    )
    assert all(word[:15] in shown for word in words)


def test_inspect_says_what_stayed_exact(source: Path, tmp_path: Path) -> None:
    run("calibrate", source, "-o", tmp_path / "scales.h5", "--layers", "0")
    run(
        "convert",
        source,
        "-o",
        tmp_path / "a.h5",
        "--step",
        "0.1",
        "--scales",
        tmp_path / "scales.h5",
    )
    lines = run("inspect", tmp_path / "a.h5").stdout.splitlines()
    first, second = (next(each for each in lines if f"layer_00{n}:" in each) for n in (0, 1))
    assert "kept exact" not in first
    assert second.endswith("kept exact: has no scale")
    found = run("inspect", tmp_path / "scales.h5", code=1)
    assert "is a file of scales" in plain(found.stderr)


def test_exact_takes_no_parameters(source: Path, tmp_path: Path) -> None:
    options = (["--step", 0.2], ["--attention-bits", 8], ["--head-mean", "beside"])
    for each in (*options, ["--mantissa-bits", 6]):
        found = run("convert", source, "-o", tmp_path / "a.h5", "--tier", "exact", *each, code=2)
        assert f"--tier exact is without quantisation, {each[0]} with" in plain(found.stderr)
    assert not (tmp_path / "a.h5").exists()
    run("convert", source, "-o", tmp_path / "b.h5", "--tier", "fine", "--step", 0.2)
    changed = Precision(step=0.2, attention_bits=8, head_mean="beside")
    assert precision_of(tmp_path / "b.h5") == changed


def test_warnings_of_a_tier_advise_no_other_type(tmp_path: Path) -> None:
    batch = make_batch("full_pkl", dtype="float32")
    batch[0]["hidden_states"][0][1:3] = 1e-9
    source = write_batch(tmp_path / "tiny.pkl", batch)
    for options, remedy in (([], True), (["--tier", "native"], False)):
        found = run("convert", source, "-o", f"{tmp_path}/{len(options)}.h5", *options)
        assert "values became 0" in found.stderr
        assert ("--dtype auto keeps every bit" in plain(found.stderr)) == remedy
