"""The figures of `precision.py` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from suite.report import table

from downstream.coding import encoding_of_tier
from downstream.patching import EVERY_LAYER, MEAN
from downstream.rates import POOLED_VALUES
from downstream.weights import HEAD_MEAN, SMOOTHING, THRESHOLD
from h5traces.format.precision import TIERS

if TYPE_CHECKING:
    from collections.abc import Callable

Model = dict[str, Any]


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "# Precision tiers, measured\n\n"
        "Written by `python benchmarks/precision.py` (`--help` says how everything is measured); "
        f"all figures in `precision.json`. {versions}. Errors are in sigma, the standard deviation "
        "of a channel on the calibration texts; brackets are 95 % intervals over texts."
    ]
    for model in results["models"].values():
        parts += _model(model)
    return "\n\n".join(parts) + "\n"


def _model(model: Model) -> list[str]:
    sections: dict[str, Callable[[Model], str]] = {
        "Bits of hidden states": _bits,
        "Where the bits go": _parts,
        "Errors of hidden states": _errors,
        "Attentions": _attentions,
    }
    if "patching" in model:
        sections = {"Tiers": tier_table, **sections, "Patched into the model": _patching}
        sections |= {"Probes": _probes, "Yardsticks": _yardsticks}
    else:
        sections["Sentence embeddings"] = _embeddings
    return [_about(model), *(f"### {title}\n\n{of(model)}" for title, of in sections.items())]


def _about(model: Model) -> str:
    about = model["about"]
    layers = about["layers"]
    which = "" if len(layers) == about["num_layers"] else f" (of which {layers} are looked at)"
    seen = ""
    if "same_corpus_as_training" in about:
        same = "the very" if about["same_corpus_as_training"] else "**not the**"
        seen = f"; with this Python they are split from {same} corpus that training had"
    return (
        f"## {about['name']}\n\n{about['family']}, {about['parameters'] / 1e6:.1f} million "
        f"parameters, {about['num_layers']} layers{which}, hidden size {about['hidden_size']}, "
        f"{about['num_heads']} heads. Texts: {about['texts']}{seen}. "
        f"{about['calibration_texts']} to calibrate with, {about['held_out_texts']} others to "
        f"measure on ({about['held_out_tokens']:,} tokens, {about['mean_tokens']:.1f} on average)."
    )


# --- tables ---------------------------------------------------------------------------------------


def tier_table(model: Model) -> str:
    """The tiers of a causal model."""
    return table(
        (
            "tier",
            "hidden states",
            "bits per value, large chunks",
            "samples as they are",
            "NRMSE",
            "of differences of layers",
            "largest error / sigma",
            "change of loss, mean of layers",
            "change of probe AUROC, worst layer",
            f"edges that flip at {THRESHOLD:g}",
        ),
        [_tier_row(model, tier) for tier in TIERS],
    )


def _tier_row(model: Model, tier: str) -> list[str]:
    name = encoding_of_tier(tier)
    states, effects = model["states"][name], model["patching"]["by_encoding"][name]
    return [
        tier,
        _state_text(name),
        f"{states['bits_pooled']:.2f}",
        f"{states['bits_per_sample']:.2f}",
        _percent(states["nrmse"]),
        _range(states["nrmse_of_differences"]) if states["nrmse_of_differences"] else "",
        f"{states['max_error_sigma']:.3g}",
        _interval(effects[MEAN]["loss_change"]),
        _interval(model["probes"]["by_encoding"][name]["worst"]),
        _tier_flips(model, tier),
    ]


def _state_text(name: str) -> str:
    kind, _, amount = name.partition(" ")
    if kind == "step":
        return f"steps of {amount} sigma"
    return name if not amount else f"float16 rounded to {name}"


def _tier_flips(model: Model, tier: str) -> str:
    precision = {str(name): each for name, each in TIERS.items()}[tier]
    names = []
    if precision.attention_bits is not None:
        names.append(f"{precision.attention_bits} bits")
    elif precision.head_mean != "only":
        bits = precision.mantissa_bits
        names.append("float16" if bits is None else f"{bits} mantissa bits")
    if precision.head_mean != "none":
        names.append(HEAD_MEAN)
    found = model["attentions"]
    return "; ".join(f"{name}: {_flips(found[name]['flip_share'])}" for name in names)


def _bits(model: Model) -> str:
    rows = []
    for name, found in model["states"].items():
        has_formula = "formula" in found
        cells = [_state_text(name), f"{found['formula']:.2f}" if has_formula else ""]
        for which in ("bits_per_sample", "bits_pooled"):
            cells.append(f"{found[which]:.2f}")
            cells.append(f"{100 * found[f'{which}_deviation']:+.1f} %" if has_formula else "")
        layers = found["bits_pooled_by_layer"]
        cells += [
            f"{min(layers):.2f} to {max(layers):.2f}",
            f"{found['exceptions_per_million']:.1f}",
            str(found["kept_exact"]),
        ]
        rows.append(cells)
    heading = (
        "encoding",
        "formula",
        "samples as they are",
        "of the formula",
        "large chunks",
        "of the formula",
        "large chunks by layer",
        "exceptions per million",
        "arrays kept in float16",
    )
    return (
        "Bits per value, exceptions included but for the bits by layer. The formula is "
        "2.05 - log2(step). *Samples as they are* have chunks of one text and one layer; *large "
        "chunks* have about "
        f"{POOLED_VALUES:,} values, as those of a large model, without first tokens.\n\n"
        f"{table(heading, rows)}"
    )


def _parts(model: Model) -> str:
    rows = []
    for name, found in model["states"].items():
        if "parts" in found:
            parts = found["parts"]
            rows.append(
                [
                    _state_text(name),
                    f"{parts['formula']:.3f}",
                    *(f"{parts[each]:+.3f}" for each in _PARTS),
                    f"{found['bits_pooled']:.3f}",
                ]
            )
    return (
        "Of large chunks; the parts add up. *Finer*: steps are rounded down to few significant "
        "bits. *Spread*: channels vary more or less than in calibration. *Shape*: values are not "
        "distributed as a Gaussian, and a step that is not small tells more than the formula has. "
        "*Coder*: what deflate takes beyond the order-0 entropy of the numbers; less than nothing "
        f"where it finds repeats.\n\n{table(('encoding', 'formula', *_PARTS, 'bits'), rows)}"
    )


_PARTS: Final = ("finer", "spread", "shape", "coder", "exceptions")


def _errors(model: Model) -> str:
    rows = []
    for name, found in model["states"].items():
        between, layers = found["nrmse_of_differences"], found["nrmse_by_layer"]
        bound = found["bound_sigma"]
        rows.append(
            [
                _state_text(name),
                _percent(found["nrmse"]),
                _range(layers),
                f"{found['max_error_sigma']:.4f}",
                "" if bound is None else f"{bound:g}",
                _range(between) if between else "",
            ]
        )
    heading = (
        "encoding",
        "NRMSE",
        "by layer",
        "largest error / sigma",
        "bound",
        "NRMSE of differences of neighbouring layers",
    )
    return table(heading, rows)


def _attentions(model: Model) -> str:
    rows = [
        [
            name,
            f"{found['bits_per_entry']:.2f}",
            f"{found['bits_per_attention']:.2f}" if "bits_per_attention" in found else "",
            _flips(found["flip_share"]),
            f"{found['flips']:,}",
            f"{found['kl_per_row']:.1e}" if found["kl_per_row"] else "0",
        ]
        for name, found in model["attentions"].items()
    ]
    edges = model["attentions"]["float16"]["edges"]
    heading = (
        "encoding",
        "bits per entry",
        "per head",
        "edges that flip",
        "their number",
        "KL per row, nats",
    )
    return (
        f"Chunks of the samples as they are. Edges: a head mean above {THRESHOLD:g}, keys "
        f"up to the query; the original has {edges:,}. KL after {SMOOTHING:g} is added to every "
        "weight.\n\n"
        f"{table(heading, rows)}"
    )


def _patching(model: Model) -> str:
    rows = []
    for name, places in model["patching"]["by_encoding"].items():
        singles = {each: places[each] for each in places if each not in (MEAN, EVERY_LAYER)}
        worst = max(singles, key=lambda each: singles[each]["loss_change"]["value"])
        rows.append(
            [
                _state_text(name),
                _interval(places[MEAN]["loss_change"]),
                _where(places[worst]["loss_change"], worst),
                _interval(places[EVERY_LAYER]["loss_change"]),
                _small(places[MEAN]["kl"]["value"]),
                _small(places[EVERY_LAYER]["kl"]["value"]),
            ]
        )
    heading = (
        "encoding",
        "change of loss, mean of single layers",
        "worst single layer",
        "every layer at once",
        "KL, mean of single layers",
        "KL, every layer at once",
    )
    loss = model["patching"]["loss"]
    return (
        f"Nats per token. The loss itself is {loss['value']:.3f} [{loss['low']:.3f}, "
        f"{loss['high']:.3f}].\n\n{table(heading, rows)}"
    )


def _probes(model: Model) -> str:
    probes = model["probes"]
    layers = model["about"]["layers"]
    rows = []
    for name, found in probes["by_encoding"].items():
        worst, single = found["worst"], found["worst_of_all"]
        rows.append(
            [
                _state_text(name),
                _interval(found["mean"]),
                _where(worst, f"layer {layers[worst['layer']]}"),
                _where(single, f"{single['task']}, layer {layers[single['layer']]}"),
            ]
        )
    tasks = "; ".join(
        f"*{task}*: {text} ({100 * probes['positives'][task]:.0f} % of tokens, AUROC by layer "
        f"{min(probes['auroc'][task]):.3f} to {max(probes['auroc'][task]):.3f})"
        for task, text in probes["tasks"].items()
    )
    number = sum(map(len, probes["auroc"].values()))
    heading = (
        "encoding",
        "change of AUROC, mean of tasks and layers",
        "mean of tasks, worst layer",
        f"worst of all {number}",
    )
    return (
        f"{tasks}.\n\n{table(heading, rows)}\n\nThe worst of several changes is below zero even "
        "where nothing but chance is at work, and its interval does not allow for the choice; the "
        "mean does not have that flaw."
    )


def _yardsticks(model: Model) -> str:
    rows = [
        [
            f"computing in {name}",
            _percent(found["nrmse"]),
            _interval(found["loss_change"]),
            _small(found["kl"]["value"]),
            _flips(found["flip_share"]),
        ]
        for name, found in model["yardsticks"].items()
    ]
    for place in (MEAN, EVERY_LAYER):
        found = model["patching"]["rounding"][place]
        changes = _interval(found["loss_change"]), _small(found["kl"]["value"])
        rows.append([f"states rounded to float16, {place}", "", *changes, ""])
    heading = ("", "NRMSE", "change of loss", "KL", "edges that flip")
    return f"Against computing in float32, and nothing put in.\n\n{table(heading, rows)}"


def _embeddings(model: Model) -> str:
    rows = [
        [
            _state_text(name),
            f"{found['cosine_mean']:.6f}",
            f"{found['cosine_least']:.6f}",
            f"{100 * found['nearest_kept']:.1f} %",
            f"{100 * found['neighbours_kept']:.1f} %",
        ]
        for name, found in model["embeddings"].items()
    ]
    heading = ("encoding", "cosine, mean", "least", "nearest text stays", "of five nearest stay")
    return (
        "The mean of the last layer's states over the tokens of a text, against the original "
        f"one, and its neighbours among the other texts.\n\n{table(heading, rows)}"
    )


# --- cells ----------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %" if share else "0"


def _range(shares: list[float]) -> str:
    low, high = _percent(min(shares)), _percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _flips(share: float) -> str:
    return f"{100 * share:.2f} %" if share else "0"


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _interval(found: dict[str, Any]) -> str:
    if found["value"] == found["low"] == found["high"] == 0:
        return "0"
    return f"{_change(found['value'])} [{_change(found['low'])}, {_change(found['high'])}]"


def _where(found: dict[str, Any], place: str) -> str:
    text = _interval(found)
    return text if text == "0" else f"{text}, {place}"


def _change(value: float) -> str:
    text = f"{value:+.4f}"
    return "0.0000" if text in ("-0.0000", "+0.0000") else text
