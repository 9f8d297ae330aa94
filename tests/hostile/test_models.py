"""Models that bring code: none of it runs unasked, and none that nobody has pinned."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from commands import run

from h5traces.errors import ExtractionError
from h5traces.extract import (
    DatasetChoice,
    ExtractOptions,
    ModelChoice,
    extract_dataset,
    load_model,
    load_tokenizer,
    model_shape,
)
from h5traces.extract.models import load_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama-pydocs"
QUESTIONS = ROOT / "examples" / "questions.jsonl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Imports say that they were run.
CODE = """
from pathlib import Path
Path({mark!r}).write_text("the code of the model was run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
LOADERS = {"config": load_config, "shape": model_shape, "tokenizer": load_tokenizer}
LOADERS["model"] = load_model


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(autouse=True)
def _own_hub(monkeypatch, tmp_path):
    """No test asks a server, and code of models is copied to no cache of the user."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


@pytest.fixture
def mark(tmp_path):
    """A file that only code of a model makes."""
    return tmp_path / "was-run"


def edit(path, **changes):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def model_with_code(folder, mark, *, module="own", known=False):
    """A copy of the tiny model that says it needs code; one that transformers knows, or not."""
    shutil.copytree(TINY, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": f"{module}.OwnConfig", "AutoModelForCausalLM": f"{module}.OwnModel"}
    changes = {} if known else {"model_type": "own", "architectures": ["OwnModel"]}
    edit(folder / "config.json", auto_map=classes, **changes)
    tokenizer = {"AutoTokenizer": [None, f"{module}.OwnTokenizer"]}
    changes = {} if known else {"tokenizer_class": "OwnTokenizer"}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer, **changes)
    return folder


def on_the_hub(tmp_path, source, name="models--evil--model", commit=COMMIT):
    """A model as huggingface_hub keeps it; gives its id."""
    place = tmp_path / "hub" / name
    shutil.copytree(source, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return name.removeprefix("models--").replace("--", "/")


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_code_of_a_folder_is_not_run(tmp_path, mark, loader):
    folder = model_with_code(tmp_path / "evil", mark)
    with pytest.raises(ExtractionError, match=r"needs Python code .* trust_remote_code=True"):
        loader(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_code_of_the_hub_is_not_run(tmp_path, mark, loader):
    name = on_the_hub(tmp_path, model_with_code(tmp_path / "evil", mark))
    with pytest.raises(ExtractionError, match="and, as revision, its commit"):
        loader(name)
    assert not mark.exists()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_model_that_transformers_knows_is_loaded_without_its_code(tmp_path, mark, loader):
    loader(str(model_with_code(tmp_path / "evil", mark, known=True)))
    assert not mark.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper() + "0", ""])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_trusted_code_is_that_of_a_commit(tmp_path, mark, loader, revision):
    name = on_the_hub(tmp_path, model_with_code(tmp_path / "evil", mark))
    with pytest.raises(ExtractionError, match=r"must be a commit .* can move that to other code"):
        loader(name, revision=revision, trust_remote_code=True)
    assert not mark.exists()


def test_code_of_a_commit_is_run_when_it_is_trusted(tmp_path, mark):
    name = on_the_hub(tmp_path, model_with_code(tmp_path / "own", mark))
    model = load_model(name, revision=COMMIT, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert mark.exists()


def test_code_of_a_folder_is_run_when_it_is_trusted(tmp_path, mark):
    folder = model_with_code(tmp_path / "own", mark)
    choice = ModelChoice(model_id=str(folder), trust_remote_code=True)
    report = extract_dataset(
        choice,
        DatasetChoice(dataset=str(QUESTIONS), num_samples=1),
        tmp_path / "run.h5",
        ExtractOptions(layers=[0]),
    )
    assert report.num_written == 1
    assert mark.exists()


@pytest.mark.parametrize("document", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_never_run(tmp_path, mark, document):
    other = on_the_hub(tmp_path, model_with_code(tmp_path / "code", mark), "models--other--code")
    folder = shutil.copytree(TINY, tmp_path / "evil")
    key = "AutoTokenizer" if document.startswith("token") else "AutoModelForCausalLM"
    edit(folder / document, auto_map={key: f"{other}--own.OwnModel"})
    name = on_the_hub(tmp_path, folder)
    for model_id, revision in ((str(folder), None), (name, COMMIT)):
        with pytest.raises(ExtractionError, match=r"of another|another repository .*revision"):
            load_model(model_id, revision=revision, trust_remote_code=True)
    assert not mark.exists()


def test_a_local_folder_has_no_revision(tmp_path):
    """It would be ignored, and the archive would name it all the same."""
    with pytest.raises(ExtractionError, match="is a local folder, which has no revision 'main'"):
        load_model(str(TINY), revision="main")


def with_pickled_weights(folder, mark):
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    return folder


def test_pickled_weights_are_not_loaded(tmp_path, mark):
    folder = with_pickled_weights(tmp_path / "evil", mark)
    message = r"are pickled \(pytorch_model.bin\).*safetensors are expected.*use_safetensors=False"
    with pytest.raises(ExtractionError, match=message):
        load_model(str(folder))
    with pytest.raises(ExtractionError, match="so its weights may be pickled"):
        load_model(on_the_hub(tmp_path, folder))
    assert not mark.exists()


def test_pickled_weights_convert_as_the_message_says(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(TINY, tmp_path / "old")
    expected = load_model(str(TINY)).state_dict()
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=False)
    found.save_pretrained(tmp_path / "converted/")
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path / "converted/")
    converted = load_model(str(tmp_path / "converted")).state_dict()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize("named", ["weights.bin", "../evil.safetensors", "/dev/zero"])
def test_an_index_names_safetensors_of_its_folder(tmp_path, mark, named):
    folder = with_pickled_weights(tmp_path / "evil", mark)
    (folder / "pytorch_model.bin").rename(folder / "weights.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExtractionError, match="files in the same folder"):
        load_model(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path, mark, index):
    folder = with_pickled_weights(tmp_path / "evil", mark)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ExtractionError, match="is not an index of safetensors files"):
        load_model(str(folder))


def test_an_adapter_is_no_model(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(ExtractionError, match="is an adapter"):
        load_model(str(folder))


@pytest.mark.parametrize("kinds", [("hidden_states",), ("hidden_states", "attentions")])
def test_a_configuration_names_no_kernel(tmp_path, kinds):
    folder = shutil.copytree(TINY, tmp_path / "evil")
    edit(folder / "config.json", attn_implementation="evil/kernel")
    with pytest.raises(ExtractionError, match="the attention kernel 'evil/kernel'"):
        load_model(str(folder), eager="attentions" in kinds)


@pytest.mark.parametrize("config", ["", "[]", "null", "[" * 100_000, '{"model_type": 3}'])
@pytest.mark.parametrize("trust", [False, True])
def test_a_broken_configuration_ends_in_one_error(tmp_path, config, trust):
    folder = shutil.copytree(TINY, tmp_path / "broken")
    (folder / "config.json").write_text(config)
    with pytest.raises(ExtractionError, match="cannot be loaded"):
        load_model(str(folder), trust_remote_code=trust)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "x"}, {"num_hidden_layers": None}, {"auto_map": 3}, {"hidden_size": -1}],
    ids=str,
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_configuration_of_odd_values_ends_in_one_error(tmp_path, changes, trust):
    folder = shutil.copytree(TINY, tmp_path / "odd")
    edit(folder / "config.json", **changes)
    with pytest.raises(ExtractionError, match="cannot be loaded"):
        load_model(str(folder), trust_remote_code=trust)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "more")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    edit(folder / "config.json", num_hidden_layers=layers + 1)
    message = rf"the weights lack model.layers.{layers}.* fills with random numbers"
    with pytest.raises(ExtractionError, match=message):
        load_model(str(folder))


def test_the_command_line_says_which_options(tmp_path, mark):
    folder = model_with_code(tmp_path / "evil", mark)
    name = on_the_hub(tmp_path, folder)
    common = ["--dataset", str(QUESTIONS), "-o", str(tmp_path / "run.h5")]
    for arguments, expected in (
        (["--model-id", str(folder)], "pass --trust-remote-code"),
        (["--model-id", name, "--trust-remote-code", "--revision", "main"], "'main' is a branch"),
    ):
        done = run("extract", *arguments, *common, code=2)
        assert expected in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "run.h5").exists()
    # The same options for the forecast.
    done = run("estimate", "--model-id", folder, "--trust-remote-code")
    assert mark.exists()
