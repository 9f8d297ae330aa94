#!/usr/bin/env python3
"""What attention takes as weights, and as queries and keys; and how long it takes to compute.

    python benchmarks/long_traces.py                    # 43 to 2,048 tokens, and the time
    python benchmarks/long_traces.py --lengths 8192 --num-layers 2    # more memory: 8 GB

Measured on the small model of the repository over the text of its own documents: bits per stored
value, in float16 with gzip, mean over layers. The next columns are what a layer of 32 heads of 128
takes, with 8 key-value heads and with 32, as weights and as queries and keys at these bits; then
the same with 8 of queries and keys rounded to some mantissa bits, with what it moves: the share of
a row's attention, mean over rows, and the largest change of a weight, both of the worst layer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.recomputing import attention_weights
from h5traces.format.attention import AttentionRule
from h5traces.precision.attention import rounded
from h5traces.storage.arrays import encode_array
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-llama-pydocs"
HEADS, GROUPS, CHANNELS = 32, 8, 128
MANTISSAS = 6, 5


def stored_bits(values: NDArray[Any]) -> float:
    """Bits per value in float16 with gzip."""
    encoded = encode_array(values.astype("<f2"), GZIP.name)
    return sum(map(len, encoded.chunks)) * 8 / values.size


def measure_sizes(lengths: list[int], num_layers: int | None) -> None:
    """Print a line for every length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from h5traces.extract.anatomy import anatomy_of
    from h5traces.extract.capture import CaptureOptions, Capturer
    from h5traces.extract.trials import with_kinds

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager").eval()
    text = "\n".join(each.read_text("utf-8") for each in sorted(ROOT.glob("docs/*.md")))
    tokens = tokenizer(text)["input_ids"]
    kinds = ("queries", "keys", "attentions")
    anatomy = with_kinds(anatomy_of(model), kinds, range(model.config.num_hidden_layers))
    rounded_to = " | ".join(f"{bits} mantissa bits: bits, ratio, error" for bits in MANTISSAS)
    print(
        f"| tokens | bits of a weight | of a query or key | 8 key-value heads | 32 | {rounded_to} |"
    )
    print("|---:|---:|---:|---:|---:|" + "---:|" * len(MANTISSAS))
    for length in lengths:
        weights, others = [], []
        lossy: dict[int, list[tuple[float, float, float]]] = {bits: [] for bits in MANTISSAS}
        stride = -(-anatomy.num_layers // (num_layers or anatomy.num_layers))
        for layer in range(0, anatomy.num_layers, stride):
            options = CaptureOptions(layers=(layer,), kinds=kinds, dtype="float16")
            with torch.inference_mode():
                (found,) = Capturer(anatomy, options).run([tokens[:length]])
            arrays = {kind: each[0].array.to_numpy() for kind, each in found.arrays.items()}
            weights.append(stored_bits(arrays["attentions"]))
            pair = arrays["queries"], arrays["keys"]
            others.append(mean_bits(pair))
            rule = found.arrays["queries"][0].rule
            del found, arrays
            for bits, seen in lossy.items():
                coarse = rounded(pair[0], bits), rounded(pair[1], bits)
                seen.append((mean_bits(coarse), *errors(pair, coarse, rule)))
        # Of a layer, for one bit of a query or key.
        whole = HEADS * length * np.mean(weights) / CHANNELS
        ratios = [whole / (HEADS + groups) for groups in (GROUPS, HEADS)]
        of_rounded = []
        for seen in lossy.values():
            bits, moved, largest = (float(each) for each in np.array(seen).T.max(axis=1))
            of_rounded.append(f"{bits:.2f}, {ratios[0] / bits:.1f}, {moved:.2%} ({largest:.2f})")
        plain = float(np.mean(others))
        print(
            f"| {length:,} | {np.mean(weights):.2f} | {plain:.2f} | {ratios[0] / plain:.2f} | "
            f"{ratios[1] / plain:.2f} | {' | '.join(of_rounded)} |",
            flush=True,
        )


def mean_bits(pair: tuple[NDArray[Any], NDArray[Any]]) -> float:
    """Of queries and keys."""
    return (stored_bits(pair[0]) + stored_bits(pair[1])) / 2


def errors(
    exact: tuple[NDArray[Any], NDArray[Any]],
    coarse: tuple[NDArray[Any], NDArray[Any]],
    rule: AttentionRule,
) -> tuple[float, float]:
    """The share of a row's attention that goes elsewhere, on average, and the largest change."""
    length = exact[0].shape[1]
    some = {
        "heads": np.arange(len(exact[0])),
        "rows": np.arange(0, length, max(1, length // 64)),
    }
    one, other = (attention_weights(*each, rule, **some) for each in (exact, coarse))
    change = np.abs(one - other)
    return float(change.sum(-1).mean() / 2), float(change.max())


def measure_time(length: int) -> None:
    """Print how long a layer takes, with numpy and with torch."""
    import torch

    from h5traces.archive.torch_values import attention_weights as in_torch

    generator = np.random.default_rng(0)
    queries, keys = (
        generator.normal(size=(heads, length, CHANNELS)).astype(np.float32)
        for heads in (HEADS, GROUPS)
    )
    rule = AttentionRule(mask="causal", scale=CHANNELS**-0.5)
    every = {"heads": np.arange(HEADS), "rows": np.arange(length)}
    for name, compute in (("numpy", attention_weights), ("torch", in_torch)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            compute(queries, keys, rule, **every)
            times.append(time.perf_counter() - start)
        print(
            f"{name}: {np.median(times):.2f} s, best {min(times):.2f} s, for one layer of {HEADS}"
            f" heads of {CHANNELS}, {length:,} tokens ({torch.get_num_threads()} torch threads)"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[43, 128, 256, 512, 1024, 2048])
    parser.add_argument("--num-layers", type=int, help="measure so many, evenly spread")
    parser.add_argument("--time-only", action="store_true", help="do not measure sizes")
    arguments = parser.parse_args()
    if not arguments.time_only:
        measure_sizes(arguments.lengths, arguments.num_layers)
    measure_time(2048)


if __name__ == "__main__":
    main()
