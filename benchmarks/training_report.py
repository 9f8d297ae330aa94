"""The figures of `training.py` as tables."""

from __future__ import annotations

from typing import Any

from suite.measure import Spread, ratio

Figures = dict[str, dict[str, list[float]]]

_RIVALS = (
    ("legacy", "the legacy class: whole files, six of them cached"),
    ("files_in_ram", "the same, its files as compressed bytes in RAM"),
    ("samples_in_ram", "every sample as compressed bytes of its own in RAM"),
    ("layers_in_ram", "every (sample, layer) as compressed bytes of its own in RAM"),
    ("unpickled_in_ram", "everything unpickled in RAM"),
)


def report(results: dict[str, Any]) -> str:
    """Markdown of all that was measured."""
    figures: Figures = results["figures"]
    parts = [_about(results)]
    for build in (_speed, _start, _workers, _memory, _device):
        parts += build(figures, results)
    return "\n".join(parts)


def _about(results: dict[str, Any]) -> str:
    machine, packages = results["machine"], results["versions"]
    return (
        f"`python benchmarks/training.py --scale {results['scale']}`: {results['num_samples']} "
        f"synthetic samples, {machine['date']}, {machine['cores']} cores of "
        f"{machine['processor']}, {machine['memory']}, Python {packages['python']}, torch "
        f"{packages['torch']}. Medians, ranges of rounds in brackets; ratios within rounds.\n"
    )


def _speed(figures: Figures, _: dict[str, Any]) -> list[str]:
    rates = figures.get("random graphs")
    if rates is None:
        return []
    rows = [
        "| random (sample, layer) graphs | per second | archive is faster by |",
        "|---|---|---|",
        f"| **from archives** | {Spread.of(rates['archive']).text()} | |",
    ]
    for name, title in _RIVALS:
        faster = _times({"a": rates["archive"]}, {"a": rates[name]})
        rows.append(f"| {title} | {Spread.of(rates[name]).text()} | {faster} |")
    return [*rows, ""]


def _times(above: dict[str, list[float]], below: dict[str, list[float]]) -> str:
    found = ratio(above, below, "a")
    return "" if found is None else f"{found.text()} times"


def _start(figures: Figures, results: dict[str, Any]) -> list[str]:
    times = figures.get("first batch")
    if times is None:
        return []
    ours, theirs = Spread.of(times["archive"]), Spread.of(times["legacy"])
    return [
        f"| first batch of 32 random graphs, {results['num_samples']} samples | seconds |",
        "|---|---|",
        f"| **from archives** | {ours.text(3)} |",
        f"| the legacy class | {theirs.text()} |",
        f"| sooner by | {theirs.median / ours.median:.0f} times |",
        "",
    ]


def _workers(figures: Figures, _: dict[str, Any]) -> list[str]:
    if "graphs by workers" not in figures:
        return []
    rows = ["| per second, by workers | 0 | 1 | 2 | 2 against 0 |", "|---|---|---|---|---|"]
    for case, title in (
        ("graphs by workers", "graphs, batches of 32"),
        ("last tokens by workers", "samples, last token of every layer, batches of 8"),
    ):
        rates = figures[case]
        cells = " | ".join(Spread.of(rates[name]).text() for name in ("0", "1", "2"))
        rows.append(f"| {title} | {cells} | {_times({'a': rates['2']}, {'a': rates['0']})} |")
    return [*rows, ""]


def _memory(figures: Figures, results: dict[str, Any]) -> list[str]:
    if "memory, fork" not in figures:
        return []
    rows = [
        f"| one worker, {results['notes']['memory_graphs']} random graphs, MB | imports alone | "
        "after an eighth | at the end |",
        "|---|---|---|---|",
    ]
    for method in ("fork", "spawn"):
        sizes = figures[f"memory, {method}"]
        for field, title in (("rss", "RSS"), ("own", "of it not shared")):
            cells = " | ".join(
                f"{sizes[f'{when}_{field}'][0]:.0f}" for when in ("imported", "begun", "ended")
            )
            rows.append(f"| {method}: {title} | {cells} |")
    return [*rows, ""]


def _device(figures: Figures, results: dict[str, Any]) -> list[str]:
    if "device" not in results["notes"]:
        return []
    if results["notes"]["device"] is None:
        return ["There was no CUDA device: copies onto one were not measured.", ""]
    rates = figures["device"]
    return [
        f"| samples per second onto {results['notes']['device']} | |",
        "|---|---|",
        f"| `.cuda()` batch by batch | {Spread.of(rates['plain']).text()} |",
        f"| `DeviceLoader` | {Spread.of(rates['ahead']).text()} |",
        "",
    ]
