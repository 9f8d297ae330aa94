"""Files of many layouts, each written by the library that it is named for where that installs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dill
import h5py
import joblib
import ml_dtypes
import numpy as np
import pyarrow as pa
import torch
import zstandard
from pyarrow import feather
from pyarrow import parquet as pq
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDED = Path(__file__).parent / "recorded"
MAPPINGS = Path(__file__).parents[2] / "examples" / "mappings"
LAYERS, TOKENS, HIDDEN, HEADS = 3, 7, 16, 2
# How a layout's files are made.
HERE, RECORD, IMITATED = "in the test", "recorded", "imitated"


class Layout(NamedTuple):
    """A layout: the library that writes it, how, and the states of its last sample.

    `make` writes into a folder that exists, and gives the file or folder to read and the states
    ``(layers, tokens, hidden)``. `count` is the number of samples.
    """

    library: str
    how: str
    make: Callable[[Path], tuple[Path, Any]]
    count: int = 1
    mapping: str | None = None


def states(seed: int = 0) -> Any:
    """``(layers + 1, tokens, hidden)``, the embedding first."""
    shape = (LAYERS + 1, TOKENS, HIDDEN)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sample(seed: int = 0, array: Any = np.asarray) -> dict[str, Any]:
    """A dict with the names of the legacy fields; `array` makes tensors or arrays of numbers."""
    weights = np.full((HEADS, TOKENS, TOKENS), 1 / TOKENS, np.float32)
    return {
        "question_id": f"q{seed}",
        "hidden_states": [array(each) for each in states(seed)],
        "attentions": [array(weights) for _ in range(LAYERS)],
        "tokens": array(np.arange(TOKENS)),
    }


def two(array: Any = np.asarray) -> list[dict[str, Any]]:
    """Two samples."""
    return [sample(seed, array) for seed in range(2)]


def _written(name: str, write: Callable[[Path], Any], folder: Path, seed: int = 1) -> Any:
    path = folder / name
    write(path)
    return path, states(seed)


def here(library: str, name: str, write: Callable[[Path], Any], **facts: Any) -> Layout:
    """A layout of two samples, written by this process."""
    seed = facts.pop("seed", 1)
    facts.setdefault("count", 2)
    return Layout(library, HERE, partial(_written, name, write, seed=seed), **facts)


# --- pickles -------------------------------------------------------------------------------------


def _compressed(compress: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(compress(pickle.dumps(two())))


def _by_id(path: Path) -> None:
    path.write_bytes(pickle.dumps({each.pop("question_id"): each for each in two()}))


def _columns(path: Path) -> None:
    samples = two()
    columns = {f"{key}s" if key == "question_id" else key: [] for key in samples[0]}
    for each in samples:
        for column, value in zip(columns.values(), each.values(), strict=True):
            column.append(value)
    path.write_bytes(pickle.dumps(columns))


def _appended(path: Path) -> None:
    with path.open("ab") as file:
        for each in two():
            pickle.dump(each, file)


def _frame(path: Path) -> None:
    import pandas as pd

    pd.DataFrame([{**each, "label": n} for n, each in enumerate(two())]).to_pickle(path)


def _ml_dtypes(path: Path) -> None:
    # Numbers that bfloat16 holds, too.
    samples = [{**each, "hidden_states": _whole(each["hidden_states"])} for each in two()]
    path.write_bytes(pickle.dumps(samples))


def _whole(arrays: list[Any]) -> list[Any]:
    return [each.astype(ml_dtypes.bfloat16) for each in arrays]


def _bfloat16(folder: Path) -> tuple[Path, Any]:
    _ml_dtypes(folder / "a.pkl")
    return folder / "a.pkl", states(1).astype(ml_dtypes.bfloat16).astype(np.float32)


# --- torch.save ----------------------------------------------------------------------------------


def _outputs(path: Path, *, generate: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=32,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        if generate:
            wanted |= {"return_dict_in_generate": True, "max_new_tokens": 1, "pad_token_id": 0}
            found = model.generate(ids, **wanted)
            kept = found.hidden_states[0]
        else:
            found = model(ids, **wanted)
            kept = found.hidden_states
    torch.save(found, path)
    return np.stack([each[0].numpy() for each in kept])


def _model_output(folder: Path, *, generate: bool) -> tuple[Path, Any]:
    path = folder / "output.pt"
    return path, _outputs(path, generate=generate)


def _one_per_file(folder: Path) -> tuple[Path, Any]:
    for each in two(torch.tensor):
        torch.save(each, folder / f"{each['question_id']}.pt")
    return folder, states(1)


def _modules(path: Path) -> None:
    embedding, *blocks = (torch.tensor(each) for each in states(1))
    named = {f"model.layers.{n}": each for n, each in enumerate(blocks)}
    save_file({"model.embed_tokens": embedding, **named}, path)


def _prefixes(path: Path) -> None:
    save_file({f"{n}/hidden_states": torch.tensor(states(n)) for n in range(2)} | _weights(), path)


def _weights() -> dict[str, Any]:
    weights = torch.full((LAYERS, HEADS, TOKENS, TOKENS), 1 / TOKENS)
    return {f"{n}/attentions": weights.clone() for n in range(2)}


# --- numpy ---------------------------------------------------------------------------------------


def _npz(save: Any, path: Path) -> None:
    one = sample(1)
    with path.open("wb") as file:
        save(file, **{key: np.stack(one[key]) for key in ("hidden_states", "attentions")})


def _npz_prefixes(path: Path) -> None:
    arrays = {f"q{n}/states": states(n) for n in range(2)}
    ids = {f"q{n}/ids": np.arange(TOKENS) for n in range(2)}
    with path.open("wb") as file:
        np.savez(file, **arrays, **ids)


def _memmap(folder: Path) -> tuple[Path, Any]:
    found = states(1)[:LAYERS].transpose(1, 0, 2).astype(ml_dtypes.bfloat16)
    path = folder / "q1.bin"
    raw = np.memmap(path, np.uint16, "w+", shape=found.shape)
    raw[:] = found.view(np.uint16)
    raw.flush()
    return path, found.astype(np.float32).transpose(1, 0, 2)


def _file_per_layer(folder: Path) -> tuple[Path, Any]:
    run = folder / "run"
    run.mkdir()
    every = np.stack([states(0), states(1)])
    for layer in range(LAYERS + 1):
        np.save(run / f"hidden_{layer:03d}.npy", every[:, layer])
    np.save(run / "labels.npy", np.array([0, 1]))
    return run, states(1)


# --- tables --------------------------------------------------------------------------------------


def _rows(names: tuple[str, str] = ("question_id", "hidden_states")) -> list[dict[str, Any]]:
    key, field = names
    ids = list(range(TOKENS))
    return [{key: f"q{n}", field: states(n).tolist(), "input_ids": ids} for n in range(2)]


def _table() -> Any:
    return pa.Table.from_pylist(_rows())


def _datasets(path: Path) -> None:
    import datasets

    features = {
        "qid": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "response": datasets.Value("string"),
        "hs": datasets.Array3D(states().shape, "float32"),
        "input_ids": datasets.Sequence(datasets.Value("int64")),
    }
    rows = [{**each, "prompt": "?", "response": "!"} for each in _rows(("qid", "hs"))]
    datasets.Dataset.from_list(rows, datasets.Features(features)).save_to_disk(str(path))


def _json_lines(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(each)}\n" for each in _rows())


# --- HDF5 ----------------------------------------------------------------------------------------


def _hdf5(arrays: dict[str, Any], path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value


def _by_layer(path: Path) -> None:
    _hdf5({f"layer_{n}/inputs": each for n, each in enumerate(states(1))}, path)


def _probes(folder: Path) -> tuple[Path, Any]:
    last = np.stack([states(0)[:, -1], states(1)[:, -1]])
    arrays = {f"activations/layer_{n}": last[:, n] for n in range(LAYERS + 1)}
    _hdf5({**arrays, "labels": np.array([0, 1])}, folder / "a.h5")
    return folder / "a.h5", states(1)[:, -1:]


# --- recorded ------------------------------------------------------------------------------------


def recorded(library: str, name: str, states_of: Callable[[Path], Any], **facts: Any) -> Layout:
    """A layout whose files `tools/record_sources.py` made; other code reads its states."""

    def make(folder: Path) -> tuple[Path, Any]:
        source = RECORDED / library / name
        target = folder / (Path(name).name or "files")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target, np.asarray(states_of(target))

    return Layout(library, RECORD, make, **facts)


def _cache(path: Path, *, embedding: bool = True) -> Any:
    arrays = torch.load(path, weights_only=True)
    names = [f"blocks.{n}.hook_resid_post" for n in range(2)]
    first = [arrays["blocks.0.hook_resid_pre"]] if embedding else []
    return torch.stack([*first, *(arrays[name] for name in names)])[:, -1].numpy()


def _beside(path: Path) -> Any:
    """Of a pickled cache: that beside it, of the same prompt."""
    return _cache(RECORDED / "transformer-lens" / "cache.pt")


def _torch(path: Path, key: str | None = None) -> Any:
    found = torch.load(path, weights_only=True)
    found = found if key is None else found[key]
    found = list(found.values()) if isinstance(found, dict) else found
    return (found if torch.is_tensor(found) else torch.stack(list(found)))[:, -1].numpy()


def _dataset(path: Path) -> Any:
    import datasets

    rows = datasets.load_from_disk(str(path))
    (name,) = (each for each in rows.column_names if each != "token_ids")
    return np.asarray(rows[-1][name], np.float32)[None]


def _last_sentence(path: Path) -> Any:
    with h5py.File(path) as file:
        return file["1"][()]


def _drafting(path: Path) -> Any:
    last = sorted(path.iterdir())[-1]
    if last.name.endswith(".gz"):
        with gzip.open(last) as file:
            found = torch.load(file, weights_only=True)
    else:
        found = torch.load(last, weights_only=True)
    state = found["hidden_state"].reshape(-1, HIDDEN)
    aside = found.get("aux_hidden_state", state[:, :0]).reshape(len(state), -1)
    both = torch.cat([aside, state], -1).reshape(len(state), -1, HIDDEN)
    return both.transpose(0, 1).float().numpy()


def _requests(path: Path) -> Any:
    last = sorted(path.glob("*.safetensors"))[-1]
    return load_file(last)["hidden_states"].transpose(0, 1).float().numpy()


def _manager(path: Path) -> Any:
    found = torch.load(path, weights_only=False)
    return found["stats"]["embeddings_decoder"][-1][None, None]


def _generations(folder: Path) -> tuple[Path, Any]:
    entries = {}
    for seed in range(2):
        last = torch.tensor(states(seed))[:, -1:]
        entries[f"q{seed}"] = {
            "question": "?",
            "context": None,
            "reference": {"answers": {"text": ["!"]}},
            "most_likely_answer": {
                "response": "!",
                "token_log_likelihoods": [-0.5],
                "embedding": None,
                "accuracy": 1.0,
                "emb_last_tok_before_gen": last,
                "emb_tok_before_eos": last,
            },
            "responses": [],
        }
    path = folder / "validation_generations.pkl"
    path.write_bytes(pickle.dumps(entries))
    return path, states(1)[:, -1:]


LAYOUTS: dict[str, Layout] = {
    "list of dicts": here("pickle", "a.pkl", lambda path: path.write_bytes(pickle.dumps(two()))),
    "the same in gzip": here("pickle", "a.pkl.gz", partial(_compressed, gzip.compress)),
    "the same in bzip2": here("pickle", "a.pkl.bz2", partial(_compressed, bz2.compress)),
    "the same in xz": here("pickle", "a.pkl.xz", partial(_compressed, lzma.compress)),
    "the same in zstd": here("zstandard", "a.pkl.zst", partial(_compressed, zstandard.compress)),
    "dicts by question id": here("pickle", "a.pkl", _by_id),
    "columns": here("pickle", "a.pkl", _columns),
    "several dumps in one file": here("pickle", "a.pkl", _appended),
    "joblib.dump": here("joblib", "a.joblib", lambda path: joblib.dump(two(), path)),
    "joblib.dump, compressed": here(
        "joblib", "a.joblib.z", lambda path: joblib.dump(two(), path, compress=3)
    ),
    "dill.dump": here("dill", "a.dill", lambda path: path.write_bytes(dill.dumps(two()))),
    "arrays of bfloat16": Layout("ml_dtypes", HERE, _bfloat16, 2),
    "DataFrame.to_pickle": here("pandas", "a.pkl", _frame),
    "torch.save of a list": here("torch", "a.pt", lambda path: torch.save(two(torch.tensor), path)),
    "the same, before torch 1.6": here(
        "torch",
        "a.pt",
        lambda path: torch.save(two(torch.tensor), path, _use_new_zipfile_serialization=False),
    ),
    "torch.save of each sample": Layout("torch", HERE, _one_per_file, 2),
    "torch.save of the layers": here(
        "torch",
        "a.pt",
        lambda path: torch.save([torch.tensor(each)[None] for each in states(1)], path),
        count=1,
    ),
    "torch.save of an output": Layout("transformers", HERE, partial(_model_output, generate=False)),
    "torch.save of what generate returns": Layout(
        "transformers", HERE, partial(_model_output, generate=True)
    ),
    "safetensors, one tensor per module": here("safetensors", "a.safetensors", _modules, count=1),
    "safetensors, samples by prefix": here("safetensors", "a.safetensors", _prefixes),
    "numpy.savez": here("numpy", "a.npz", partial(_npz, np.savez), count=1),
    "numpy.savez_compressed": here("numpy", "a.npz", partial(_npz, np.savez_compressed), count=1),
    "numpy.savez, samples by prefix": here("numpy", "a.npz", _npz_prefixes, mapping="prompts-npz"),
    "numpy.save of each layer": Layout("numpy", HERE, _file_per_layer, 2, "layers-folder"),
    "numpy.memmap": Layout("numpy", HERE, _memmap, 1, "memmap-bfloat16"),
    "Parquet": here("pyarrow", "a.parquet", lambda path: pq.write_table(_table(), path)),
    "Feather": here("pyarrow", "a.feather", lambda path: feather.write_feather(_table(), path)),
    "JSON Lines in gzip": here("json", "a.jsonl.gz", _json_lines),
    "Dataset.save_to_disk": here("datasets", "a", _datasets, mapping="datasets-rows"),
    "HDF5, a dataset per layer": here("h5py", "a.h5", _by_layer, count=1, mapping="layers-hdf5"),
    "HDF5 of a probing study": Layout("h5py", HERE, _probes, 2, "probes-hdf5"),
    "cache_dict of an ActivationCache": recorded("transformer-lens", "cache.pt", _cache),
    "torch.save of an ActivationCache": recorded(
        "transformer-lens", "activation-cache.pt", _beside
    ),
    "cache of several prompts": recorded(
        "transformer-lens",
        "batch.pt",
        partial(_cache, embedding=False),
        count=2,
        mapping="transformer-lens-batch",
    ),
    "outputs of modules by name": recorded("nnsight", "named.pt", _torch),
    "outputs of modules, stacked": recorded(
        "nnsight", "stacked.pt", partial(_torch, key="activations"), mapping="nnsight-stacked"
    ),
    "layers_output": recorded("nnterp", "layers-output.pt", _torch),
    "CacheActivationsRunner, residual stream": recorded(
        "saelens", "hook_resid_post", _dataset, count=4
    ),
    "CacheActivationsRunner, another hook": recorded(
        "saelens", "hook_mlp_out", _dataset, count=4, mapping="saelens-mlp"
    ),
    "transformers_extractor": recorded(
        "neurox", "activations.hdf5", _last_sentence, count=2, mapping="neurox-hdf5"
    ),
    "allennlp elmo --all": recorded(
        "elmo", "elmo.hdf5", _last_sentence, count=2, mapping="elmo-hdf5"
    ),
    "ge_data, one .ckpt per sample": recorded("eagle", "", _drafting, count=2),
    "LocalFeatureStore, .ckpt and .ckpt.gz": recorded("specforge", "", _drafting, count=2),
    "hs_0.safetensors, ...": recorded("speculators", "", _requests, count=2),
    "ExampleHiddenStatesConnector": recorded("vllm", "", _requests, count=2),
    "UEManager.save": recorded(
        "lm-polygraph", "manager.pt", _manager, count=2, mapping="lm-polygraph"
    ),
    "validation_generations.pkl": Layout("semantic_uncertainty", IMITATED, _generations, 2),
}
