"""Runs the connector in real engines and compares every hidden state with transformers.

`tools/check_vllm` makes the environment and runs all of it; `tools/check_vllm kills 50` and
`tools/check_vllm races 2000` are the campaigns of docs/guarantees.md. A padded copy of the tiny
model is equivalent: vLLM's attention on CPUs takes heads of 32 and more, the model has heads of 16.
"""

# ruff: noqa: ANN001, ANN002, ANN003, ANN202, E501, EM101, PT017, PT018

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
    # Workers share the cores; bound to some, they would wait for each other on a busy machine.
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
)
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama-pydocs"
TOLERANCE = 1e-4  # largest difference of a state from transformers', float32; others' are beyond 1
WAIT_SECONDS = 1500  # for anything, on a busy machine
LENGTH, BLOCK = 128, 32  # tokens of the longest sequence, and of a block of vLLM's cache
FATAL = ("engine", "server", "worker", "offline")  # kills that end an engine, one after another


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


def settings(model: str, target: Path, **more) -> dict:
    """Arguments of an engine with the connector, which it finds by the entry point."""
    return {
        "model": model, "dtype": "float32", "max_model_len": LENGTH, "enforce_eager": True, "seed": 0,
        # By default, servers and programs differ here, and could not go on with each other's runs.
        "block_size": BLOCK, "max_num_seqs": 64, "max_num_batched_tokens": 2048,
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
        **more,
    }  # fmt: skip


def prompt_of(row: int) -> str:
    """A prompt that no other row has, but for the beginning: the prefix cache has that."""
    return (
        "Return the list of files that are in the folder and the number of lines that each of them "
        f"has, then close all of them; the name of the folder is f{row} and"
    )


def named(sample_id: str) -> dict:
    """What a request says of its sample."""
    return {"h5traces": {"sample_id": sample_id, "fields": {"row": int(sample_id[1:])}}}


def ask(llm, ids: list[str], **options) -> list:
    """Ask an engine of this process."""
    from vllm import SamplingParams

    options = {"max_tokens": 6, "temperature": 1.0 if "n" in options else 0.0, **options}
    parameters = [
        SamplingParams(**options, extra_args={"kv_transfer_params": named(each)}) for each in ids
    ]
    return llm.generate([prompt_of(int(each[1:])) for each in ids], parameters, use_tqdm=False)


def stored(target: Path) -> dict[str, str]:
    """Request ids of the samples that are durable, and their sample ids."""
    import h5traces

    found: dict[str, str] = {}
    for each in sorted(Path(f"{target}.spool").glob("*.sample")):
        # Another process may be packing.
        with contextlib.suppress(FileNotFoundError), h5traces.open(each) as archive:
            found |= {trace["request_id"]: trace.metadata.sample_id for trace in archive}
    return found


def wait_for(condition, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_SECONDS} s"
        time.sleep(0.1)


def finish(target: Path) -> None:
    """Pack what an engine left, once the last thread of a killed one has let its lock go."""
    import h5traces

    def is_done() -> bool:
        try:
            h5traces.finish(target)
        except h5traces.errors.ArchiveError as error:
            if "is writing it" not in str(error):
                raise
            return False
        return True

    wait_for(is_done, f"{target} released")


class Reference:
    """transformers, which says what a sample must hold."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        self.seen: dict = {}
        for number, block in enumerate(self.model.model.layers):
            block.register_forward_hook(self._note(number))

    def _note(self, number: int):
        def hook(module, inputs, output):
            self.seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    def difference(self, trace) -> tuple[float, list[str]]:
        """The largest difference of a state, and what is wrong with a sample."""
        import torch

        row, tokens = trace["row"], [int(each) for each in trace["tokens"]]
        prompt = self.tokenizer(prompt_of(row))["input_ids"]
        whole = [*prompt, *(int(each) for each in trace["output_ids"])]
        wrong = []
        if tokens != whole[: len(tokens)]:
            wrong.append(f"tokens {tokens}, expected the first of {whole}")
        is_cut = trace["finish_reason"] == "abort"
        if len(tokens) != len(whole) - 1 and not (is_cut and len(tokens) < len(whole)):
            wrong.append(f"{len(tokens)} tokens of {len(whole)}, {trace['finish_reason']}")
        with torch.no_grad():
            logits = self.model(torch.tensor([whole])).logits[0]
        if trace.get("sampling", {}).get("temperature") == 0.0:
            # An answer that was cut short is the beginning of the whole one.
            chosen = logits.gather(1, torch.tensor([*whole[1:], 0])[:, None])[:, 0]
            gap = (logits.max(1).values - chosen)[len(prompt) - 1 : -1]
            if gap.numel() and gap.max() > TOLERANCE:
                wrong.append(f"answer {whole[len(prompt) :]}, which is not the likeliest")
        worst = 0.0
        for number, expected in self.seen.items():
            ours = torch.as_tensor(trace.layer(number))
            theirs = expected.reshape(len(whole), -1)[: len(ours)]
            worst = max(worst, float((ours - theirs).abs().max()))
        if not worst <= TOLERANCE:
            wrong.append(f"states that differ by {worst}")
        return worst, [f"{trace.metadata.sample_id}: {each}" for each in wrong]


def compare(*targets: Path) -> tuple[int, float]:
    """Samples, and the largest difference of any state from transformers' over the same tokens.

    Fails where tokens, answer or states are not those of the sample's row.
    """
    import h5traces

    reference = Reference()
    worst, count, wrong = 0.0, 0, []
    for target in targets:
        assert h5traces.validate(target).ok
        with h5traces.open(target) as archive:
            for trace in archive:
                difference, found = reference.difference(trace)
                worst, count, wrong = max(worst, difference), count + 1, wrong + found
                if trace.metadata.sample_id[1:] != f"{trace['row']}" and "request_id" in trace:
                    wrong.append(f"{trace.metadata.sample_id} has row {trace['row']}")
    assert count and not wrong, "\n".join([f"{len(wrong)} of {count} samples", *wrong[:10]])
    return count, worst


class Engine:
    """A server, or a program with an engine (`offline`), and clients that ask it."""

    def __init__(self, model: str, target: Path, numbers, *, offline: bool = False, **more) -> None:
        self.model, self.target, self.numbers = model, target, numbers
        arguments = settings(model, target, **more)
        self.url = ""
        if offline:
            first = next(numbers)
            command = [sys.executable, __file__, "run", "offline", json.dumps(arguments)]
            command += [str(first)]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            # A separate worker, as with several GPUs.
            command += ["--distributed-executor-backend", "mp", "--port", str(port)]
            command += ["--host", "127.0.0.1", *_flags(arguments)]
        self.log, self.lines, self.family = tempfile.TemporaryFile(), [], set()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE if offline else self.log, stderr=self.log,
            start_new_session=True, text=True,
            # Engines and workers need not import everything again.
            env={**os.environ, "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork"},
        )  # fmt: skip
        atexit.register(self.end, 0)
        try:
            if offline:
                assert self.answer(), "the engine ended by itself"
            else:
                wait_for(self._is_up, "the server")
        except BaseException as error:
            self.end(0)
            message = f"{error}: {self.messages()}"
            raise RuntimeError(message) from error
        self._note()

    def _is_up(self) -> bool:
        assert self.process.poll() is None, "the server ended by itself"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True
        return False

    def messages(self) -> str:
        """What it wrote."""
        self.log.seek(0)
        return "".join(self.lines) + self.log.read().decode(errors="replace")

    def answer(self) -> str:
        """The number of the next question that a program has asked; empty at its end."""
        for line in self.process.stdout:
            if line.strip().isdecimal():
                return line
            self.lines.append(line)
        return ""

    def client(self, count: int = 1000) -> subprocess.Popen:
        """A program that asks the server question after question, from three threads."""
        first = next(self.numbers)
        for _ in range(count - 1):
            next(self.numbers)
        command = [sys.executable, __file__, "run", "client", self.url, self.model]
        command += [str(first), str(count)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def part(self, title: str) -> int:
        """The process of an engine or worker, by its title."""
        import psutil

        for each in self.family:
            with contextlib.suppress(psutil.Error):
                if title in " ".join(each.cmdline()) or title in each.name():
                    return each.pid
        message = f"no {title} among {self.family}"
        raise RuntimeError(message)

    def stop(self) -> None:
        """End a server as its operator does."""
        self.process.send_signal(signal.SIGTERM)
        assert self.end(), "the stopped server left processes"

    def end(self, seconds: float = 60) -> bool:
        """Wait until all processes have ended; kills them, and says so, where they have not."""
        import psutil

        self._note()
        deadline = time.monotonic() + seconds
        while left := [each for each in self.family if _lives(each)]:
            if time.monotonic() >= deadline:
                for each in left:
                    with contextlib.suppress(psutil.Error):
                        each.kill()
                wait_for(lambda: not any(map(_lives, left)), "the end of killed processes")
                break
            time.sleep(0.1)
        self.process.wait()
        return not left

    def _note(self) -> None:
        """Remember its processes: when it has ended, nothing says which were its own."""
        import psutil

        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            self.family |= {own, *own.children(recursive=True)}


def _lives(process) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _flags(arguments: dict) -> list[str]:
    found = []
    for name, value in arguments.items():
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


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
    with urllib.request.urlopen(call, timeout=WAIT_SECONDS) as answer:
        return json.load(answer)


def run_offline(arguments: str, first: str) -> None:
    """A program with an engine, which asks one question after another until it is killed."""
    from vllm import LLM

    llm = LLM(**json.loads(arguments))
    for number in itertools.count(int(first)):
        ask(llm, [f"k{number}"])
        print(number, flush=True)


def run_races(arguments: str, count: str, seed: str) -> None:
    """Aborts requests between the parts of a step, in an engine whose cache is too small.

    In one process, so that every order of abort, end and preemption comes up.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(**json.loads(arguments)).llm_engine
    core = engine.engine_core.engine_core
    draw, done = random.Random(int(seed)), Counter()
    live: dict[str, int] = {}
    execute, preempt = core.model_executor.execute_model, core.scheduler._preempt_request

    def executed(*arguments, **options):
        found = execute(*arguments, **options)
        if live and draw.random() < 0.15:
            core.aborts_queue.put_nowait([draw.choice(list(live))])
            done["aborts within a step"] += 1
        return found

    def preempted(*arguments, **options):
        done["preemptions"] += 1
        return preempt(*arguments, **options)

    core.model_executor.execute_model, core.scheduler._preempt_request = executed, preempted
    while done["requests"] < int(count) or core.scheduler.has_requests():
        while done["requests"] < int(count) and len(live) < 10 and draw.random() < 0.7:
            row = done["requests"] // 3
            done["requests"] += 1
            parameters = SamplingParams(
                max_tokens=draw.choice([1, 2, 6, 20, LENGTH]),
                temperature=0.0,
                ignore_eos=draw.random() < 0.5,
                extra_args={"kv_transfer_params": named(f"r{row}")},
            )
            name = engine.add_request(f"{done['requests']}", prompt_of(row), parameters)
            live[name] = row
        if live and draw.random() < 0.05:
            engine.engine_core.abort_requests([draw.choice(list(live))])
            done["aborts between steps"] += 1
        engine.step()
        live = {name: row for name, row in live.items() if name in core.scheduler.requests}
    engine.engine_core.shutdown()
    print(", ".join(f"{number} {what}" for what, number in sorted(done.items())))


def run_example(arguments: str) -> None:
    """Lets vLLM's own connector write files, and the client its responses."""
    import torch
    from vllm import LLM
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector

    class Plain:
        """Stands for streams and events of CUDA: a CPU copies at once."""

        def record(self, stream=None) -> None: ...

        def wait_event(self, event) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True

    empty = torch.empty_like
    torch.empty_like = lambda *given, pin_memory=False, **options: empty(*given, **options)
    connector = example_hidden_states_connector.ExampleHiddenStatesConnector
    connector._get_copy_stream = lambda self: Plain()
    known = json.loads(arguments)
    folder = Path(known["kv_transfer_config"]["kv_connector_extra_config"]["shared_storage_path"])
    llm = LLM(**known)
    # The engine put others in their place.
    torch.cuda.Event, torch.cuda.stream = Plain, lambda stream: contextlib.nullcontext()
    rows = range(4)
    asked = {"extra_args": {"kv_transfer_params": {"include_output_tokens": True}}}
    from vllm import SamplingParams

    found = llm.generate(
        [prompt_of(row) for row in rows], SamplingParams(max_tokens=6, temperature=0.0, **asked)
    )
    llm.generate(
        [prompt_of(9)], SamplingParams(max_tokens=1)
    )  # a step in which the last are written
    with (folder / "responses.jsonl").open("w") as file:
        for row, each in zip(rows, found, strict=True):
            (one,) = each.outputs
            choice = {"index": 0, "text": one.text, "token_ids": list(one.token_ids)}
            response = {
                "id": each.request_id, "row": row, "prompt_token_ids": each.prompt_token_ids,
                "choices": [{**choice, "finish_reason": one.finish_reason}],
                "kv_transfer_params": each.kv_transfer_params,
            }  # fmt: skip
            file.write(json.dumps(response) + "\n")
    llm.llm_engine.engine_core.shutdown()


def program(name: str, *arguments: str, **variables: str) -> str:
    """What a program of this file prints."""
    command = [sys.executable, __file__, "run", name, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def check_offline(model: str, folder: Path) -> None:
    """An engine of two workers: prefix cache, stop strings, the longest answer.

    A second engine with its target is rejected. All is greedy: on CPUs, workers of vLLM 0.32 draw
    different tokens.
    """
    from vllm import LLM

    import h5traces

    target = folder / "offline.h5"
    llm = LLM(**settings(model, target, tensor_parallel_size=2))
    ask(llm, [f"q{number}" for number in range(8)])
    (again,) = ask(llm, ["q3"])
    assert again.num_cached_tokens >= BLOCK, again.num_cached_tokens
    ask(llm, ["s9"], stop=["e"])
    ask(llm, ["l10", "l11", "l12"], max_tokens=LENGTH, ignore_eos=True)
    wait_for(lambda: len(stored(target)) == 13, "13 samples")
    try:
        Engine(model, target, itertools.count(), offline=True)
    except RuntimeError as error:
        assert f"{target.name}: process" in str(error) and "is writing it" in str(error), error
    else:
        raise AssertionError("two engines wrote one target")
    llm.llm_engine.engine_core.shutdown()
    finish(target)
    with h5traces.open(target) as archive:
        ids = sorted(archive.ids)
        assert archive.metadata.extraction.generation["tensor_parallel_size"] == 2
        longest = max(len(trace["tokens"]) for trace in archive)
    assert longest == LENGTH - 1, longest
    expected = [*(f"q{number}" for number in range(8)), "q3", "s9", "l10", "l11", "l12"]
    assert ids == sorted(expected), ids
    count, worst = compare(target)
    print(
        f"offline, two workers, prefix cache, stop strings, longest answers, a second engine "
        f"rejected: {count} samples, difference {worst:.1e}"
    )


def check_races(model: str, folder: Path, count: int, seed: int = 0) -> None:
    """Requests that are aborted within steps, preempted, and whose blocks others get."""

    target = folder / "races.h5"
    small = {"num_gpu_blocks_override": 8, "max_num_seqs": 8, "max_num_batched_tokens": LENGTH}
    arguments = json.dumps(settings(model, target, **small))
    done = program("races", arguments, str(count), str(seed), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    finish(target)
    found, worst = compare(target)
    print(f"races: {done}: {found} samples, difference {worst:.1e}, 0 exchanged")


def check_example(model: str, folder: Path) -> None:
    """What vLLM's own connector writes is read, with the client's responses."""
    import h5traces

    requests, target = folder / "requests", folder / "example.h5"
    requests.mkdir()
    transfer = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(requests)},
    }
    program(
        "example",
        json.dumps(settings(model, target, kv_transfer_config=transfer)),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    responses = (requests / "responses.jsonl").rename(folder / "responses.jsonl")
    for lock in requests.glob("*.lock"):
        lock.unlink()
    files = sorted(requests.glob("*.safetensors"))
    assert len(files) == 4, files
    reading = h5traces.ReadingOptions(layer_ids=range(7), responses=responses)
    precision = h5traces.PrecisionOptions(dtype="float32")
    h5traces.convert(
        requests, target, merge=True, reading=reading, precision=precision, model_id=model
    ).raise_for_errors()
    count, worst = compare(target)
    assert count == 4, count
    print(f"files of vLLM's own connector: {count} samples, difference {worst:.1e}")


def check_http(model: str, folder: Path) -> None:
    """A server with two engines: ids of requests, bad requests, a client that leaves."""
    import h5traces

    target = folder / "http.h5"
    targets = [target, folder / "http-rank1.h5"]
    engine = Engine(model, target, itertools.count(100), data_parallel_size=2)

    def both() -> dict[str, str]:
        return stored(targets[0]) | stored(targets[1])

    found = request(engine.url, model, "h1", request_id="mine")
    assert found["kv_transfer_params"]["h5traces"] == {"sample_id": "h1"}, found
    odd = request(engine.url, model, "h2", kv_transfer_params={"h5traces": {"path": "/x"}})
    assert "not stored" in odd["kv_transfer_params"]["h5traces"]["error"], odd
    client = engine.client()
    _read(client, 12)
    client.kill()
    client.wait()
    assert len(request(engine.url, model, "h3", n=2, temperature=1)["choices"]) == 2
    wait_for(lambda: list(both().values()).count("h3") == 2, "h3")
    wait_for(lambda: all(stored(each) for each in targets), "samples of both engines")
    before = both()
    assert any(name.startswith("cmpl-mine-0") for name in before), before
    engine.stop()
    kept = set()
    for each in targets:
        finish(each)
        with h5traces.open(each) as archive:
            kept |= {trace["request_id"] for trace in archive}
    assert before.keys() <= kept
    count, worst = compare(*targets)
    print(
        f"HTTP, two engines, n = 2, client killed, stopped: {count} samples, difference {worst:.1e}"
    )


def check_extract(model: str, folder: Path) -> None:
    """A data set with `--engine vllm`, stopped and resumed, against the same with transformers."""
    import numpy as np

    import h5traces

    dataset = TINY.parent / "questions.jsonl"
    command = [sys.executable, "-m", "h5traces", "extract", "--model-id", model]
    command += ["--dataset", str(dataset), "-n", "8", "--max-new-tokens", "8", "--dtype", "float32"]
    command += ["--kinds", "hidden_states", "--last-state", "block_output", "--embedding"]
    ours, theirs = folder / "engine.h5", folder / "transformers.h5"
    engine = ["--engine", "vllm", "--batch-size", "2"]
    engine += ["--engine-arguments", '{"enforce_eager": true}']
    child = subprocess.Popen([*command, *engine, "-o", str(ours)], start_new_session=True)
    spool = Path(f"{ours}.spool")
    wait_for(
        lambda: len(list(spool.glob("*.sample"))) > 1 or child.poll() is not None,
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
    then the engine, the server, the worker, or a program with its own engine, one after another.
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
                engine.answer()
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
    finish(target)
    with h5traces.open(target) as archive:
        kept = {trace["request_id"]: trace.metadata.sample_id for trace in archive}
        cut = sum(trace["finish_reason"] == "abort" for trace in archive)
    lost = [each for each in acknowledged if each not in kept]
    exchanged = [each for each, name in acknowledged.items() if kept.get(each, name) != name]
    assert acknowledged and not lost and not exchanged, (lost, exchanged)
    found, worst = compare(target)
    by_kind = ", ".join(f"{number} of {kind}" for kind, number in sorted(done.items()))
    print(
        f"{done.total()} kills ({by_kind}): {len(acknowledged)} samples were stored before them, "
        f"0 lost, 0 exchanged; {found} in the archive, {cut} of them cut short, difference {worst:.1e}; "
        f"engines that outlived their server: {orphans}"
    )


def _read(client: subprocess.Popen, count: int) -> int:
    """Wait for so many answers."""
    return sum(bool(client.stdout.readline()) for _ in range(count))


def main() -> None:
    """Run what the arguments say: everything, `kills COUNT`, `races COUNT [SEED]`."""
    match sys.argv[1:]:
        case ["run", name, *rest]:
            globals()[f"run_{name}"](*rest)
        case chosen:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                model = padded(folder / "model")
                match chosen:
                    case ["kills", count]:
                        kills(model, folder, int(count))
                    case ["races", count, *seed]:
                        check_races(model, folder, int(count), *map(int, seed))
                    case []:
                        for check in CHECKS:
                            check(model, folder)
                        check_races(model, folder, 60)
                        kills(model, folder, 4, clients=1)
                    case [name]:
                        globals()[f"check_{name}"](model, folder)


CHECKS = (check_offline, check_http, check_extract, check_example)

if __name__ == "__main__":
    main()
