"""From results to a report in markdown; everything is computed from ``results.json`` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from suite.cases import conversion
from suite.figures import RIVALS, figures, speed
from suite.measure import Spread, above_imports, ratio
from suite.synthetic import KINDS
from suite.targets import PREDICTIONS, TARGETS, measured

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_START, _END = "<!-- predictions -->", "<!-- end of predictions -->"
_NAMES: Final = {"hidden_states": "hidden states", "attentions": "attentions"}
_NOT_FULL: Final = "Targets and predictions are meant for `--scale full`: arrays are smaller here."
SYNTHETIC: Final = (
    "Large samples are synthetic, of Llama-2-7B's shape, calibrated to the shipped activations of "
    "a tiny model: they are not measurements of Llama-2 itself."
)


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``results.md`` and the plots, and bring a README's table of predictions up to date.

    Returns
    -------
    list of Path
        What was written.
    """
    written = [folder / "results.md"]
    written[0].write_text(markdown(results), encoding="utf-8")
    if results["plots"]:
        from suite import plots

        written += plots.draw(results, folder / "plots")
    readme = folder / "README.md"
    if readme.exists():
        head, start, rest = readme.read_text(encoding="utf-8").partition(_START)
        _, end, tail = rest.partition(_END)
        if start and end:
            body = f"{head}{start}\n{_predictions(results)}\n{end}{tail}"
            readme.write_text(body, encoding="utf-8")
            written.append(readme)
    return written


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    sections = results["sections"]
    parts = [_head(results)]
    if "throughput" in sections:
        parts.append(_limits(results))
    if "match" in sections:
        parts.append(_match(sections["match"]))
    parts += [_ratios(results), _targets(results)]
    if "throughput" in sections:
        parts.append(_formats(results, "throughput", "Formats, synthetic samples"))
    if "real" in sections:
        parts.append(_formats(results, "real", "Formats, shipped real activations"))
    if "opening" in sections:
        parts.append(_opening(sections["opening"]))
    if "conversion" in sections:
        parts.append(_conversion(sections))
    if "growth" in sections:
        parts.append(_growth(sections["growth"]))
    parts += [_predictions(results, title="## Predictions\n\n")]
    if "throughput" in sections:
        parts.append(_distance(results))
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first hold numbers."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(results: dict[str, Any]) -> str:
    machine = "; ".join(f"{name}: {value}" for name, value in results["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    note = "" if results["scale"] == "full" else f" {_NOT_FULL}"
    return f"""\
# Benchmarks

Written by `python benchmarks/run.py --scale {results["scale"]}` in {results["seconds"]} seconds; \
raw figures in `results.json`.{note}
{SYNTHETIC}

- Machine: {machine}.
- Versions: {versions}.
- Figures are medians, in brackets the range over all rounds. In every round all cases run one \
after the other, and ratios are taken within a round: a noisy machine disturbs them little, \
absolute speeds more.
- MB/s count bytes of float16 hidden states and attentions, whatever is stored. *wall* is the \
clock, *CPU* the time of all threads together. Writing ends when file and name are durable \
(fsync). Reading makes every array anew in memory, from the page cache. h5traces means its codec \
`gzip` unless another one is named; "1 thread" is one thread that compresses beside the one that \
writes, and a plain loop for reading; "all cores" reads through `Archive.read`, four samples per \
call."""


def _limits(results: dict[str, Any]) -> str:
    found = figures(results["sections"])
    rows = [
        ("copying memory, one core", found["copy_speed"].text(0)),
        (
            "inflating the gzipped pickle, one core (igzip)",
            found["inflate_speed"].text(0),
        ),
        (
            "inflating the chunks of an h5traces archive, one core (igzip)",
            found["inflate_chunks_speed"].text(0),
        ),
    ]
    return (
        "## Limits\n\nWhat nobody can beat here, measured in every round of the same run: no "
        "format is faster than memory, and none that is deflated is read faster than it inflates."
        f"\n\n{table(('limit', 'MB/s'), rows)}"
    )


def _match(section: dict[str, Any]) -> str:
    names = {
        "gzip_6": "bits per value, gzip 6",
        "low_plane": "entropy of low bytes",
        "high_plane": "entropy of high bytes",
        "floor": "entropy of both",
    }
    rows = []
    for kind in KINDS:
        for name, text in names.items():
            cells = []
            for data in ("as_benchmarked", "equal_lengths"):
                ours, theirs = section[data][kind][name]
                cells += [f"{ours:.2f}", f"{100 * (ours / theirs - 1):+.1f} %"]
            rows.append((f"{_NAMES[kind]}, {text}", f"{theirs:.2f}", *cells))
    worst = max(
        abs(pair[0] / pair[1] - 1)
        for kind in KINDS
        for pair in section["as_benchmarked"][kind].values()
    )
    header = ("", "real", "synthetic", "difference", "at the real lengths", "difference")
    real, lengths = section["real_lengths"], section["lengths"]
    return f"""\
## How well the synthetic data match real ones

Real: `{section["real_file"]}`, {len(real)} samples of {min(real)} to {max(real)} tokens. \
Synthetic: {len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, \
{sum(lengths) / len(lengths):.1f} on average. Long attentions compress better than short ones, so \
the last two columns compare samples of the real lengths. \
Largest difference as benchmarked: **{100 * worst:.1f} %** (wanted: within 3 %).

{table(header, rows)}"""


def _ratios(results: dict[str, Any]) -> str:
    found = figures(results["sections"])
    header = ("h5traces is faster by", *RIVALS.values())
    parts = ["## Ratios\n\nFile size as a share of theirs. safetensors does not compress."]
    rows = _ratio_rows(found, "")
    cells = [found.get(f"open_vs_{short}") for short in RIVALS]
    rows.append(("open and count", *(measured(cell) for cell in cells)))
    rows += [
        (text, measured(found.get(name)), "", "", "")
        for name, text in (
            ("one_layer", "one layer of all samples, against loading the batch"),
            ("load_all", "`h5traces.load` of the archive, against loading the batch"),
            ("safe_load", "`h5traces.load` of the .pkl.gz itself, against gzip + pickle.load"),
        )
    ]
    parts.append(table(header, rows))
    if "real" in results["sections"]:
        parts.append("The same on the shipped real activations, arrays of a few kilobytes:")
        parts.append(table(header, _ratio_rows(found, "real_")))
    return "\n\n".join(parts)


def _ratio_rows(found: dict[str, Spread], data: str) -> list[tuple[str, ...]]:
    names = {
        "write_wall": "write, wall",
        "write_cpu": "write, CPU",
        "scan_wall": "full read, wall",
        "scan_cpu": "full read, CPU",
    }
    rows: list[tuple[str, ...]] = []
    for what, text in names.items():
        for suffix, threads in (("", "all cores"), ("_1", "1 thread")):
            cells = [found.get(f"{data}{what}_vs_{short}{suffix}") for short in RIVALS]
            rows.append((f"{text}, {threads}", *(measured(cell) for cell in cells)))
    cells = [found.get(f"{data}random_vs_{short}_1") for short in RIVALS]
    rows.append(("one random (sample, layer)", *(measured(cell) for cell in cells)))
    sizes = [found.get(f"{data}size_vs_{short}") for short in RIVALS]
    rows.append(("file size", *("" if each is None else each.text(3) for each in sizes)))
    return rows


def _targets(results: dict[str, Any]) -> str:
    found = figures(results["sections"])
    rows = [
        (
            each.text,
            each.goal,
            measured(found.get(each.figure), each.unit, each.digits),
            each.verdict(found.get(each.figure)),
        )
        for each in TARGETS
    ]
    return f"## Targets\n\n{table(('target', 'goal', 'measured', 'reached'), rows)}"


def _predictions(results: dict[str, Any], title: str = "") -> str:
    found = figures(results["sections"])
    rows = [
        (
            each.text,
            each.range,
            measured(found.get(each.figure), each.unit, each.digits),
            each.outcome(found.get(each.figure)),
        )
        for each in PREDICTIONS
    ]
    return f"{title}{table(('prediction', 'range', 'measured', 'outcome'), rows)}"


FORMAT_COLUMNS: Final = (
    "format",
    "bytes per sample",
    "bits per value",
    "of the entropy",
    "write MB/s, wall",
    "write MB/s, CPU",
    "fsync, share of writing",
    "read MB/s, wall",
    "read MB/s, CPU",
    "one random (sample, layer), ms",
    "open and count 1000, ms",
    "peak RSS writing, MB",
    "peak RSS reading, MB",
)


def _formats(results: dict[str, Any], name: str, title: str) -> str:
    section = results["sections"][name]
    rows = [
        _format_row(results, section, each, is_real=name == "real") for each in results["formats"]
    ]
    floor = _floor_bits(section)
    count = results["sections"].get("opening", {}).get("num_samples", 1000)
    columns = [each.replace("1000", str(count)) for each in FORMAT_COLUMNS]
    columns = columns[:10] if name == "real" else columns
    text = f"""\
## {title}

{section["num_samples"]} samples, {section["mean_tokens"]:.0f} tokens on average, \
{section["payload_nbytes"] / 1e6:.1f} MB of hidden states and attentions. \
Order-0 entropy of the two byte planes, array by array: \
{section["floor"]["hidden_states"]:.2f} bits per value for hidden states, \
{section["floor"]["attentions"]:.2f} for attentions, {floor:.2f} for both (the masked half of \
attentions can be stored in less; hidden states cannot, or hardly)."""
    if name != "real":
        text += """ \
Peak RSS is what a process of its own reached above the memory it had after its imports; the \
writers of pickle, npz, torch and safetensors must hold the whole batch."""
    else:
        text += " So small a batch shows what every call costs rather than what every byte does."
    return f"{text}\n\n{table(columns, rows)}\n\n{_kinds(section)}"


def _kinds(section: dict[str, Any]) -> str:
    """Bits per value by kind, codec by codec, without metadata and index."""
    rows = []
    for name, sizes in section["kinds"].items():
        bits = {kind: 8 * sizes[kind] / section["kind_values"][kind] for kind in KINDS}
        cells = [f"{bits[kind]:.3f} ({bits[kind] / section['floor'][kind]:.4f})" for kind in KINDS]
        if "1 thread" in name:
            rows.append((name.partition(",")[0], *cells))
    header = ("arrays alone, bits per value (of the entropy)", *_NAMES.values())
    return table(header, rows)


def _floor_bits(section: dict[str, Any]) -> float:
    values = section["kind_values"]
    total = sum(section["floor"][kind] * values[kind] for kind in KINDS)
    return float(total / sum(values.values()))


def _format_row(
    results: dict[str, Any], section: dict[str, Any], name: str, *, is_real: bool
) -> list[str]:
    series = section["series"].get(name)
    if series is None:
        num_columns = 10 if is_real else len(FORMAT_COLUMNS)
        return [name, "not installed", *[""] * (num_columns - 2)]
    row = [name, *_size_cells(section, name)]
    for what in ("write_wall", "write_cpu"):
        row.append(_text(speed(series, what, section["payload_nbytes"])))
    row.append(_fsync_share(series))
    for what in ("scan_wall", "scan_cpu"):
        row.append(_text(speed(series, what, section["payload_nbytes"])))
    row.append(Spread.of(series["random"]).text(scale=1e3))
    if is_real:
        return row
    opening = results["sections"].get("opening", {}).get("series", {}).get(name)
    row.append(Spread.of(opening["open_wall"]).text(scale=1e3) if opening else "")
    memory = results["sections"].get("memory", {}).get("formats", {}).get(name, {})
    for what in ("write", "scan"):
        found = memory.get(what)
        row.append(f"{above_imports(found):.0f}" if found else "")
    return row


def _size_cells(section: dict[str, Any], name: str) -> list[str]:
    stored = section["stored"].get(name)
    if stored is None:
        return ["", "", ""]
    bits = 8 * stored["nbytes"] / section["num_values"]
    files = f" in {stored['num_files']} files" if stored["num_files"] > 1 else ""
    return [
        f"{stored['nbytes'] / section['num_samples']:,.0f}{files}",
        f"{bits:.2f}",
        f"{bits / _floor_bits(section):.3f}",
    ]


def _fsync_share(series: dict[str, list[float]]) -> str:
    if "write_wall" not in series:
        return ""
    pairs = zip(series["write_fsync"], series["write_wall"], strict=True)
    return f"{100 * Spread.of([fsync / wall for fsync, wall in pairs]).median:.0f} %"


def _text(spread: Spread | None) -> str:
    return "" if spread is None else spread.text()


def _opening(section: dict[str, Any]) -> str:
    rows = []
    for name, series in section["series"].items():
        stored = section["stored"][name]
        rows.append(
            (
                name,
                Spread.of(series["open_wall"]).text(scale=1e3),
                f"{stored['nbytes'] / 1e6:.1f}",
                f"{stored['num_files']:,}",
                f"{section['making'][name]:.1f}",
            )
        )
    header = ("format", "open and count, ms", "size, MB", "files", "made in, s")
    return f"""\
## Open and count {section["num_samples"]} samples

{section["num_datasets"]} tiny arrays per sample, so that only their number matters. \
Of zarr's groups only the first has its arrays: counting does not look, and making them all takes \
minutes.

{table(header, rows)}"""


def _conversion(sections: dict[str, Any]) -> str:
    section = sections["conversion"]
    series, nbytes = section["series"], section["payload_nbytes"]
    rows = []
    for name in conversion.CASES:
        against_inflate = ratio(series[name], series[conversion.INFLATE], "run_wall")
        against_load = ratio(series[name], series[conversion.LOAD_GZ], "run_wall")
        rows.append(
            (
                name,
                Spread.of(series[name]["run_wall"]).text(),
                Spread.of(series[name]["run_cpu"]).text(),
                measured(against_inflate),
                measured(against_load),
                _text(speed(series[name], "run_wall", nbytes)),
            )
        )
    header = (
        "case",
        "seconds, wall",
        "seconds, CPU",
        "of igzip's time",
        "of gzip + pickle.load's time",
        "MB/s",
    )
    text = f"""\
## Convert, and read one layer

{section["num_samples"]} synthetic samples, {nbytes / 1e6:.0f} MB of float16; .pkl.gz \
{section["gz_nbytes"] / 1e6:.1f} MB, archive {section["archive_nbytes"] / 1e6:.1f} MB. Converting \
uses all cores, inflating one.

{table(header, rows)}"""
    if "memory" in sections:
        text += "\n\n" + _command_memory(sections["memory"])
    return text


def _command_memory(section: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{(each['peak'] - each['bare']) / 1e6:.0f}",
            f"{above_imports(each):.0f}",
            f"{each['wall']:.2f}",
            f"{each['process']:.2f}",
        )
        for name, each in section["commands"].items()
    ]
    allowed = figures({"memory": section})["convert_allowed_mb"]
    header = (
        "in a process of its own",
        "peak RSS above the interpreter, MB",
        "above its imports, MB",
        "s",
        "s with start-up",
    )
    return (
        f"The largest sample has {section['largest_sample_nbytes'] / 1e6:.1f} MB, so 200 MB + 2 x "
        f"the largest sample are {allowed.text(0)} MB.\n\n{table(header, rows)}"
    )


def _growth(section: dict[str, Any]) -> str:
    rows = []
    for count, found in section["sizes"].items():
        for name, series in found["series"].items():
            rows.append(
                (
                    f"{int(count):,} samples, {name}",
                    Spread.of(series["open_wall"]).text(scale=1e3),
                    Spread.of(series["random"]).text(scale=1e3),
                    f"{above_imports(found['memory'][name]):.1f}",
                    f"{found['stored'][name] / int(count):,.0f}",
                    f"{1e3 * found['writing'][name] / int(count):.2f}",
                )
            )
    header = (
        "",
        "open and count, ms",
        "one random (sample, layer), ms",
        "peak RSS of opening and two reads, MB",
        "bytes per sample",
        "ms to write a sample",
    )
    return f"""\
## Growth

Samples of {section["num_layers"]} layers of tiny arrays, so that only their number matters. Flat \
is what does not grow down a column for one format.

{table(header, rows)}"""


def _distance(results: dict[str, Any]) -> str:
    found = figures(results["sections"])
    shares = {
        "read_1_of_inflate": "full read, 1 thread, of inflating its chunks on one core",
        "read_all_of_inflate": "full read, all cores, of inflating its chunks on as many cores",
        "read_all_of_copy": "full read, all cores, of copying memory on one core",
        "write_all_of_copy": "write, all cores, of copying memory on one core",
    }
    multiples = {
        "convert_gz": "convert .pkl.gz --no-verify, times igzip's inflating",
        "convert_gz_verify": "convert .pkl.gz --verify, times igzip's inflating",
    }
    sizes = {
        "hidden_states_vs_entropy": "hidden states, times the entropy of their byte planes",
        "attentions_vs_entropy": "attentions, times the entropy of their byte planes",
    }
    rows = [
        *((text, measured(found.get(name), "%")) for name, text in shares.items()),
        *((text, measured(found.get(name))) for name, text in multiples.items()),
        *((text, measured(found.get(name), digits=4)) for name, text in sizes.items()),
    ]
    return f"## Distance to the limits\n\n{table(('', 'measured'), rows)}"
