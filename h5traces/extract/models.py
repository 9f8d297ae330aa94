"""Models of transformers, found by name and loaded."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from h5traces.arguments import checked
from h5traces.errors import ExtractionError, MissingDependencyError
from h5traces.extract.anatomy import check_decoder_only
from h5traces.extract.sizes import ModelShape
from h5traces.format.text import and_more
from h5traces.storage.files import read_document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.extract.options import ModelDtype

# Short names; add to them here, or in the file that `aliases_path` names.
MODEL_ALIASES: dict[str, str] = {
    "llama2_7B": "meta-llama/Llama-2-7b-hf",
    "llama2_chat_7B": "meta-llama/Llama-2-7b-chat-hf",
    "llama2_chat_13B": "meta-llama/Llama-2-13b-chat-hf",
    "llama3.1_8B_instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral_7B_instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5_7B_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma2_9B_it": "google/gemma-2-9b-it",
}
_ALIASES_TABLE: Final = "models"
_EAGER: Final = "eager"
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_SAFE_WEIGHTS: Final = "model.safetensors"
_ADAPTER: Final = "adapter_config.json"


def aliases_path() -> Path:
    """The user's own table: ``[models]`` in ``$XDG_CONFIG_HOME/h5traces/models.toml``."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "h5traces" / "models.toml"


def known_aliases() -> dict[str, str]:
    """All aliases; the user's own win over `MODEL_ALIASES`."""
    path = aliases_path()
    if not path.exists():
        return dict(MODEL_ALIASES)
    try:
        text = read_document(path, ExtractionError, "a table of aliases").decode()
        own = tomllib.loads(text).get(_ALIASES_TABLE, {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path}: is not TOML: {error}"
        raise ExtractionError(message) from error
    if not isinstance(own, dict) or not all(isinstance(each, str) for each in own.values()):
        message = (
            f'{path}: expected a table [{_ALIASES_TABLE}] with lines such as mine = "/data/llama"'
        )
        raise ExtractionError(message)
    return {**MODEL_ALIASES, **own}


def resolve_model(model_id: str) -> str:
    """The hub id or path behind a name; a folder of that name wins over an alias."""
    return model_id if Path(model_id).is_dir() else known_aliases().get(model_id, model_id)


def load_config(
    model_id: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the configuration of a model."""
    config = _loaded(AutoConfig, model_id, revision, trust_remote_code=trust_remote_code)
    name = resolve_model(model_id)
    check_decoder_only(config, name)
    # A kernel is code of another repository, which transformers would download and run.
    implementation = str(config.get_text_config()._attn_implementation or "")
    if "/" in implementation and not trust_remote_code:
        message = (
            f"{name}: its configuration asks for the attention kernel {implementation!r}, which is "
            "code of another repository; remove 'attn_implementation' from its config.json"
        )
        raise ExtractionError(message)
    return config


@checked
def model_shape(
    model_id: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of a model, from its configuration alone; arguments as in `ModelChoice`.

    Raises
    ------
    ExtractionError
        The configuration cannot be loaded, or is that of an encoder-decoder.
    """
    return ModelShape.of(
        load_config(model_id, revision=revision, trust_remote_code=trust_remote_code)
    )


@checked
def load_tokenizer(
    model_id: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of a model; arguments as in `ModelChoice`.

    Raises
    ------
    ExtractionError
        It cannot be loaded.
    """
    return _loaded(AutoTokenizer, model_id, revision, trust_remote_code=trust_remote_code)


@checked
def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: ModelDtype = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    eager: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model in evaluation mode, from safetensors.

    Parameters
    ----------
    model_id, revision, dtype, device, load_in_4bit, trust_remote_code
        As in `ModelChoice`.
    eager
        Compute attention in the implementation that returns attention weights.

    Raises
    ------
    ExtractionError
        The model cannot be loaded, or not on that device; it needs code of its repository, which
        is not trusted; or its weights are pickled, incomplete, or those of an adapter.
    MissingDependencyError
        A library for 4 bits, or for several devices, is not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {
        "use_safetensors": True,
        "weights_only": True,
        "output_loading_info": True,
    }
    if eager:
        options["attn_implementation"] = _EAGER
    options["dtype"] = "float32" if dtype == "auto" and device.startswith("cpu") else dtype
    if load_in_4bit:
        options["quantization_config"] = _four_bits(device)
    if load_in_4bit or device == "auto":
        _require("accelerate", "device 'auto'" if device == "auto" else "load_in_4bit")
        options["device_map"] = "auto" if device == "auto" else {"": device}
    load_config(model_id, revision=revision, trust_remote_code=trust_remote_code)
    _check_weights(resolve_model(model_id))
    with _no_conversion():
        model, loading = _loaded(
            AutoModelForCausalLM,
            model_id,
            revision,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExtractionError(_adapter(resolve_model(model_id)))
    if missing := sorted(loading["missing_keys"]):
        message = (
            f"{resolve_model(model_id)}: the weights lack {and_more(missing, 3)}, which "
            "transformers fills with random numbers; expected the weights of a whole causal "
            "language model"
        )
        raise ExtractionError(message)
    if "device_map" not in options:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            message = (
                f"the model cannot be moved to device {device!r}: {str(error).splitlines()[0]}"
            )
            raise ExtractionError(message) from error
    return model.eval()


def _check_weights(name: str) -> None:
    """Reject a local folder with pickled weights only, an index that names others, or an adapter.

    From the hub, transformers itself is made to load safetensors only.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / _ADAPTER).exists():
        raise ExtractionError(_adapter(name))
    if (folder / _SAFE_WEIGHTS).exists():
        return
    index = folder / f"{_SAFE_WEIGHTS}.index.json"
    if index.exists():
        for each in _listed_weights(index):
            if not each.endswith(".safetensors") or Path(each).name != each:
                message = f"{index}: names {each!r}; expected .safetensors files in the same folder"
                raise ExtractionError(message)
    elif any(folder.glob("pytorch_model*.bin*")):
        raise ExtractionError(_pickled(name))


def _listed_weights(index: Path) -> set[str]:
    try:
        data = read_document(index, ExtractionError, "an index of safetensors files")
        return {str(each) for each in json.loads(data)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"{index}: is not an index of safetensors files: {error!r}"
        raise ExtractionError(message) from error


def _pickled(name: str, found: str = "its weights are pickled (pytorch_model.bin)") -> str:
    return (
        f"{name}: {found}; loading a pickle can run any code, so safetensors are expected. Where "
        "you trust the file, convert it once: "
        f"AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False)"
        ".save_pretrained('converted/'), the same with AutoTokenizer, and name that folder"
    )


def _adapter(name: str) -> str:
    return (
        f"{name} is an adapter ({_ADAPTER}), which names another model to load; expected a whole "
        "model: merge the adapter into its base model (merge_and_unload of peft), save that with "
        "save_pretrained, and name its folder"
    )


@contextlib.contextmanager
def _no_conversion() -> Iterator[None]:
    """Keep transformers from loading what a bot proposed, or asking it to convert pickles."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _four_bits(device: str) -> Any:
    _require("bitsandbytes", "load_in_4bit")
    if device.startswith("cpu"):
        message = "load_in_4bit needs CUDA, but the device is 'cpu'; choose device 'cuda'"
        raise ExtractionError(message)
    from transformers import BitsAndBytesConfig  # needs the library when it is used

    untyped: Any = BitsAndBytesConfig
    return untyped(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)


def _require(library: str, option: str) -> None:
    try:
        __import__(library)
    except ImportError as error:
        message = f"{option} needs {library}, which is not installed; pip install {library}"
        raise MissingDependencyError(message) from error


def _loaded(
    factory: Any, model_id: str, revision: str | None, *, trust_remote_code: bool, **options: Any
) -> Any:
    """What `factory` loads by that name, or an error that says what was looked for."""
    name = resolve_model(model_id)
    _check_revision(name, revision, trust_remote_code=trust_remote_code)
    try:
        if trust_remote_code:
            _check_own_code(name, revision)
        # Always passed: where nothing is, transformers asks on the terminal.
        return factory.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    # transformers, huggingface_hub, tokenizers and safetensors each have their own errors, and a
    # broken configuration ends in any of Python's.
    except ExtractionError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text and not trust_remote_code:
            raise ExtractionError(_needs_code(name)) from error
        if "does not appear to have a file named model.safetensors" in text:
            found = "there is no model.safetensors, so its weights may be pickled"
            raise ExtractionError(_pickled(name, found)) from error
        lines = (line for line in text.splitlines() if line.strip())
        message = f"{_not_loaded(model_id, name)}: {next(lines, type(error).__name__)}"
        raise ExtractionError(message) from error


def _check_revision(name: str, revision: str | None, *, trust_remote_code: bool) -> None:
    """Reject a revision that is not used, or that somebody can move to other code."""
    if Path(name).is_dir():
        if revision is not None:
            message = (
                f"{name} is a local folder, which has no revision {revision!r}; leave revision out"
            )
            raise ExtractionError(message)
    elif trust_remote_code and not _COMMIT.fullmatch(revision or ""):
        given = "none is given" if revision is None else f"{revision!r} is a branch or tag"
        message = (
            f"{name}: trust_remote_code=True runs code of the repository, so revision must be a "
            f"commit (40 hexadecimal digits), but {given}: whoever owns the repository can move "
            "that to other code; take the commit that you have read from its page, 'Files and "
            "versions', 'History'"
        )
        raise ExtractionError(message)


def _check_own_code(name: str, revision: str | None) -> None:
    """Reject code of another repository, which the commit does not fix."""
    untyped: Any = PreTrainedConfig
    documents = (
        untyped.get_config_dict(name, revision=revision)[0],
        get_tokenizer_config(name, revision=revision),
    )
    for document in documents:
        classes = document.get("auto_map") or {}
        for each in classes.values() if isinstance(classes, dict) else [classes]:
            named = each if isinstance(each, (list, tuple)) else [each]
            foreign = next((str(one) for one in named if "--" in str(one)), None)
            if foreign is not None:
                message = (
                    f"{name}: takes its code from another repository ({foreign}), which revision "
                    "does not fix; copy model and code into one local folder, read the code, and "
                    "name that folder"
                )
                raise ExtractionError(message)


def _needs_code(name: str) -> str:
    is_local = Path(name).is_dir()
    where = "the .py files of the folder" if is_local else "it on the hub"
    commit = "" if is_local else " and, as revision, its commit"
    return (
        f"{name}: the model needs Python code that comes with it, which is never run unasked; "
        f"read {where}, then pass trust_remote_code=True{commit}"
    )


def _not_loaded(model_id: str, name: str) -> str:
    if Path(name).is_dir():
        return f"the model in {name} cannot be loaded"
    aliases = known_aliases()
    if model_id in aliases:
        hint = f"{model_id} stands for {name}"
    else:
        close = difflib.get_close_matches(model_id, aliases, n=3)
        hint = f"no folder and no alias has that name ({'close' if close else 'known'} aliases: "
        hint += f"{', '.join(close or aliases)})"
    return (
        f"the model {name!r} cannot be loaded; {hint}; without a network it must be in the cache "
        "(HF_HOME), or name a local folder"
    )


def set_threads(threads: int | None) -> None:
    """Let torch compute with this many threads; None for the cores that are free.

    Threads that wait for each other on a busy machine cost time.
    """
    if threads is None:
        cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
        free = (cores or 1) - round(os.getloadavg()[0])
        threads = max(1, min(torch.get_num_threads(), free))
    torch.set_num_threads(threads)


def hide_progress_bars() -> None:
    """Keep transformers' progress bars out of the output of a command."""
    untyped: Any = logging.disable_progress_bar
    untyped()
