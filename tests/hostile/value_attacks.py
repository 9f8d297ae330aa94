"""Attacks through values that HDF5 stores faithfully: documents, encodings, tables and texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from attack import Attack, register
from hdf5_attacks import EXTRA, LAYER, SAMPLE, TOKENS, put, put_text
from specimen import edit

if TYPE_CHECKING:
    from pathlib import Path

ATTACKS: list[Attack] = []
NESTED = b"[" * 100_000 + b"]" * 100_000
HUGE_NUMBER = b"[" + b"9" * 100_000 + b"]"
# A quick validate reads no arrays, but knows that these are not what was written.
EDITED = "do not fit the sample|text is not UTF-8 padded"
CONFIG = f"{EXTRA}/config"


def attribute(
    name: str, where: str, key: str, value: Any, error: str | None, **options: Any
) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            if isinstance(value, bytes):
                put_text(file[where], key, value)
            else:
                file[where].attrs[key] = value

        edit(path, change)

    register(ATTACKS, error, name=name, **options)(build)


# --- documents in attributes -----------------------------------------------------------------

for where, keys in {
    "/": ("required_features", "fields", "sources"),
    SAMPLE: ("scores", "fields", "source"),
    "kinds/attentions": ("axes",),
}.items():
    for key in keys:
        harmless = {"error": None} if where.startswith("kinds") else {"error": key}
        place = where.split("/")[0] or "root"
        attribute(f"{key}-nests-in-{place}", where, key, NESTED, **harmless, problem=key)
        attribute(f"{key}-of-a-huge-number-in-{place}", where, key, HUGE_NUMBER, **harmless,
                  problem=key)  # fmt: skip

FEATURES = json.dumps([f"feature-{number}" for number in range(50_000)]).encode()
attribute("50000-required-features", "/", "required_features", FEATURES, "requires feature-0,")
attribute("features-of-all-types", "/", "required_features", b'[1, "a", null]', "is not a list of")
attribute("features-of-lists", "/", "required_features", b'[["a"]]', "is not a list of names")
attribute(
    "feature-of-6-mb", "/", "required_features", b'["' + b"a" * 6_000_000 + b'"]', "requires a"
)
attribute("fields-of-numbers", SAMPLE, "fields", b"[1, 2]", "fields")
attribute("fields-not-stored", SAMPLE, "fields", b'["nowhere"]', "listed but not stored",
          problem="listed but not stored")  # fmt: skip
attribute("negative-num-samples", "/", "num_samples", np.int64(-1), "num_samples")
attribute("num-layers-of-2-to-62", "/", "num_layers", np.int64(1 << 62), None, problem=None)
attribute("layers-descend", "/", "layers", np.array([3, 1]), "ascending")
attribute("version-of-a-million-digits", "/", "format_version", b"1." + b"9" * 1_000_000,
          "format version|format_version")  # fmt: skip
attribute("seq-len-of-2-to-62", SAMPLE, "seq_len", np.int64(1 << 62), None, problem="seq_len is")
attribute("label-of-2-to-53", SAMPLE, "label", np.float64(2.0**53), "label")
attribute("text-with-a-broken-escape", SAMPLE, "sample_id", "\u241bXY".encode(), "U.241B without")
attribute("text-not-utf-8", SAMPLE, "sample_id", b"\xff\xfe", "not UTF-8")


# --- encodings -------------------------------------------------------------------------------


def element(
    name: str,
    error: str,
    encoding: str,
    data: Any,
    *,
    problem: str = EDITED,
    attrs: dict[str, Any] | None = None,
) -> None:
    """Another element in the place of ``config``."""

    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            del file[CONFIG]
            values = np.asarray(data)
            made = file.create_dataset(CONFIG, data=values, chunks=values.shape, compression="gzip")
            for key, value in {
                "encoding": encoding,
                "encoding_version": "1",
                **(attrs or {}),
            }.items():
                made.attrs[key] = np.bytes_(value) if isinstance(value, str) else value

        edit(path, change)

    register(ATTACKS, error, name=name, problem=problem)(build)


def document(name: str, error: str, text: bytes) -> None:
    element(name, error, "json", np.array([text]))


FITS = "does not fit its encoding"
document("json-nests", FITS, NESTED)
document("json-nests-in-objects", FITS, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
document("json-nests-in-tags", FITS, b'{"$tuple":[' * 50_000 + b"]}" * 50_000)
document("json-nests-a-little-too-deep", FITS, b"[" * 900 + b"]" * 900)
document("json-of-a-huge-number", FITS, HUGE_NUMBER)
document("json-unknown-tag", FITS, b'{"$object": 1}')
document("json-tag-of-another-type", FITS, b'{"$int": [1]}')
document("json-unhashable-key", FITS, b'{"$dict": [[[1], 2]]}')
document("json-bad-base64", FITS, b'{"$bytes": "a"}')
document("json-bad-pairs", FITS, b'{"$dict": [[1]]}')
document("json-float-of-text", FITS, b'{"$float": "abc"}')
document("json-broken-escape", "U.241B without", "\u241b".encode())
element("json-of-numbers", FITS, "json", np.arange(3))
element("json-of-many", FITS, "json", np.array([b"1", b"2"]))
element("int-of-many", FITS, "int", np.arange(5))
element("int-of-text", FITS, "int", np.array([b"abc"]))
element("unknown-encoding", "is unknown; upgrade", "pickle", np.arange(5, dtype="u1"))
element("unknown-encoding-version", "is unknown; upgrade", "int", [1],
        attrs={"encoding_version": "99"})  # fmt: skip
element("dict-as-a-dataset", "is a dataset, expected a group", "dict", [1], attrs={"keys": '["a"]'})
element("list-as-a-dataset", "is a dataset, expected a group", "list", [1])


def array(name: str, error: str, dtype: str, data: Any, **attrs: Any) -> None:
    element(f"array-of-{name}", error, "array", data, attrs={"dtype": dtype, **attrs})


array("objects", "dtype", "O", np.arange(4))
array("void", "dtype", "V8", np.arange(8, dtype="u1"))
array("structures", "dtype", "i4,i4", np.arange(8, dtype="u1"))
array("structure-of-objects", "dtype", "O,O", np.arange(8, dtype="u1"))
array("dates-of-no-unit", "does not fit its encoding", "M8[zz]", np.arange(8))
array("no-type", "dtype|encoding", "quaternion", np.arange(8))
array("type-by-evaluation", "dtype|encoding", "(1000000000,)f8", np.arange(8))
array("wide-bytes", "dtype|encoding", "S1000000000", np.arange(8, dtype="u1"))
array("wide-texts", "take too many bytes", "<U500000000", np.array([b"a", b"b"]))
array("bool-of-floats", "dtype|encoding", "|b1", np.arange(3.0))
array("complex-of-3-bytes", "dtype|encoding", "<c16", np.zeros((2, 3), "u1"))
array("scalar-of-many", "encoding", "<i8", np.arange(3), ndim=np.int64(0))
array("integers-from-text", "encoding", "<i8", np.array([b"abc"]))
array("texts-from-numbers", "encoding", "<U3", np.arange(3))
element(
    "scalar-of-many",
    FITS,
    "numpy-scalar",
    np.arange(3),
    attrs={"dtype": "<i8", "ndim": np.int64(0)},
)


def container(
    name: str, error: str | None, fill: Any, *, encoding: str = "list", **options: Any
) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            del file[CONFIG]
            made = file.create_group(CONFIG)
            put_text(made, "encoding", encoding.encode())
            put_text(made, "encoding_version", b"1")
            fill(made)

        edit(path, change)

    register(ATTACKS, error, name=name, **options)(build)


def children(group: h5py.Group) -> None:
    for number in range(30_000):
        h5py.h5g.create(group.id, b"%08d" % number)


container("list-of-30000-children", "there are 30000 objects in the sample", children)
container("dict-without-keys", FITS, lambda _: None, encoding="dict", problem=EDITED)
container("dict-keys-nest", FITS, lambda group: put_text(group, "keys", NESTED), encoding="dict",
          problem=EDITED)  # fmt: skip
container("dict-of-more-keys-than-items", FITS, lambda group: put_text(group, "keys", b'["a"]'),
          encoding="dict", problem=EDITED)  # fmt: skip
container("int-as-a-group", "config: .*", lambda _: None, encoding="int", problem=EDITED)


# --- fields of a trace -----------------------------------------------------------------------


def dataset(
    name: str, where: str, data: Any, error: str, problem: str = EDITED, **attrs: Any
) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            values = np.asarray(data)
            chunks = {"chunks": values.shape, "compression": "gzip"} if values.size else {}
            made = put(file, where, values, **chunks)
            for key, value in attrs.items():
                made.attrs[key] = np.bytes_(value)

        edit(path, change)

    register(ATTACKS, error, name=name, problem=problem)(build)


QUESTION, DECODED = f"{SAMPLE}/question", f"{SAMPLE}/tokens_decoded"
dataset("question-of-two-texts", QUESTION, np.array([b"a", b"b"]), "question")
dataset("question-of-numbers", QUESTION, np.arange(3), "question", "wrong_type|expected fixed")
dataset("question-of-no-texts", QUESTION, np.array([], "S3"), "question")
dataset("decoded-tokens-of-numbers", DECODED, np.arange(6), "tokens_decoded", "expected fixed")
dataset("decoded-tokens-with-a-broken-escape", DECODED, np.array(["\u241b".encode()] * 6), "U.241B")
dataset("tokens-of-text", TOKENS, np.array([b"a"] * 6), "tokens", "expected int64")
dataset("tokens-as-objects", TOKENS, np.arange(6), "source_dtype", source_dtype="O")
dataset("tokens-as-wide-text", TOKENS, np.arange(6), "source_dtype", source_dtype="S100000000")
dataset("tokens-as-no-type", TOKENS, np.arange(6), "source_dtype", source_dtype="quaternion")
dataset("tokens-as-structures", TOKENS, np.arange(6), "source_dtype", source_dtype="(1000,1000)f8")
dataset("layer-of-integers", LAYER, np.zeros((6, 8), "i4"), "stored type 'int32'", "a float type")
dataset("layer-of-text", LAYER, np.array([[b"a"]]), "stored type 'text:1'", "a float type")
dataset("layer-as-no-type", LAYER, np.zeros((6, 8), "f2"), "stored type", source_dtype="quaternion")

STEPS = f"{SAMPLE}/hidden_states/steps"
TABLE = "steps"
dataset("steps-negative", STEPS, np.array([[[-1, 8]], [[-1, 8]]]), TABLE)
dataset("steps-huge", STEPS, np.array([[[1 << 40, 1 << 40]]] * 2), TABLE)
dataset("steps-overflow", STEPS, np.array([[[1 << 62, 4]]] * 2), TABLE)
dataset("steps-cancel-out", STEPS, np.array([[[6, 16], [6, -8]]] * 2), TABLE)
dataset("steps-of-one-layer", STEPS, np.array([[[6, 8]]]), TABLE)
dataset("steps-without-axes", STEPS, np.array([6, 8]), TABLE)
dataset("steps-of-floats", STEPS, np.array([[[6.0, 8.0]]] * 2), TABLE)
dataset("steps-of-text", STEPS, np.array([[[b"a", b"b"]]] * 2), TABLE)
dataset("steps-of-nothing", STEPS, np.zeros((2, 0, 2), "i8"), TABLE)
dataset("steps-with-40-axes", STEPS, np.ones((2, 1, 40), "i8"), TABLE)
dataset("steps-with-100-axes", STEPS, np.ones((2, 48, 100), "i8"), TABLE)


def group_for_dataset(name: str, where: str, error: str, **options: Any) -> None:
    def build(path: Path) -> None:
        def change(file: h5py.File) -> None:
            attrs = dict(file[where].attrs)
            del file[where]
            made = file.create_group(where)
            for key, value in attrs.items():
                made.attrs[key] = value

        edit(path, change)

    register(ATTACKS, error, name=name, **options)(build)


PROBLEM = "expected|digest|wrong"
group_for_dataset("tokens-as-a-group", TOKENS, "tokens", problem=PROBLEM)
group_for_dataset("question-as-a-group", QUESTION, "question", problem=PROBLEM)
group_for_dataset("layer-as-a-group", LAYER, "layer_000", problem=PROBLEM)
dataset("layers-as-a-dataset", f"{SAMPLE}/attentions", np.arange(3), "attentions", PROBLEM)
