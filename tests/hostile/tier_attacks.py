"""Attacks through what decodes lossy layers: scales, attributes of encodings, exceptions."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from attack import Attack, register
from hdf5_attacks import put_text
from specimen import SAMPLE, batch, edit

import h5traces
from h5traces.format.digests import dataset_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ATTACKS: list[Attack] = []
LAYER = f"{SAMPLE}/hidden_states/layer_000"
WEIGHTS = f"{SAMPLE}/attentions/layer_000"
TABLE = f"{SAMPLE}/hidden_states/exceptions"
SCALE = "scales/hidden_states/layer_000"
EDITED = "do not fit the sample"
MiB = 1 << 20


def write(path: Path) -> None:
    """A lossy archive at `path`, with exceptions in two layers."""
    items = batch()
    for item in items:
        item["hidden_states"][0][0, 0] = 3000
        item["hidden_states"][1][1, 1] = np.nan
    source = path.with_suffix(".pkl")
    source.write_bytes(pickle.dumps(items))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = h5traces.convert(source, path, precision="fine")
    assert report.ok
    source.unlink()


def attack(
    name: str,
    change: Callable[[h5py.File], object],
    error: str | None,
    problem: str | None = "",
) -> None:
    """An attack that changes the HDF5 part."""
    register(ATTACKS, error, problem=problem, name=f"tier-{name}")(
        lambda path: edit(path, lambda file: change(file) and None)
    )


def attribute(
    name: str, where: str, key: str, value: Any, error: str | None, problem: str | None = ""
) -> None:
    def change(file: h5py.File) -> None:
        if value is None:
            del file[where].attrs[key]
        elif isinstance(value, bytes):
            put_text(file[where], key, value)
        else:
            file[where].attrs[key] = value

    attack(name, change, error, problem)


def replace(file: h5py.File, where: str, values: np.ndarray) -> None:
    """Other values under a digest that fits them, as whoever wants to deceive would write."""
    attrs = dict(file[where].attrs)
    del file[where]
    made = file.create_dataset(
        where, data=values, chunks=values.shape, shuffle=True, compression="gzip"
    )
    for key, value in attrs.items():
        made.attrs[key] = value
    put_text(made, "digest", dataset_digest(values.dtype.name, values).encode())


def values(name: str, where: str, error: str | None, change: Any, problem: str | None = "") -> None:
    attack(name, lambda file: replace(file, where, change(file[where][()].copy())), error, problem)


def first(value: float) -> Any:
    def change(found: np.ndarray) -> np.ndarray:
        found[0] = value
        return found

    return change


# --- values of scales; a quick validate reads no arrays ------------------------------------------

for title, number in {"nan": np.nan, "inf": np.inf, "negative": -1.0, "zero": 0.0}.items():
    values(f"step-{title}", f"{SCALE}/step", "greater than zero", first(number), None)
values("offset-nan", f"{SCALE}/offset", "all values finite", first(np.nan), None)
values("offset-inf", f"{SCALE}/offset", "all values finite", first(np.inf), None)
values("step-of-3e38", f"{SCALE}/step", "float32 does not reach", first(3e38), None)


@register(ATTACKS, "do not fit their digest", problem=None, name="tier-steps-exchanged")
def steps_exchanged(path: Path) -> None:
    def change(file: h5py.File) -> None:
        one, other = (file[f"scales/hidden_states/layer_{number:03d}/step"] for number in (0, 1))
        one[...], other[...] = other[()], one[()]

    edit(path, change)


attribute("scale-with-another-digest", f"{SCALE}/step", "digest", b"0" * 32, "fit their digest",
          None)  # fmt: skip
attribute("scale-without-a-digest", f"{SCALE}/step", "digest", None, None, "'digest' is missing")

# --- sizes and links of scales ---------------------------------------------------------------

WIDTHS = "have .* channels"
for title in ("step", "offset", "sigma"):
    values(f"{title}-of-60-million", f"{SCALE}/{title}", WIDTHS, lambda _: np.zeros(60 * MiB, "f4"))


def all_wide(file: h5py.File) -> None:
    for name in ("step", "offset", "sigma"):
        replace(file, f"{SCALE}/{name}", np.ones(30 * MiB, "f4"))


attack("scales-of-360-mb", all_wide, "scales take .* bytes; the limit", "its scale .* channels")


def claimed(file: h5py.File, length: int, chunk: int) -> None:
    del file[f"{SCALE}/step"]
    file.create_dataset(f"{SCALE}/step", (length,), "f4", chunks=(chunk,), compression="gzip")


attack("step-claims-4-tb", lambda file: claimed(file, 1 << 40, MiB), "takes .* bytes; the limit")
attack("step-without-chunks", lambda file: claimed(file, 1 << 33, 1 << 26), "0 of 128 chunks")


def linked(name: str, where: str, target: Any, problem: str = "link") -> None:
    def change(file: h5py.File) -> None:
        if where in file:
            del file[where]
        file[where] = target(file)

    attack(f"link-{name}", change, problem)


SOFT = "soft or external link"
linked("as-scales", "scales", lambda _: h5py.SoftLink("/samples"), SOFT)
linked("as-step", f"{SCALE}/step", lambda _: h5py.SoftLink(f"/{SCALE}/offset"), SOFT)
linked("out-of-the-file", f"{SCALE}/step", lambda _: h5py.ExternalLink("/dev/zero", "/"), SOFT)
linked("loop", f"{SCALE}/loop", lambda file: file["scales"], "several hard links")

# --- attributes of encodings -----------------------------------------------------------------

for number in (0, -1, 65536, 1 << 62):
    attribute(f"spacing-{number}", LAYER, "spacing", np.int64(number), "'spacing' is")
    attribute(f"zero-point-{number}", LAYER, "zero_point", np.int64(number), "'zero_point' is")
attribute("spacing-3", LAYER, "spacing", np.int64(3), "expected a power of two")
for key in ("spacing", "zero_point"):
    attribute(f"{key}-missing", LAYER, key, None, f"'{key}' is None")
    attribute(f"{key}-text", LAYER, key, b"8", f"'{key}' is '8'")
for level in (0, 256, -1, 1 << 62, b"255", None):
    attribute(f"levels-{level!r}", WEIGHTS, "levels", level, "'levels' is")
for restored in (b"bfloat16", b"float64", None):
    attribute(f"restored-{restored!r}", LAYER, "restored_dtype", restored, "restored_dtype")
attribute("weights-as-float32", WEIGHTS, "restored_dtype", b"float32", "restored_dtype")
for title, link in {
    "sample": f"/{LAYER}".encode(),
    "root": b"/",
    "above": b"../..",
    "relative": b"hidden_states/layer_000",
    "of-1-mb": b"/" + b"x" * 1_000_000,
}.items():
    attribute(f"scales-{title}", LAYER, "scales", link, "expected a path below /scales")
attribute("scales-missing", LAYER, "scales", None, "expected a path below /scales")
attribute("scales-beside", LAYER, "scales", b"/scales/../samples", "is missing")

# --- exceptions ------------------------------------------------------------------------------

for count in (0, -1, -(1 << 63), b"1", None):
    attribute(f"count-{count!r}", LAYER, "num_exceptions", count, "'num_exceptions' are")
for count in (2, (1 << 63) - 1):
    attribute(f"count-{count}", LAYER, "num_exceptions", np.int64(count), "layers list")
attribute("table-not-named", LAYER, "exceptions", None, "'num_exceptions' are")


def cell(column: int, value: float) -> Any:
    def change(found: np.ndarray) -> np.ndarray:
        found[0, column] = value
        return found

    return change


for title, index in {"nan": np.nan, "negative": -1, "huge": 1e300, "fraction": 1.5}.items():
    values(f"index-{title}", TABLE, "or lie outside it", cell(1, index), EDITED)
values("exception-of-no-layer", TABLE, "or lie outside it", cell(0, 77), EDITED)
values("exceptions-twice", TABLE, "layers list", lambda found: np.concatenate([found, found]))
values("exceptions-as-float16", TABLE, "expected float64", lambda found: found.astype("f2"))
values("4-million-exceptions", TABLE, "layers list", lambda _: np.zeros((4 * MiB, 3)))

# --- what the archive says of itself ---------------------------------------------------------

attribute("claims-to-be-exact", "/", "precision", None, "the archive does not say so",
          "'precision' is missing")  # fmt: skip
attribute("feature-not-required", "/", "required_features", b"[]", None, "does not name")
attribute("other-precision", "/", "precision", b'{"mantissa_bits":5}', None, "is not encoded as")
attribute("precision-of-nothing", "/", "precision", b"{}", None, "is not encoded as")
for title, text in {
    "broken": b"{",
    "nested": b"[" * 100_000,
    "of-a-huge-number": b'{"step":' + b"9" * 100_000 + b"}",
    "unknown": b'{"step":0.02,"colour":1}',
    "nan": b'{"step":NaN}',
}.items():
    attribute(f"precision-{title}", "/", "precision", text, "precision")
attribute("record-of-no-samples", "scales", "num_samples", np.int64(-5), None, "num_samples")
attribute("record-nests", "scales", "sources", b"[" * 100_000, None, "sources")
