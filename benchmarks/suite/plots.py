"""The pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from suite.cases import conversion
from suite.figures import speed
from suite.measure import Spread
from suite.synthetic import KINDS

if TYPE_CHECKING:
    from pathlib import Path

_OURS, _OTHERS, _LIMIT = "#0b6e4f", "#9aa5b1", "#b23a48"
_NOTE: Final = "synthetic samples of Llama-2-7B's shape, no measurement of Llama-2"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the sections allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    sections, drawn = results["sections"], {}
    note = _NOTE if results["scale"] == "full" else f"scale {results['scale']}, synthetic samples"
    if "throughput" in sections:
        drawn["throughput"] = _throughput(sections["throughput"], note)
        drawn["size"] = _size(sections["throughput"], note)
    if "conversion" in sections:
        drawn["conversion"] = _conversion(sections["conversion"], note)
    if "growth" in sections:
        drawn["growth"] = _growth(sections["growth"])
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return paths


def _color(name: str) -> str:
    ours = ("h5traces", "convert", conversion.ONE_LAYER)
    return _OURS if name.startswith(ours) else _OTHERS


def _bars(axes: Any, spreads: dict[str, Spread], label: str) -> None:
    names = list(spreads)[::-1]
    middles = [spreads[name].median for name in names]
    below = [spreads[name].median - spreads[name].low for name in names]
    above = [spreads[name].high - spreads[name].median for name in names]
    colors = [_color(name) for name in names]
    axes.barh(names, middles, xerr=(below, above), color=colors, ecolor="#444444", capsize=2)
    for row, (name, middle) in enumerate(zip(names, middles, strict=True)):
        digits = 0 if middle >= 100 else 1 if middle >= 20 else 2
        text = f" {middle:,.{digits}f}" if middle else " (does not write)"
        axes.annotate(text, (spreads[name].high, row), va="center", fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)


def _throughput(section: dict[str, Any], note: str) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    nbytes, names = section["payload_nbytes"], list(section["series"])
    for each, what, label in (
        (axes[0], "write_wall", "write with fsync, MB/s of float16"),
        (axes[1], "scan_wall", "full read, MB/s of float16"),
    ):
        found = {name: speed(section["series"][name], what, nbytes) for name in names}
        nothing = Spread(0, 0, 0)
        spreads = {
            name: found[name] or nothing for name in names if "scan_wall" in section["series"][name]
        }
        _bars(each, spreads, label)
    figure.suptitle(f"Speed, medians and ranges ({note})", fontsize=10)
    return figure


def _size(section: dict[str, Any], note: str) -> Any:
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    spreads = {
        name: Spread(*[8 * stored["nbytes"] / section["num_values"]] * 3)
        for name, stored in section["stored"].items()
        if not name.endswith("all cores")
    }
    _bars(axes, spreads, "bits per value, whole file")
    values = section["kind_values"]
    floor = sum(section["floor"][kind] * values[kind] for kind in KINDS) / sum(values.values())
    axes.axvline(floor, color=_LIMIT, linewidth=1)
    axes.annotate(
        " entropy of byte planes", (floor, -0.45), color=_LIMIT, fontsize=8, ha="left", va="top"
    )
    axes.set_title(f"Size ({note})", fontsize=10)
    return figure


def _conversion(section: dict[str, Any], note: str) -> Any:
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    spreads = {
        name: Spread.of(section["series"][name]["run_wall"])
        for name in conversion.CASES
        if name != conversion.READ_PKL
    }
    _bars(axes, spreads, "seconds")
    inflate = spreads[conversion.INFLATE].median
    axes.axvline(inflate, color=_LIMIT, linewidth=1)
    axes.annotate(" igzip", (inflate, -0.45), color=_LIMIT, fontsize=8, ha="left", va="top")
    megabytes = section["payload_nbytes"] / 1e6
    axes.set_title(f"Converting and loading {megabytes:.0f} MB ({note})", fontsize=10)
    return figure


def _growth(section: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    counts = [int(each) for each in section["sizes"]]
    first = next(iter(section["sizes"].values()))
    markers = ("o", "s", "^")
    for marker, name in zip(markers, first["series"], strict=True):
        found = [section["sizes"][str(count)] for count in counts]
        columns = (
            [Spread.of(each["series"][name]["open_wall"]).median * 1e3 for each in found],
            [Spread.of(each["series"][name]["random"]).median * 1e3 for each in found],
            [
                (each["memory"][name]["peak"] - each["memory"][name]["imported"]) / 1e6
                for each in found
            ],
        )
        color = _OURS if name.startswith("h5traces") else _OTHERS
        for each, column in zip(axes, columns, strict=True):
            each.plot(counts, column, marker=marker, color=color, label=name)
    titles = ("open and count, ms", "one random (sample, layer), ms", "peak RSS of opening, MB")
    for each, title in zip(axes, titles, strict=True):
        each.set_xscale("log")
        each.set_yscale("log")
        each.set_title(title, fontsize=10)
        each.set_xlabel("samples")
        each.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    return figure
