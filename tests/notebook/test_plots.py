"""Pictures with matplotlib: what is drawn are the numbers of the archive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pytest

import h5traces
from h5traces.errors import LayerIndexError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

mpl.use("Agg")
EXAMPLE = Path(__file__).parents[2] / "examples" / "legacy"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    h5traces.convert(EXAMPLE, f"{folder}/")
    (found,) = folder.glob("*.h5")
    return found


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def states_of(trace: h5traces.Trace) -> np.ndarray:
    return np.stack([np.asarray(each, "f8") for each in trace["hidden_states"]])


def test_quantities_are_what_they_say(path: Path) -> None:
    trace = h5traces.open(path)[2]
    states = states_of(trace)
    weights = np.stack([np.asarray(each, "f8") for each in trace["attentions"]])
    quantity = h5traces.plotting.token_quantity
    norms = np.linalg.norm(states, axis=-1)
    np.testing.assert_allclose(quantity(trace), norms, rtol=1e-5)
    changes = np.linalg.norm(np.diff(states, axis=0), axis=-1)
    np.testing.assert_allclose(quantity(trace, "change")[1:], changes, rtol=1e-5)
    assert np.isnan(quantity(trace, "change")[0]).all()
    cosines = (states * states[-1]).sum(-1) / (norms * norms[-1])
    np.testing.assert_allclose(quantity(trace, "cosine_last"), cosines, rtol=1e-4)
    shares = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(quantity(trace, "sink"), shares[..., 0].mean(1), rtol=1e-4)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -np.nansum(shares * np.log(shares), axis=-1).mean(1)
    np.testing.assert_allclose(quantity(trace, "entropy"), entropies, rtol=1e-3, atol=1e-5)


def test_the_map_is_drawn_of_them(path: Path) -> None:
    trace = h5traces.open(path)[2]
    axes = h5traces.plotting.layer_map(trace, "norm")
    (picture,) = axes.get_images()
    np.testing.assert_allclose(picture.get_array(), np.linalg.norm(states_of(trace), axis=-1), 1e-5)
    assert axes.get_title() == "py_0003"
    assert [each.get_text() for each in axes.get_yticklabels()] == ["0", "1", "2", "3", "4", "5"]
    assert len(axes.get_xticklabels()) == len(trace["tokens"])


def test_every_head_is_drawn(path: Path) -> None:
    trace = h5traces.open(path)[0]
    figure = h5traces.plotting.attention_grid(trace, 3)
    pictures = [each.get_images()[0] for each in figure.axes if each.get_images()]
    assert len(pictures) == 8
    expected = np.sqrt(np.asarray(trace["attentions"][3][5], "f4"))
    np.testing.assert_allclose(pictures[5].get_array(), expected)
    two = h5traces.plotting.attention_grid(trace, 3, heads=[1, 2])
    assert [each.get_title() for each in two.axes] == ["head 1", "head 2"]


def test_what_is_not_stored_is_named(path: Path, tmp_path: Path) -> None:
    trace = h5traces.open(path)[0]
    with pytest.raises(LayerIndexError, match="layer 30 of attentions is not stored"):
        h5traces.plotting.attention_grid(trace, 30)
    with pytest.raises(OptionError, match="head 9 is not stored; layer 3 has 8 heads"):
        h5traces.plotting.attention_grid(trace, 3, heads=[9])
    with h5traces.create(tmp_path / "states.h5") as writer:
        writer.append({"hidden_states": [np.ones((3, 2), "f2")] * 2})
    with pytest.raises(OptionError, match="stores no attentions that can be drawn"):
        h5traces.plotting.layer_map(h5traces.open(tmp_path / "states.h5")[0], "entropy")


def test_absent_layers_are_gaps(tmp_path: Path) -> None:
    """As hybrids have them: attention in some blocks only."""
    weights = np.tril(np.ones((2, 3, 3), "f4")) / np.arange(1, 4)[:, None]
    with h5traces.create(tmp_path / "hybrid.h5") as writer:
        states = [np.full((3, 4), each, "f2") for each in (1, 2)]
        writer.append({"hidden_states": states, "attentions": [None, weights]})
    trace = h5traces.open(tmp_path / "hybrid.h5")[0]
    found = h5traces.plotting.token_quantity(trace, "entropy")
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], np.log([1, 2, 3]), rtol=1e-3)


def test_sizes_are_those_of_the_chunks(path: Path, tmp_path: Path) -> None:
    compact = tmp_path / "compact.h5"
    h5traces.repack(path, compact, precision=h5traces.PrecisionOptions(tier="compact"))
    archives = {"exact": h5traces.open(path), "compact": h5traces.open(compact)}
    axes = h5traces.plotting.sizes(archives)
    widths = np.zeros(2)
    for bars in axes.containers:
        widths += [bar.get_width() * 1e6 for bar in bars]
    files = [path.stat().st_size, compact.stat().st_size]
    assert widths[0] > 2 * widths[1]
    assert all(0.5 * size < width < size for width, size in zip(widths, files, strict=True))


def test_scores_have_the_numbers_of_their_layers() -> None:
    axes = h5traces.plotting.scores_by_layer({"probe": [0.5, 0.75]}, layers=[0, 31])
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.5], [31, 0.75]])


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "h5traces", "plot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(path: Path, tmp_path: Path) -> None:
    assert run(path, "--sample", 2, "-o", tmp_path / "map.png").stdout.strip().endswith("py_0003")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    again = run(path, "-o", tmp_path / "map.png")
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    assert run(path, "--layer", 3, "-o", tmp_path / "heads.svg").returncode == 0
    assert "<svg" in (tmp_path / "heads.svg").read_text()
    missing = run(path, "--layer", 30, "-o", tmp_path / "x.png")
    assert (missing.returncode, "layer 30" in missing.stderr) == (2, True)
    odd = run(path, "-o", tmp_path / "map.gif")
    assert (odd.returncode, "pictures end in .png" in odd.stderr) == (2, True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["heads.svg", "map.png"]


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [(["plot", "-o", "a.png"], "matplotlib", "plot"), (["view"], "uvicorn", "view")],
)
def test_a_missing_extra_is_named(
    path: Path, tmp_path: Path, command: list[str], library: str, extra: str
) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; from h5traces.cli import main; main()"
    errors = []
    for arguments, status in ([command[0], "--help"], 0), ([*command, str(path)], 2):
        words = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        errors.append(done.stderr)
    assert errors[0] == ""
    assert errors[1].startswith("error: ")
    assert library in errors[1]
    assert f"pip install 'h5traces[{extra}]'" in errors[1]
    assert list(tmp_path.iterdir()) == []
