"""Runs the connector in real engines and compares hidden states with transformers.

`tools/check_vllm` makes the environment and runs all of it; `tools/check_vllm kills 50` is the
campaign of docs/guarantees.md. A padded copy of the tiny model is equivalent: vLLM's attention on
CPUs takes heads of 32 and more, the model has heads of 16.
"""

# ruff: noqa: ANN001, ANN202, ANN003, E501, PT018

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    VLLM_LOGGING_LEVEL="ERROR",
)
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama-pydocs"
TOLERANCE = 2e-5  # largest difference of a state from transformers', float32
START_SECONDS = 1500  # an engine on a busy machine
FATAL = ("engine", "server", "worker", "offline")  # kills that end an engine, by turns


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


def settings(model: str, target: Path) -> dict:
    """Arguments of an engine with the connector, which it finds by the entry point."""
    return {
        "model": model, "dtype": "float32", "max_model_len": 128, "enforce_eager": True, "seed": 0,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(range(7))}},
        },
        "kv_transfer_config": {
            "kv_connector": "H5TracesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"target": str(target), "dtype": "float32"},
        },
    }  # fmt: skip


def prompt_of(row: int) -> str:
    """A prompt that no other row has, but for the beginning: the prefix cache has that."""
    return f"Return the number of lines of the file that is named f{row} and"


def named(sample_id: str) -> dict:
    """What a request says of its sample."""
    return {"h5traces": {"sample_id": sample_id, "fields": {"row": int(sample_id[1:])}}}


def ask(llm, ids: list[str], **options) -> None:
    """Ask an engine of this process."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=6, temperature=0.0 if "n" not in options else 1.0, **options,
            extra_args={"kv_transfer_params": named(each)},
        )
        for each in ids
    ]  # fmt: skip
    llm.generate([prompt_of(int(each[1:])) for each in ids], parameters, use_tqdm=False)


def stored(target: Path) -> dict[str, str]:
    """Request ids of the samples that are durable, and their sample ids."""
    import h5traces

    found: dict[str, str] = {}
    for each in sorted(Path(f"{target}.spool").glob("*.sample")):
        # Another process may be packing.
        with contextlib.suppress(FileNotFoundError), h5traces.open(each) as archive:
            found |= {trace["request_id"]: trace.metadata.sample_id for trace in archive}
    return found


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def compare(target: Path) -> tuple[int, float]:
    """Samples, and the largest difference of any state from transformers' over the same tokens.

    Fails where a sample has the tokens of another.
    """
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
    worst, count = 0.0, 0
    assert h5traces.validate(target).ok
    with h5traces.open(target) as archive:
        for trace in archive:
            prompt = tokenizer(prompt_of(trace["row"]))["input_ids"]
            tokens = [int(each) for each in trace["tokens"]]
            name = trace.metadata.sample_id
            assert tokens == (prompt + list(trace["output_ids"]))[: len(tokens)], name
            assert f"{trace['row']}" == name[1:], (name, trace["row"])
            assert len(tokens) >= len(prompt) or trace["finish_reason"] == "abort", (name, tokens)
            with torch.no_grad():
                model(torch.tensor([tokens]))
            for number, expected in seen.items():
                ours = trace.layer(number)
                worst = max(worst, float(np.abs(ours - expected.reshape(ours.shape).numpy()).max()))
            count += 1
    assert worst <= TOLERANCE, worst
    return count, worst


class Engine:
    """A server, or a program with an engine (`offline`), and clients that ask it."""

    def __init__(self, model: str, target: Path, numbers, *, offline: bool = False) -> None:
        self.model, self.target, self.numbers = model, target, numbers
        arguments = settings(model, target)
        self.url = ""
        if offline:
            first = next(numbers)
            command = [sys.executable, __file__, "ask", json.dumps(arguments), str(first)]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            command = [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--port",
                str(port),
            ]
            # A worker of its own, as where there are several.
            command += ["--host", "127.0.0.1", "--distributed-executor-backend", "mp"]
            command += _flags(arguments)
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE if offline else self.log, stderr=self.log,
            start_new_session=True, text=True,
            # Engines and workers need not import everything again.
            env={**os.environ, "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork"},
        )  # fmt: skip
        atexit.register(self.end, 0)
        if offline:
            wait_for(lambda: self.process.stdout.readline(), START_SECONDS, "the engine")
            return
        try:
            wait_for(self._is_up, START_SECONDS, "the server")
        except BaseException:
            self.end(0)
            self.log.seek(0)
            sys.stderr.write(self.log.read().decode(errors="replace")[-5000:])
            raise

    def _is_up(self) -> bool:
        assert self.process.poll() is None, "the server ended by itself"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True
        return False

    def client(self, count: int = 1000) -> subprocess.Popen:
        """A program that asks the server question after question, from three threads."""
        first = next(self.numbers)
        for _ in range(count - 1):
            next(self.numbers)
        command = [sys.executable, __file__, "client", self.url, self.model, str(first), str(count)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def part(self, title: str) -> int:
        """The process of an engine or worker, by its title."""
        import psutil

        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(each.cmdline()) or title in each.name():
                    return each.pid
        names = [
            each.cmdline() for each in psutil.Process(self.process.pid).children(recursive=True)
        ]
        message = f"no {title} among {names}"
        raise RuntimeError(message)

    def end(self, seconds: float = 60) -> bool:
        """Wait until all processes have ended; kills them, and says so, where they have not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _alive(self.process):
                return True
            time.sleep(0.1)
        if not _alive(self.process):
            return True
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return False


def _flags(arguments: dict) -> list[str]:
    found = []
    for name, value in arguments.items():
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


def _alive(process: subprocess.Popen) -> bool:
    """Whether any process of its group is."""
    import psutil

    process.poll()
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(each.pid) == process.pid and each.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def run_client(url: str, model: str, first: str, count: str) -> None:
    """Ask a server; three requests are on their way at a time."""
    numbers = iter(range(int(first), int(first) + int(count)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                row = next(numbers, None)
            if row is None:
                return
            found = request(url, model, f"k{row}")
            with lock:
                print(found["kv_transfer_params"]["h5traces"]["sample_id"], flush=True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def request(url: str, model: str, sample_id: str, **options) -> dict:
    """One completion over HTTP."""
    body = {
        "model": model, "prompt": prompt_of(int(sample_id[1:])), "max_tokens": 6, "temperature": 0,
        "kv_transfer_params": named(sample_id), **options,
    }  # fmt: skip
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/v1/completions", data, headers)
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.load(answer)


def run_offline(arguments: str, first: str) -> None:
    """The child of a kill of an engine: asks one question after another."""
    from vllm import LLM

    llm = LLM(**json.loads(arguments))
    for number in itertools.count(int(first)):
        ask(llm, [f"k{number}"])
        print(number, flush=True)


def check_offline(model: str, folder: Path) -> None:
    """An engine of this process: prefix cache, n = 2, stop strings."""
    from vllm import LLM

    import h5traces

    target = folder / "offline.h5"
    llm = LLM(**settings(model, target))
    ask(llm, [f"q{number}" for number in range(8)])
    ask(llm, ["q3"])  # the prefix cache has all of it
    ask(llm, ["n8"], n=2)
    ask(llm, ["s9"], stop=["e"])
    wait_for(lambda: len(stored(target)) == 12, 60, "12 samples")
    del llm
    time.sleep(3)
    h5traces.finish(target)
    with h5traces.open(target) as archive:
        ids = sorted(archive.ids)
    expected = sorted([*(f"q{number}" for number in range(8)), "q3", "n8", "n8", "s9"])
    assert ids == expected, ids
    count, worst = compare(target)
    print(f"offline, prefix cache, n = 2, stop strings: {count} samples, difference {worst:.1e}")


def check_http(model: str, folder: Path) -> None:
    """A server: ids of requests, bad requests, a client that leaves; a stopped server goes on."""
    import h5traces

    target = folder / "http.h5"
    engine = Engine(model, target, itertools.count())
    found = request(engine.url, model, "h1", request_id="mine")
    assert found["kv_transfer_params"]["h5traces"] == {"sample_id": "h1"}, found
    odd = request(engine.url, model, "h2", kv_transfer_params={"h5traces": {"path": "/x"}})
    assert "not stored" in odd["kv_transfer_params"]["h5traces"]["error"], odd
    client = engine.client()
    for _ in range(4):
        client.stdout.readline()
    client.kill()
    client.wait()
    assert len(request(engine.url, model, "h3", n=2, temperature=1)["choices"]) == 2
    wait_for(lambda: list(stored(target).values()).count("h3") == 2, 60, "h3")
    before = stored(target)
    assert any(name.startswith("cmpl-mine-0") for name in before), before
    engine.process.send_signal(signal.SIGTERM)
    assert engine.end(), "the stopped server left processes"
    engine = Engine(model, target, itertools.count())
    request(engine.url, model, "h4")
    wait_for(lambda: "h4" in stored(target).values(), 60, "h4")
    engine.process.send_signal(signal.SIGTERM)
    engine.end()
    h5traces.finish(target)
    with h5traces.open(target) as archive:
        kept = {trace["request_id"] for trace in archive}
    assert before.keys() <= kept
    count, worst = compare(target)
    print(f"HTTP, client killed, server stopped: {count} samples, difference {worst:.1e}")


def check_extract(model: str, folder: Path) -> None:
    """A data set with `--engine vllm`, stopped and resumed, against the same with transformers."""
    import numpy as np

    import h5traces

    dataset = TINY.parent / "questions.jsonl"
    command = [sys.executable, "-m", "h5traces", "extract", "--model-id", model]
    command += ["--dataset", str(dataset), "-n", "8", "--max-new-tokens", "8", "--dtype", "float32"]
    command += ["--kinds", "hidden_states", "--last-state", "block_output", "--embedding"]
    ours, theirs = folder / "engine.h5", folder / "transformers.h5"
    engine = [
        "--engine",
        "vllm",
        "--engine-arguments",
        '{"enforce_eager": true}',
        "--batch-size",
        "2",
    ]
    child = subprocess.Popen([*command, *engine, "-o", str(ours)], start_new_session=True)
    spool = Path(f"{ours}.spool")
    wait_for(
        lambda: len(list(spool.glob("*.sample"))) > 1 or child.poll() is not None,
        START_SECONDS,
        "samples",
    )
    assert child.poll() is None, "the extraction ended by itself"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    subprocess.run([*command, *engine, "-o", str(ours)], check=True)
    subprocess.run([*command, "-o", str(theirs)], check=True)
    worst = 0.0
    with h5traces.open(ours) as found, h5traces.open(theirs) as expected:
        assert len(found) == len(expected) == 8
        extraction = found.metadata.extraction
        assert extraction.engine.startswith("vllm ") and extraction.difference < 3e-5, extraction
        for one in expected:
            other = found.by_id(one.metadata.sample_id)
            assert list(one) == list(other), (list(one), list(other))
            for name in ("tokens_decoded", "question", "generated_answer", "prompt_length"):
                assert one[name] == other[name], name
            assert np.array_equal(one["tokens"], other["tokens"])
            for left, right in zip(one["hidden_states"], other["hidden_states"], strict=True):
                worst = max(worst, float(np.abs(left - right).max()))
    assert worst <= TOLERANCE, worst
    print(
        f"extract --engine vllm, killed and resumed: {len(found)} samples as with transformers, "
        f"difference {worst:.1e}, measured by the self-check {extraction.difference:.1e}"
    )


def kills(model: str, folder: Path, count: int, *, clients: int = 12, seed: int = 0) -> None:
    """Kill clients, engines, workers and servers; nothing that was stored may be lost or exchanged.

    Every engine goes on with the target of the one before it; `clients` of each server are killed,
    then the engine, the server, the worker, or a program with an engine of its own, by turns.
    """
    import h5traces

    draw = random.Random(seed)
    target, acknowledged, done, numbers = folder / "kills.h5", {}, Counter(), itertools.count()
    orphans, starts = 0, iter(itertools.cycle(FATAL))
    while done.total() < count:
        kind = next(starts)
        engine = Engine(model, target, numbers, offline=kind == "offline")
        client = None
        if kind == "offline":
            for _ in range(draw.randrange(1, 6)):
                engine.process.stdout.readline()
            for _ in range(1000):
                next(numbers)
        else:
            for _ in range(min(clients, count - done.total() - 1)):
                client = engine.client()
                _read(client, draw.randrange(1, 8))
                time.sleep(draw.random() / 10)
                client.kill()
                client.wait()
                done["client"] += 1
                acknowledged |= stored(target)
            client = engine.client()
            _read(client, draw.randrange(1, 8))
        time.sleep(draw.random() / 10)
        acknowledged |= stored(target)
        if kind == "offline":
            os.killpg(engine.process.pid, signal.SIGKILL)
        elif kind == "server":
            engine.process.kill()
        else:
            os.kill(engine.part("EngineCore" if kind == "engine" else "Worker"), signal.SIGKILL)
        done[kind] += 1
        if client is not None:
            client.kill()
            client.wait()
        orphans += not engine.end(20)
        print(f"{done.total()}: {kind}, {len(acknowledged)} stored", file=sys.stderr, flush=True)
    h5traces.finish(target)
    with h5traces.open(target) as archive:
        kept = {trace["request_id"]: trace.metadata.sample_id for trace in archive}
    lost = [each for each in acknowledged if each not in kept]
    exchanged = [each for each, name in acknowledged.items() if kept.get(each, name) != name]
    assert acknowledged and not lost and not exchanged, (lost, exchanged)
    found, worst = compare(target)
    by_kind = ", ".join(f"{number} of {kind}" for kind, number in sorted(done.items()))
    print(
        f"{done.total()} kills ({by_kind}): {len(acknowledged)} samples were stored before them, "
        f"0 lost, 0 exchanged; {found} in the archive, difference {worst:.1e}; engines that outlived "
        f"their server: {orphans}"
    )


def _read(client: subprocess.Popen, count: int) -> int:
    """Wait for so many answers."""
    return sum(bool(client.stdout.readline()) for _ in range(count))


def main() -> None:
    """Run what the arguments say: everything, or `kills COUNT`."""
    match sys.argv[1:]:
        case ["client", *rest]:
            run_client(*rest)
        case ["ask", *rest]:
            run_offline(*rest)
        case chosen:
            with tempfile.TemporaryDirectory() as name:
                model = padded(Path(name) / "model")
                if chosen[:1] != ["kills"]:
                    check_offline(model, Path(name))
                    check_http(model, Path(name))
                    check_extract(model, Path(name))
                kills(model, Path(name), int(chosen[1]) if chosen[:1] == ["kills"] else 2)


if __name__ == "__main__":
    main()
