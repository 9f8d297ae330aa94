"""Every path and attribute name of an archive, in one place; ``schema/SPEC.md`` explains them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container

HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
FORMAT_NAME: Final = "h5traces"
SCALES_FORMAT: Final = "h5traces-scales"
FEATURES_FORMAT: Final = "h5traces-features"
# Other HDF5 files of h5traces, by their attribute 'format', and what they are for.
OTHER_FORMATS: Final = {
    SCALES_FORMAT: ("scales", "pass it where an archive is written, as its scales"),
    FEATURES_FORMAT: ("features", "read it with h5py"),
}
FORMAT_VERSION: Final = "1.0"
FORMAT_MAJOR: Final = 1
KNOWN_VERSION: Final = (1, 0)
# Names a reader must know to read an archive rightly.
PRECISION_FEATURE: Final = "encoded-layers"
KNOWN_FEATURES: Final = frozenset({PRECISION_FEATURE})

KINDS_GROUP: Final = "kinds"
SAMPLES_GROUP: Final = "samples"
INDEX_GROUP: Final = "index"
SCALES_GROUP: Final = "scales"
INDEX_TABLE: Final = "index/samples"
# All that the format has in the root group.
ROOT_GROUPS: Final = frozenset({KINDS_GROUP, SAMPLES_GROUP, INDEX_GROUP, SCALES_GROUP})
EXTRA_GROUP: Final = "extra"

HIDDEN_STATES: Final = "hidden_states"
ATTENTIONS: Final = "attentions"
ATTENTION_MEAN: Final = "attention_mean"
EMBEDDING: Final = "embedding"
STEPS_TABLE: Final = "steps"
EXCEPTIONS_TABLE: Final = "exceptions"
# Stands for the embedding in the table of exceptions.
EMBEDDING_LAYER: Final = -1
# Datasets beside the layers of a kind that are not layers themselves.
TABLES: Final = frozenset({STEPS_TABLE, EXCEPTIONS_TABLE})

TOKENS: Final = "tokens"
TOKENS_DECODED: Final = "tokens_decoded"
ATTENTION_MASK: Final = "attention_mask"
# The last that has text is the answer that people look for.
ANSWER_FIELDS: Final = ("generated_text", "generated_answer", "generated_answer_clean")
TEXT_FIELDS: Final = ("question", *ANSWER_FIELDS)

# Legacy dict keys that live in attributes of the sample group.
QUESTION_ID: Final = "question_id"
PROMPT_LENGTH: Final = "prompt_length"
LABEL: Final = "label"

IMAGE_ATTRS: Final = {
    "CLASS": "IMAGE",
    "IMAGE_VERSION": "1.2",
    "IMAGE_SUBCLASS": "IMAGE_GRAYSCALE",
}
# Which values viewers show black and white. Derived, so that anyone may change it.
IMAGE_RANGE: Final = "IMAGE_MINMAXRANGE"

# Attributes of layered arrays.
LAYER_ATTRS: Final = frozenset(
    {"site", "source_dtype", "cast_from", "container", "sequence", "digest"}
    | {"num_nan", "num_inf", "num_overflow", "num_to_zero", "num_to_subnormal", "num_changed"}
    | {"encoding", "encoding_version", "formula", "restored_dtype", "kept_exact"}
    | {"scales", "zero_point", "spacing", "max_error_sigma", "levels", "mantissa_bits"}
    | {"exceptions", "num_exceptions"}
    | {"mask", "window", "scale", "soft_cap", "slopes", "sinks"}
)
# Attributes of all groups and datasets inside samples.
OBJECT_ATTRS: Final = LAYER_ATTRS | {
    *("dtype", "torch_dtype", "ndim", "keys", "source_axes", "lists_embedding", "absent"),
    *IMAGE_ATTRS,
}

SITE_EMBEDDING: Final = "embedding"
SITE_BLOCK_OUTPUT: Final = "block_output"
SITE_FINAL_NORM: Final = "final_norm"

# Objects and attributes of users.
USER_PREFIX: Final = "x_"


@dataclass(frozen=True)
class KindDefinition:
    """What one kind of layered array is; `axes` are those of one layer, outermost first."""

    axes: tuple[str, ...]
    # One sentence for people who meet the archive without its software.
    definition: str
    # Whether viewers should show the last two axes as a picture.
    image: bool


KINDS: Final = {
    HIDDEN_STATES: KindDefinition(
        axes=("token", "hidden"),
        definition="Residual-stream state of every token after one decoder block; the attribute "
        "'site' of each dataset names the exact place.",
        image=False,
    ),
    ATTENTIONS: KindDefinition(
        axes=("head", "query", "key"),
        definition="Attention weights after the softmax, per head; row = query token, column = "
        "key token.",
        image=True,
    ),
    ATTENTION_MEAN: KindDefinition(
        axes=("query", "key"),
        definition="Attention weights reduced over the heads of one decoder block; the attribute "
        "'reduction' names how, where known.",
        image=True,
    ),
}


def is_picture(path: str) -> bool:
    """Whether viewers should show a dataset, given by its path in a sample, as a picture."""
    kind, _, name = path.partition("/")
    return kind in KINDS and KINDS[kind].image and name not in TABLES


# Definition of kinds that the format does not name.
FURTHER_KIND: Final = (
    "One array per decoder block, as the source's field of the kind's name had it."
)
# Definition of kinds of which no decoder block is known.
BY_POSITION: Final = (
    "Arrays in the order of the source's list, which did not say whether the first belongs to the "
    "embedding or to the first decoder block."
)
# Names of a sample's own objects and attributes, and of the fields of legacy dicts in them.
_OTHER_PLACES: Final = frozenset(
    {TOKENS, TOKENS_DECODED, *TEXT_FIELDS, EXTRA_GROUP, QUESTION_ID, PROMPT_LENGTH, LABEL, *KINDS}
)
# Users' own objects begin with x_.
_KIND_NAME = re.compile(r"(?!x_)[A-Za-z][A-Za-z0-9_.-]{0,99}")
_LAYER_NAME = re.compile(r"(layer|position)_(\d{3,})\Z", re.ASCII)


def parse_version(version: str) -> tuple[int, int] | None:
    """Major and minor of a format version, None for other text."""
    found = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", version, flags=re.ASCII)
    return (int(found[1]), int(found[2])) if found else None


def sample_name(ordinal: int) -> str:
    """The group name of a sample: 8 digits, so that HDF5 tools list samples in order."""
    return f"{ordinal:08d}"


def is_sample_name(name: str) -> bool:
    """Whether `name` is an 8-digit (or longer) ordinal."""
    return re.fullmatch(r"\d{8,}", name) is not None


def sample_path(ordinal: int) -> str:
    """The absolute HDF5 path of a sample's group."""
    return f"/{SAMPLES_GROUP}/{sample_name(ordinal)}"


def layer_name(layer: int) -> str:
    """The dataset name of a decoder block's array: at least 3 digits of its 0-based number."""
    return f"layer_{layer:03d}"


def position_name(position: int) -> str:
    """The dataset name of an array of which only its place in the source's list is known."""
    return f"position_{position:03d}"


def parse_layer_name(name: str) -> int | None:
    """The number in a dataset name, of a decoder block or of a position; None for other names."""
    found = _LAYER_NAME.match(name)
    return int(found[2]) if found else None


def is_position(name: str) -> bool:
    """Whether a dataset name claims no decoder block: ``position_000``."""
    found = _LAYER_NAME.match(name)
    return found is not None and found[1] == "position"


def axes_of_kind(kind: str, axes: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
    """Axes of one layer's array: of a kind that the format names, else those that are given."""
    return KINDS[kind].axes if kind in KINDS else axes


def may_be_kind(name: str) -> bool:
    """Whether a further field may be a separate kind: no other place in a sample has the name."""
    return name not in _OTHER_PLACES and _KIND_NAME.fullmatch(name) is not None


def is_foreign(path: str, kinds: Container[str]) -> bool:
    """Whether an object at this path below a sample is none of the format's, by its names.

    `kinds` are the archive's. Fields below ``extra`` may have any name.
    """
    first, _, rest = path.partition("/")
    if first in (EXTRA_GROUP, TOKENS, TOKENS_DECODED, ATTENTION_MASK, *TEXT_FIELDS):
        return False
    name = rest or first
    if name.startswith(USER_PREFIX) or first not in kinds:
        return True
    return bool(rest) and rest not in (EMBEDDING, *TABLES) and parse_layer_name(rest) is None


def escape_key(key: str) -> str:
    """A legacy dict key as an HDF5 link name.

    Percent-encodes ``%``, ``/``, NUL and, where they are all of the name, dots: HDF5 reads ``/``
    as a path separator, ``.`` as the group itself and ends names at NUL. An empty key becomes
    ``%``. Lone surrogates take the escape of `h5traces.format.text`.
    """
    if not key:
        return "%"
    escaped = key.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    if set(escaped) == {"."}:
        escaped = escaped.replace(".", "%2E")
    return escaped


def unescape_key(name: str) -> str:
    """The legacy dict key that `escape_key` made a link name of."""
    if name == "%":
        return ""
    return re.sub(r"%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), name)
