"""The register of what is taken from a model: kinds by layer, and numbers of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from h5traces.format.layout import ATTENTION_MEAN, ATTENTIONS, HIDDEN_STATES, KINDS

_STATES: Final = ("token", "hidden")
_HEADS: Final = ("head", "token", "channel")


@dataclass(frozen=True)
class ModelKind:
    """A kind with one array per decoder block.

    Attributes
    ----------
    axes
        Of one layer's array, outermost first.
    definition
        What the numbers are, in one sentence.
    lens
        Name of the hook point in TransformerLens, below ``blocks.N``; None if it has none.
    """

    axes: tuple[str, ...]
    definition: str
    lens: str | None


RESIDUAL_MID: Final = "residual_mid"
ATTENTION_OUTPUT: Final = "attention_output"
MLP_OUTPUT: Final = "mlp_output"
HEAD_OUTPUTS: Final = "head_outputs"
QUERIES: Final = "queries"
KEYS: Final = "keys"
VALUES: Final = "values"
ROUTER_LOGITS: Final = "router_logits"
STATE_NORMS: Final = "state_norms"
ATTENTION_WINDOW: Final = "attention_window"
# Made of the attention weights that a model computes.
WEIGHT_KINDS: Final = (ATTENTIONS, ATTENTION_MEAN, ATTENTION_WINDOW)

MODEL_KINDS: Final[dict[str, ModelKind]] = {
    HIDDEN_STATES: ModelKind(_STATES, KINDS[HIDDEN_STATES].definition, "hook_resid_post"),
    RESIDUAL_MID: ModelKind(
        _STATES,
        "Residual stream between the two sublayers of a decoder block: what the first has added "
        "to, and the MLP or the experts add to.",
        "hook_resid_mid",
    ),
    ATTENTION_OUTPUT: ModelKind(
        _STATES,
        "What the attention of a decoder block adds to the residual stream, after the output "
        "projection and, where there is one, the norm and the factor after it.",
        "hook_attn_out",
    ),
    MLP_OUTPUT: ModelKind(
        _STATES,
        "What the MLP or the experts of a decoder block add to the residual stream, after the "
        "norm and the factor after them, where there are any.",
        "hook_mlp_out",
    ),
    HEAD_OUTPUTS: ModelKind(
        _HEADS,
        "Output of every attention head before the output projection, after a gate where there "
        "is one.",
        "attn.hook_z",
    ),
    QUERIES: ModelKind(
        _HEADS,
        "Queries as they enter the product with the keys: after norms and rotary embedding, "
        "before scaling.",
        "attn.hook_rot_q",
    ),
    KEYS: ModelKind(
        _HEADS,
        "Keys as they enter the product with the queries: after norms and rotary embedding; one "
        "head per group of queries.",
        "attn.hook_rot_k",
    ),
    VALUES: ModelKind(
        _HEADS,
        "Values that the attention weights average; one head per group of queries.",
        "attn.hook_v",
    ),
    ROUTER_LOGITS: ModelKind(
        ("token", "expert"),
        "Scores of the experts by which the router of a decoder block chooses, as transformers "
        "returns them.",
        None,
    ),
    ATTENTIONS: ModelKind(
        KINDS[ATTENTIONS].axes, KINDS[ATTENTIONS].definition, "attn.hook_pattern"
    ),
    ATTENTION_MEAN: ModelKind(KINDS[ATTENTION_MEAN].axes, KINDS[ATTENTION_MEAN].definition, None),
    ATTENTION_WINDOW: ModelKind(
        ("head", "query", "offset"),
        "Attention weights of the last W keys that a query may see, per head: entry o of query i "
        "is that of key i - W + 1 + o, and 0 where there is none.",
        None,
    ),
    STATE_NORMS: ModelKind(
        ("token",),
        "Euclidean length of the hidden state of every token after one decoder block, before the "
        "final norm.",
        None,
    ),
}

# Extra fields about the text of a sample, and where its tokens stand in it.
PROMPT_TEXT: Final = "prompt"
SPANS: Final = "spans"
CHAR_OFFSETS: Final = "char_offsets"
POSITIONS: Final = "positions"
SEQUENCE: Final = "sequence"

LOGITS: Final = "logits"
LOGPROBS: Final = "logprobs"
ENTROPY: Final = "entropy"
TOP_LOGITS: Final = "top_logits"
TOP_LOGIT_IDS: Final = "top_logit_ids"
# What can be asked for of every token; what is stored are the fields below.
TOKEN_KINDS: Final = (LOGITS, LOGPROBS, ENTROPY)
# Extra fields and what they are; most have one entry per token.
TOKEN_FIELDS: Final[dict[str, str]] = {
    LOGITS: "Scores of all tokens of the vocabulary for the next token, as the model returns them.",
    TOP_LOGITS: "The largest of these scores, in descending order.",
    TOP_LOGIT_IDS: "The token ids of `top_logits`.",
    LOGPROBS: "Natural logarithm of the probability that the model gave to this token, from the "
    "tokens before it; NaN for the first.",
    ENTROPY: "Entropy of the distribution of the next token, in nats.",
    CHAR_OFFSETS: "First character of the token in `prompt` and `generated_answer` put together, "
    "and the one after its last.",
    POSITIONS: "Place of the token in `sequence`, ascending, where not all tokens are stored. Then "
    "`tokens` and `prompt_len` count no others, and rows of attentions miss their weights.",
    SEQUENCE: "Ids of all tokens that the model saw (int64); with `positions` only.",
    PROMPT_TEXT: "The text of the prompt.",
    SPANS: "Characters of `generated_answer`: a list of pairs, the first and the one after the "
    "last, or of dicts with `start` and `end`.",
}
