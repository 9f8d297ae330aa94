#!/usr/bin/env python3
"""Compares the kinds of the register with what TransformerLens caches at their hook points.

Needs TransformerLens 4 beside this repository's requirements, best in a separate environment:

    python -m venv lens && lens/bin/pip install '.[extract]' transformer-lens
    lens/bin/python tools/check_lens.py

Tiny models with random weights, float32, 20 tokens. The largest difference, relative to the
largest value, may be 1e-5: all but GPT-2 are equal to the bit, whose projections TransformerLens
computes in another order. Takes half a minute.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "extract")]

from family_models import make_family  # noqa: E402  needs the path
from tiny_models import tokenizer  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

from h5traces.extract.anatomy import anatomy_of  # noqa: E402
from h5traces.extract.capture import CaptureOptions, Capturer  # noqa: E402
from h5traces.extract.trials import values_of, with_kinds  # noqa: E402
from h5traces.format.kinds import MODEL_KINDS  # noqa: E402

# Names by which TransformerLens knows the families; weights are ours.
FAMILIES = {
    "llama": "meta-llama/Llama-3.2-1B",
    "gpt2": "gpt2",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma3_text": "google/gemma-3-270m",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
}
TOKENS = tuple(range(5, 25))
TOLERANCE = 1e-5


def differences(family: str) -> dict[str, float]:
    """The largest difference over all layers, by kind."""
    model = make_family(family)
    model.config.architectures = [type(model).__name__]
    kinds = [kind for kind, each in MODEL_KINDS.items() if each.lens is not None]
    anatomy = with_kinds(anatomy_of(model), kinds, range(4))
    options = CaptureOptions(
        layers=(0, 1, 2, 3), kinds=tuple(kinds), dtype="auto", last_state="block_output"
    )
    (found,) = Capturer(anatomy, options).run([TOKENS])
    bridge = TransformerBridge.boot_transformers(
        FAMILIES[family], hf_model=model, tokenizer=tokenizer(), device="cpu"
    )
    _, cache = bridge.run_with_cache(torch.tensor([TOKENS]))
    result = {}
    for kind in kinds:
        for layer, entry in enumerate(found.arrays[kind]):
            name = f"blocks.{layer}.{MODEL_KINDS[kind].lens}"
            # Without a rotary embedding nothing is rotated.
            theirs = cache[name if name in cache else name.replace("rot_", "")].detach()[0]
            if kind in ("head_outputs", "queries", "keys", "values"):
                theirs = theirs.transpose(0, 1)
            ours = torch.from_numpy(values_of(entry).copy())
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            result[kind] = max(result.get(kind, 0.0), difference)
    return result


def main() -> int:
    """Compare all families."""
    warnings.simplefilter("ignore")
    worst = 0.0
    for family in FAMILIES:
        for kind, difference in differences(family).items():
            sys.stdout.write(f"{family:12} {kind:18} {difference:.1e}\n")
            worst = max(worst, difference)
    sys.stdout.write(f"largest difference: {worst:.1e}, allowed {TOLERANCE:.1e}\n")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
