#!/usr/bin/env python3
"""What attention takes as weights, and as queries and keys; and how long it takes to compute.

    python benchmarks/long_traces.py                    # 43 to 2,048 tokens, and the time
    python benchmarks/long_traces.py --lengths 8192     # more memory: 8 GB

Measured on the small model of the repository over the text of its own documents: bits per stored
value, in float16 with gzip, mean over layers. The last columns are what a layer of 32 heads of 128
takes, with 8 key-value heads and with 32, as weights and as queries and keys at these bits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.archive.recomputing import attention_weights
from h5traces.format.attention import AttentionRule
from h5traces.storage.arrays import encode_array
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-llama-pydocs"
HEADS, GROUPS, CHANNELS = 32, 8, 128


def stored_bits(values: NDArray[Any]) -> float:
    """Bits per value in float16 with gzip."""
    encoded = encode_array(values.astype("<f2"), GZIP.name)
    return sum(map(len, encoded.chunks)) * 8 / values.size


def measure_sizes(lengths: list[int]) -> None:
    """Print a line for every length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from h5traces.extract.anatomy import anatomy_of
    from h5traces.extract.capture import CaptureOptions, Capturer, with_kinds

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager").eval()
    text = "\n".join(each.read_text("utf-8") for each in sorted(ROOT.glob("docs/*.md")))
    tokens = tokenizer(text)["input_ids"]
    kinds = ("queries", "keys", "attentions")
    anatomy = with_kinds(anatomy_of(model), kinds, range(model.config.num_hidden_layers))
    print("| tokens | bits of a weight | of a query or key | 8 key-value heads | 32 |")
    print("|---:|---:|---:|---:|---:|")
    for length in lengths:
        weights, others = [], []
        for layer in range(anatomy.num_layers):
            options = CaptureOptions(layers=(layer,), kinds=kinds, dtype="float16")
            with torch.inference_mode():
                (found,) = Capturer(anatomy, options).run([tokens[:length]])
            bits = {kind: stored_bits(each[0].array.values) for kind, each in found.arrays.items()}
            weights.append(bits["attentions"])
            others.append((bits["queries"] + bits["keys"]) / 2)
        whole = HEADS * length**2 * np.mean(weights)
        ratios = [
            whole / ((HEADS + groups) * CHANNELS * length * np.mean(others))
            for groups in (GROUPS, HEADS)
        ]
        print(
            f"| {length:,} | {np.mean(weights):.2f} | {np.mean(others):.2f} | "
            f"{ratios[0]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )


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
    parser.add_argument("--time-only", action="store_true", help="do not measure sizes")
    arguments = parser.parse_args()
    if not arguments.time_only:
        measure_sizes(arguments.lengths)
    measure_time(2048)


if __name__ == "__main__":
    main()
