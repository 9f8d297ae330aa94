"""Runs the connector in a real engine and compares hidden states with transformers.

`tools/check_vllm` makes the environment. A padded copy of the tiny model is equivalent: vLLM's
attention on CPUs takes heads of 32 and more, the model has heads of 16.
"""

# ruff: noqa: ANN001, ANN201, ANN202, ANN003, E501, PT018

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama-pydocs"
TOLERANCE = 2e-5  # largest difference of a state from transformers', float32
PROMPTS = ["def read(path):", "Return the", "import numpy", "Return the number of", "class A:"]


def padded(folder: Path) -> str:
    """The tiny model with heads padded to 32 channels."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config, state = model.config, model.state_dict()
    old = config.hidden_size // config.num_attention_heads
    new, half = 32, old // 2
    # Rotary frequency j of the new heads is frequency j / 2 of the old ones.
    places = [2 * j for j in range(half)] + [new // 2 + 2 * j for j in range(half)]
    for name in list(state):
        part = name.split(".")[-2]
        value = state[name]
        if part in ("q_proj", "k_proj"):
            wide = torch.zeros(value.shape[0] // old, new, value.shape[1])
            wide[:, places] = value.reshape(-1, old, value.shape[1])
            state[name] = wide.reshape(-1, value.shape[1]) * (
                (new / old) ** 0.5 if part[0] == "q" else 1
            )
        elif part == "v_proj":
            wide = torch.zeros(value.shape[0] // old, new, value.shape[1])
            wide[:, :old] = value.reshape(-1, old, value.shape[1])
            state[name] = wide.reshape(-1, value.shape[1])
        elif part == "o_proj":
            wide = torch.zeros(value.shape[0], value.shape[1] // old, new)
            wide[:, :, :old] = value.reshape(value.shape[0], -1, old)
            state[name] = wide.reshape(value.shape[0], -1)
    config.head_dim = new
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(
        {name: each.contiguous().clone() for name, each in state.items()},
        folder / "model.safetensors",
    )
    return str(folder)


def engine(model: str, target: Path):
    """An engine with the connector, which it finds by the entry point."""
    from vllm import LLM

    return LLM(
        model=model, dtype="float32", max_model_len=128, enforce_eager=True, seed=0,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(range(7))}},
        },
        kv_transfer_config={
            "kv_connector": "H5TracesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"target": str(target), "dtype": "float32"},
        },
    )  # fmt: skip


def ask(llm, ids: list[str], **options) -> None:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=6, temperature=0.0 if "n" not in options else 1.0, **options,
            extra_args={"kv_transfer_params": {"h5traces": {"sample_id": each, "fields": {"row": int(each[1:])}}}},
        )
        for each in ids
    ]  # fmt: skip
    llm.generate(
        [PROMPTS[int(each[1:]) % len(PROMPTS)] for each in ids], parameters, use_tqdm=False
    )


def stored(target: Path) -> set[str]:
    """Ids of samples that are durable."""
    import h5traces

    found: set[str] = set()
    for each in Path(f"{target}.spool").glob("*.sample"):
        with h5traces.open(each) as archive:
            found |= set(archive.ids)
    return found


def serve(model: str, target: str, first: str, count: str) -> None:
    """The child of the check of kills: asks one question after another."""
    llm = engine(model, Path(target))
    for number in range(int(first), int(first) + int(count)):
        ask(llm, [f"k{number}"])
        print(number, flush=True)
    time.sleep(60)


def compare(target: Path) -> float:
    """The largest difference of any state from transformers' over the same tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import h5traces

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    seen = {}

    def note(number):
        def hook(module, inputs, output):
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(note(number))
    worst = 0.0
    with h5traces.open(target) as archive:
        for trace in archive:
            prompt = tokenizer(PROMPTS[trace["row"] % len(PROMPTS)])["input_ids"]
            tokens = [int(each) for each in trace["tokens"]]
            assert tokens == (prompt + list(trace["output_ids"]))[: len(tokens)], (
                trace.metadata.sample_id
            )
            assert f"{trace['row']}" == trace.metadata.sample_id[1:]
            with torch.no_grad():
                model(torch.tensor([tokens]))
            for number, expected in seen.items():
                ours = trace.layer(number)
                worst = max(worst, float(np.abs(ours - expected.reshape(ours.shape).numpy()).max()))
    assert worst <= TOLERANCE, worst
    return worst


def kills(model: str, folder: Path, count: int) -> None:
    """Kill the engine with its workers again and again; what was stored must stay."""
    import h5traces

    target, acknowledged, asked = folder / "kills.h5", set(), 0
    for number in range(count):
        command = [sys.executable, __file__, "serve", model, str(target), str(asked), "5"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(1 + number % 4):
            child.stdout.readline()
            asked += 1
        acknowledged |= stored(target)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(0.5)
        asked += 1  # the one in flight
    h5traces.finish(target)
    with h5traces.open(target) as archive:
        ids = list(archive.ids)
    assert acknowledged and acknowledged <= set(ids), acknowledged - set(ids)
    print(
        f"{count} kills: {len(acknowledged)} acknowledged, 0 lost; difference {compare(target):.1e}"
    )


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    import h5traces

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = padded(folder / "model")
        target = folder / "run.h5"
        llm = engine(model, target)
        ask(llm, [f"q{number}" for number in range(8)])  # the last prompts hit the prefix cache
        ask(llm, ["n8"], n=2)
        ask(llm, ["s9"], stop=["e"])
        deadline = time.monotonic() + 30
        while (
            len(list(Path(f"{target}.spool").glob("*.sample"))) < 11 and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        del llm
        time.sleep(3)
        h5traces.finish(target)
        with h5traces.open(target) as archive:
            ids = sorted(archive.ids)
        assert ids == sorted([f"q{number}" for number in range(8)] + ["n8", "n8", "s9"]), ids
        print(
            f"offline, prefix cache, n = 2, stop strings: {len(ids)} samples, difference {compare(target):.1e}"
        )
        kills(model, folder, count)


if __name__ == "__main__":
    main()
