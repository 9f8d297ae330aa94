"""What of a family can be extracted, as a row of the table of docs/families.md."""

from __future__ import annotations

from family_models import FAMILIES, make_family

from h5traces.errors import ExtractionError
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.batches import check_batches
from h5traces.extract.capture import padded
from h5traces.extract.sites import find_sites
from h5traces.extract.trials import check_capture, with_kinds, with_weights

HEADER = [
    "| family | class | states | attentions | other kinds | batches |",
    "|---|---|---|---|---|---|",
]
# Letters of the page, and a kind that stands for each.
LETTERS = {
    "M": "residual_mid",
    "A": "attention_output",
    "F": "mlp_output",
    "H": "head_outputs",
    "Q": "queries",
    "R": "router_logits",
}
NONE = "\N{EN DASH}"
_PAD = 2


def row_of(family):
    """The row of one family; it fails where hidden states are not those of transformers."""
    model = make_family(family)
    anatomy = anatomy_of(model)
    check_capture(model, anatomy, ("hidden_states",))
    kinds, attentions = ("hidden_states",), NONE
    try:
        anatomy = with_weights(anatomy)
        check_capture(model, anatomy, ("attentions",))
        found = [layer for layer, each in enumerate(anatomy.attentions) if each is not None]
        is_everywhere = len(found) == anatomy.num_layers
        attentions = "yes" if is_everywhere else f"layers {', '.join(map(str, found))}"
        kinds = ("hidden_states", "attentions")
    except ExtractionError as error:
        _expect("no block has attention weights", error)
    try:
        check_batches(model, anatomy, kinds, _PAD)
        batches = "yes"
    except ExtractionError as error:
        _expect("cannot be run in batches", error)
        batches = NONE
    inputs = anatomy.inputs(padded([range(11)], _PAD, anatomy.device))
    sites = find_sites(anatomy, inputs)
    others = " ".join(letter for letter, kind in LETTERS.items() if kind in sites) or NONE
    if "queries" in sites:
        some = with_kinds(anatomy, ("queries", "keys"), range(anatomy.num_layers))
        if {*some.recomputed} == {*sites["queries"]}:
            others += " W"
    name = type(model).__name__
    return f"| {family} | {name} | yes | {attentions} | {others} | {batches} |"


def _expect(message, error):
    if message not in str(error):
        raise error


def lines_of_table():
    """What stands in the page between its markers."""
    rows = list(map(row_of, FAMILIES))
    num_batches = sum(each.endswith("| yes |") for each in rows)
    summary = f"{len(rows)} families: all with hidden states, {num_batches} in batches."
    return [summary, "", *HEADER, *rows]
