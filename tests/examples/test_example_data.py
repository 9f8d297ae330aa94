"""The shipped batch holds what transformers itself computes from the shipped model."""

from pathlib import Path

import numpy as np
import pytest

import h5traces

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
# Another processor sums in another order; float16 keeps 11 bits.
TOLERANCE = {"rtol": 4e-3, "atol": 4e-3}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    out = tmp_path_factory.mktemp("archives")
    report = h5traces.convert(EXAMPLES / "legacy", out)
    assert report.ok
    return h5traces.open(out)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(
        EXAMPLES / "tiny-llama-pydocs", attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("index", [0, 6])
def test_arrays_are_the_models_own(archive, model, index):
    trace = archive[index]
    with torch.no_grad():
        out = model(
            torch.from_numpy(trace["tokens"])[None],
            output_hidden_states=True,
            output_attentions=True,
        )
    assert len(trace["hidden_states"]) == len(out.attentions) == len(out.hidden_states) - 1
    for position, states in enumerate(trace["hidden_states"]):
        # Position k is state index k + 1: the embedding was never stored.
        np.testing.assert_allclose(states, out.hidden_states[position + 1][0], **TOLERANCE)
    for position, weights in enumerate(trace["attentions"]):
        np.testing.assert_allclose(weights, out.attentions[position][0], **TOLERANCE)
        assert not np.triu(weights, 1).any()


def test_the_last_hidden_state_is_behind_the_final_norm(archive, model):
    sites = archive[0]["hidden_states"].sites
    assert sites == ("block_output",) * 5 + ("final_norm",)
    assert model.config.num_hidden_layers == len(sites) == archive.metadata.num_layers
