"""Pictures of traces with matplotlib: layers and tokens, attention, scores by layer, sizes.

>>> import h5traces
>>> trace = h5traces.open("batch_0000.h5")[0]                # doctest: +SKIP
>>> h5traces.plotting.layer_map(trace)                       # doctest: +SKIP
>>> h5traces.plotting.attention_grid(trace, layer=3)         # doctest: +SKIP

Every function draws on the given axes, or on a new figure, and returns what it drew on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from h5traces.arguments import checked
from h5traces.errors import OptionError
from h5traces.format import layout
from h5traces.lazy import needing

with needing("plotting", "matplotlib", extra="plot"):
    import matplotlib as mpl
    from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace

Quantity = Literal["norm", "change", "cosine_before", "cosine_last", "entropy", "sink"]

__all__ = ["Quantity", "attention_grid", "layer_map", "scores_by_layer", "sizes", "token_quantity"]

_TITLES: Final[dict[Quantity, str]] = {
    "norm": "norm of the state",
    "change": "norm of the change",
    "cosine_before": "cosine with the layer before",
    "cosine_last": "cosine with the last layer",
    "entropy": "entropy of attention (nats)",
    "sink": "attention to the first token",
}
# Readable for colour-blind people (Nuñez, Anderton and Renslow 2018).
_COLOURS: Final = "cividis"
_MOST_TOKEN_NAMES: Final = 60


def without_windows() -> None:
    """Draw into files only, which needs no display."""
    mpl.use("Agg")


@checked
def token_quantity(trace: Trace, quantity: Quantity = "norm") -> NDArray[np.float32]:
    """A number for every layer and token.

    Parameters
    ----------
    trace
        A sample with arrays that are not generation steps.
    quantity
        ``norm``: 2-norm of the hidden state. ``change``: of its difference from the layer before.
        ``cosine_before``, ``cosine_last``: cosine with the state of the layer before, or of the
        last one. ``entropy``: of attention in nats, rows scaled to sum to 1, mean over heads.
        ``sink``: share of attention on the first token, mean over heads.

    Returns
    -------
    numpy.ndarray
        float32 ``(layers, tokens)``; NaN where there is no layer before, or the layer is absent.

    Raises
    ------
    OptionError
        The sample does not store what the quantity is made of, or the quantity is unknown.
    """
    if quantity not in get_args(Quantity):
        message = f"quantity={quantity!r}, expected one of {', '.join(get_args(Quantity))}"
        raise OptionError(message)
    is_of_states = quantity not in ("entropy", "sink")
    if not is_of_states and trace._stored.recomputes(layout.ATTENTIONS):
        return np.stack([_of_rows(trace, name, quantity) for name in _stored_names(trace)])
    layers = _layers(trace, layout.HIDDEN_STATES if is_of_states else layout.ATTENTIONS)
    if not is_of_states:
        return np.stack([_of_attention(each, quantity) for each in layers])
    found, last = [], layers[-1]
    for number, layer in enumerate(layers):
        before = layers[number - 1] if number else np.full_like(layer, np.nan)
        found.append(_of_states(layer, before, last, quantity))
    return np.stack(found)


@checked
def layer_map(trace: Trace, quantity: Quantity = "norm", *, ax: Axes | None = None) -> Axes:
    """A heat map of layers and tokens; colours span the 1st to the 99th percentile.

    Parameters and errors are those of `token_quantity`.
    """
    values = token_quantity(trace, quantity)
    axes = _axes(ax, (max(5, values.shape[1] / 5), max(2.5, values.shape[0] / 5)))
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    picture = axes.imshow(values, _COLOURS, aspect="auto", vmin=low, vmax=high, origin="lower")
    axes.figure.colorbar(picture, ax=axes, label=_TITLES[quantity])
    kind = layout.ATTENTIONS if quantity in ("entropy", "sink") else layout.HIDDEN_STATES
    numbers = _stored(trace, kind).layers
    names = ["embedding" if each is None else str(each) for each in numbers]
    step = max(1, len(names) // 16)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylabel("layer")
    _name_tokens(axes, trace, values.shape[1])
    axes.set_title(_title(trace))
    return axes


@checked
def attention_grid(trace: Trace, layer: int, *, heads: Sequence[int] | None = None) -> Figure:
    """The attention of every head of a layer, ``(query, key)`` each, on a square-root scale.

    Raises
    ------
    LayerIndexError
        The sample does not store that layer.
    OptionError
        There is no such head.
    """
    kind = _stored(trace, layout.ATTENTIONS).kind
    trace._stored.check_layer(layer, kind)
    name = trace._stored.array_name(kind, layer)
    weights = np.asarray(trace._stored.read_layer(kind, name), np.float32)
    weights = weights[None] if weights.ndim == 2 else weights
    chosen = range(len(weights)) if heads is None else heads
    outside = [each for each in chosen if not 0 <= each < len(weights)]
    if outside:
        message = f"head {outside[0]} is not stored; layer {layer} has {len(weights)} heads"
        raise OptionError(message)
    columns = min(8, max(1, math.ceil(math.sqrt(len(chosen)))))
    rows = math.ceil(len(chosen) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 1.75 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for head, axes in zip(chosen, grid.flat, strict=False):
        axes.imshow(np.sqrt(weights[head]), _COLOURS, vmin=0, vmax=1)
        axes.set_title("mean of heads" if kind == layout.ATTENTION_MEAN else f"head {head}", size=8)
    figure.suptitle(f"{_title(trace)}, layer {layer}")
    return figure


@checked
def scores_by_layer(
    scores: Mapping[str, Sequence[float]],
    *,
    layers: Sequence[int] | None = None,
    ylabel: str = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Lines of scores by layer, such as the accuracy of probes.

    Parameters
    ----------
    scores
        By name, a number for each layer.
    layers
        The model's own layer numbers; 0, 1 and so on by default.
    ylabel
        What the scores are.
    ax
        Where to draw.
    """
    axes = _axes(ax, (6, 3.5))
    for (name, values), marker in zip(scores.items(), "os^dvP*X" * len(scores), strict=False):
        numbers = range(len(values)) if layers is None else layers
        axes.plot(numbers, values, marker=marker, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel(ylabel)
    axes.legend()
    return axes


@checked
def sizes(archives: Mapping[str, Archive], *, ax: Axes | None = None) -> Axes:
    """Bars of the stored bytes of archives, by kind.

    Parameters
    ----------
    archives
        By name; such as one archive in several tiers.
    ax
        Where to draw.
    """
    axes = _axes(ax, (6, 0.6 * len(archives) + 1.2))
    stored = {name: _stored_nbytes(archive) for name, archive in archives.items()}
    left = np.zeros(len(stored))
    for kind in dict.fromkeys(kind for each in stored.values() for kind in each):
        widths = np.array([each.get(kind, 0) / 1e6 for each in stored.values()])
        axes.barh(list(stored), widths, left=left, label=kind)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.legend()
    return axes


def _stored_nbytes(archive: Archive) -> dict[str, int]:
    """Bytes of chunks by kind; all else is ``other``."""
    found: dict[str, int] = {}
    for trace in archive:
        for path in trace._stored.objects:
            kind = path.partition("/")[0]
            name = kind if kind in trace._stored.kinds else "other"
            nbytes = sum(size for _, size in trace._stored.ranges(path))
            found[name] = found.get(name, 0) + nbytes
    return found


def _stored_names(trace: Trace) -> list[str]:
    """Names of the layers whose attention is computed."""
    return trace._stored.listed_names(layout.ATTENTIONS, trace._stored.selected)


def _of_rows(trace: Trace, name: str, quantity: Quantity) -> NDArray[np.float32]:
    """A number of attention for every token, of some rows at a time."""
    blocks = trace._stored.attention_blocks(name)
    return np.concatenate([_of_attention(rows, quantity) for _, rows in blocks])


def _stored(trace: Trace, kind: str) -> Any:
    """The layers of a kind, or the mean over heads in the place of attentions."""
    stored = trace._stored
    is_computed = stored.recomputes(kind)
    is_mean = kind == layout.ATTENTIONS and kind not in stored.objects and not is_computed
    name = layout.ATTENTION_MEAN if is_mean else kind
    found = trace._value(name, "numpy") if is_computed or name in stored.objects else ()
    if not len(found) or f"{name}/{layout.STEPS_TABLE}" in stored.objects:
        message = f"{stored.place}: stores no {kind} that can be drawn, or generation steps"
        raise OptionError(message)
    return found


def _layers(trace: Trace, kind: str) -> list[NDArray[np.float32]]:
    """All arrays; those of layers that the source had as None are NaN."""
    found = list(_stored(trace, kind))
    absent = np.full_like(next(each for each in found if each is not None), np.nan)
    return [np.asarray(absent if each is None else each, np.float32) for each in found]


def _of_states(
    layer: NDArray[np.float32],
    before: NDArray[np.float32],
    last: NDArray[np.float32],
    quantity: str,
) -> NDArray[np.float32]:
    if quantity in ("norm", "change"):
        found: NDArray[np.float32] = np.linalg.norm(
            layer if quantity == "norm" else layer - before, axis=1
        )
        return found
    other = before if quantity == "cosine_before" else last
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.linalg.norm(layer, axis=1) * np.linalg.norm(other, axis=1)
        cosines: NDArray[np.float32] = np.einsum("th,th->t", layer, other) / lengths
    return cosines


def _of_attention(weights: NDArray[np.float32], quantity: str) -> NDArray[np.float32]:
    rows = weights if weights.ndim == 3 else weights[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = rows / rows.sum(axis=-1, keepdims=True)
        if quantity == "sink":
            return np.asarray(shares[..., 0].mean(axis=0))
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.asarray(-(shares * logs).sum(axis=-1).mean(axis=0))


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return plt.figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _name_tokens(axes: Axes, trace: Trace, length: int) -> None:
    axes.set_xlabel("token")
    texts = trace.get(layout.TOKENS_DECODED)
    if texts is not None and length <= min(len(texts), _MOST_TOKEN_NAMES):
        # A dollar sign would begin a formula.
        names = [each.strip().replace("$", r"\$") for each in texts[:length]]
        axes.set_xticks(range(length), names, rotation=90, size=8)


def _title(trace: Trace) -> str:
    name = trace.metadata.sample_id
    shown = f"sample {trace.ordinal}" if name is None else name
    return shown.replace("$", r"\$")
