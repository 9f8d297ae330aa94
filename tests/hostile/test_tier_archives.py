"""Every named attack on lossy archives, as `test_archives` has them for exact ones."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import probe
import pytest
import tier_attacks
from prober import Prober
from specimen import footer_of, seal
from test_archives import MAX_EXTRA_NBYTES, MAX_SECONDS, MAX_WALL_SECONDS, check_reading, routes_of

import h5traces
from h5traces.errors import H5TracesError
from h5traces.writing.calibrate import load_calibration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from attack import Attack

    from h5traces.precision.scales import Calibration


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lossy") / "archive.h5"
    tier_attacks.write(path)
    return path


@pytest.fixture(scope="module")
def prober(archive: Path) -> Iterator[Prober]:
    copy = archive.with_name("warm.h5")
    shutil.copyfile(archive, copy)
    made = Prober(copy)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(archive: Path) -> str:
    return probe.read(str(archive))


@pytest.mark.parametrize(
    ("number", "attack"),
    [pytest.param(*each, id=each[1].name) for each in enumerate(tier_attacks.ATTACKS)],
)
def test_attack_is_refused(
    tmp_path: Path, archive: Path, prober: Prober, expected: str, number: int, attack: Attack
) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    attack.build(path)
    results = prober(path, routes_of(number))
    for route, result in results.items():
        assert result["outcome"] not in ("died", "escaped"), f"{route}: {result['message']}"
        assert "Traceback" not in result["message"], f"{route}: {result['message']}"
        assert result.get("code", 0) in (0, 1), route
        assert result["seconds"] < MAX_SECONDS, route
        assert result["wall"] < MAX_WALL_SECONDS, route
        assert result["extra_nbytes"] < MAX_EXTRA_NBYTES, route
        assert len(result["message"]) < 4000, route
    check_reading(attack, results["read"], expected)
    problems: list[dict[str, Any]] = results["validate"]["value"]
    said = "; ".join(f"{each['loc']}: {each['message']}" for each in problems)
    if attack.problem is None:
        assert problems == []
        # Only values are wrong, which are for verify to look at. It does not know the layers that
        # a scale is for, so not which steps are too large for them.
        assert not h5traces.verify(path).ok or "float32 does not reach" in str(attack.error)
    else:
        assert re.search(attack.problem, said, re.DOTALL), said


def loaded(path: Path) -> tuple[Calibration | None, str]:
    try:
        return load_calibration(path), ""
    except H5TracesError as error:
        return None, str(error)


@pytest.mark.parametrize("attack", tier_attacks.ATTACKS, ids=lambda attack: attack.name)
def test_scales_from_a_stranger(tmp_path: Path, archive: Path, attack: Attack) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    attack.build(path)
    found, message = loaded(path)
    if found is None:
        assert str(path) in message
        assert len(message) < 2000
        return
    for scale in found.scales(0.02).layers.values():
        assert np.isfinite(scale.step).all()
        assert (scale.step > 0).all()


def test_attacks_are_distinct() -> None:
    names = [each.name for each in tier_attacks.ATTACKS]
    assert len(names) == len(set(names))


def test_no_scale_counts_as_a_sample(archive: Path) -> None:
    with h5py.File(archive) as file:
        assert "scales" in file
    with h5traces.open(archive) as found:
        assert len(found) == len(found.ids) == len(list(found)) == 2
        assert found[-1].ordinal == 1
        for index in (2, -3):
            with pytest.raises(IndexError):
                found[index]


def no_scales(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    """The row of the scales is left out, and nothing says that there are any."""
    del document["has_scales"]
    length = int.from_bytes(columns["other_rows"][:4], "little")
    columns["other_rows"] = columns["other_rows"][: 4 + length]


def scales_as_a_sample(document: dict[str, Any], columns: dict[str, bytes]) -> None:
    document["num_samples"] += 1
    del document["has_scales"]


@pytest.mark.filterwarnings("ignore::h5traces.errors.StoredStateWarning")
@pytest.mark.parametrize("change", [no_scales, scales_as_a_sample])
def test_footer_that_lies_about_scales(tmp_path: Path, archive: Path, change: Any) -> None:
    path = tmp_path / "archive.h5"
    shutil.copyfile(archive, path)
    document, columns = footer_of(path)
    change(document, columns)
    seal(path, document, columns)
    assert not h5traces.verify(path).ok
    assert not h5traces.validate(path).ok
    result = probe.attempt("read", str(path))
    assert result["outcome"] in ("ok", "error"), result["message"]
    assert result.get("value", probe.read(str(archive))) == probe.read(str(archive))
