#!/usr/bin/env python3
"""Draws attention as HDFView shows it: grey levels that follow from a dataset's attributes.

    python tools/make_hdfview_picture.py docs/images/hdfview.png

records 300 tokens of documentation with the model in examples/, and draws a head of its archive
twice: without the attribute IMAGE_MINMAXRANGE, on the left, and with it. Needs the extras extract
and plot.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

import h5traces

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
TOKENS, LAYER, HEAD = 300, 3, 1
GAP = 12


def grey_levels(
    values: NDArray[Any], limits: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """HDFView's levels, 0 to 255: linear from black to white over IMAGE_MINMAXRANGE.

    Without that attribute, from the smallest to the largest value.
    """
    numbers = values.astype(np.float64)
    low, high = limits or (numbers.min(), numbers.max())
    return np.clip((numbers - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def black_share(levels: NDArray[np.uint8]) -> float:
    """Share of a head's cells on level 0, of those that a query may look at."""
    seen = np.tril(np.ones(levels.shape, bool))
    return float((levels[seen] == 0).mean())


def recorded(folder: Path) -> Path:
    """An archive of one sample of 300 tokens, whose attention the model in examples/ computed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = ROOT / "examples" / "tiny-llama-pydocs"
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager")
    text = " ".join(inspect.getdoc(each) or "" for each in (textwrap.wrap, str.join, str.split))
    ids = AutoTokenizer.from_pretrained(place)(text * 4, return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids[:, :TOKENS]}
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    with h5traces.create(folder / "a.h5") as writer:
        writer.append(outputs, ["docs"], inputs=inputs)
    return folder / "a.h5"


def heads(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The head without the range, and with it."""
    with h5py.File(path) as file:
        dataset = file[f"samples/00000000/attentions/layer_{LAYER:03d}"]
        values = dataset[HEAD]
        limits = tuple(dataset.attrs["IMAGE_MINMAXRANGE"])
    assert values.shape == (TOKENS, TOKENS)
    return grey_levels(values), grey_levels(values, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    from matplotlib import image

    with tempfile.TemporaryDirectory() as folder:
        before, after = heads(recorded(Path(folder)))
    gap = np.full((TOKENS, GAP), 255, np.uint8)
    image.imsave(target, np.hstack((before, gap, after)), cmap="gray", vmin=0, vmax=255)
    print(f"causal cells on level 0: {black_share(before):.0%} without the range, ", end="")
    print(f"{black_share(after):.0%} with it")


if __name__ == "__main__":
    main()
