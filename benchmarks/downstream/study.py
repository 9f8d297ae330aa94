"""The study of one model: capture, calibrate, measure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from transformers import AutoModel

from downstream.capturing import capture
from downstream.coding import Coder, calibrate, encodings
from downstream.embeddings import measure_embeddings
from downstream.patching import Effects, Patched, batches, measure_patching, predicted_tokens
from downstream.probes import Labelled, measure_probes
from downstream.rates import measure_errors, measure_rate
from downstream.resampling import Bootstrap
from downstream.texts import Limits, shipped_texts, split, texts_of_file
from downstream.weights import flip_share, measure_weights
from h5traces.extract import load_model, load_tokenizer
from h5traces.extract.anatomy import anatomy_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from downstream.capturing import Trace
    from downstream.texts import Split
    from h5traces.precision.scales import ChannelStatistics

# Types to compute in that people use without a thought; what they change is the yardstick.
YARDSTICKS: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Options:
    """What is studied.

    Attributes
    ----------
    folder
        Of the model.
    texts
        File with one text per line; None for those held out from training the shipped model.
    limits
        Of the texts.
    layers
        Whose states are looked at; None for all.
    resamples
        Of the bootstrap.
    device
        Where the model runs.
    """

    folder: Path
    texts: Path | None
    limits: Limits
    layers: list[int] | None = None
    resamples: int = 10_000
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of the model: its folder, or the one above, where that is called no more than model."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "model" else folder.name


def say(text: str) -> None:
    """Where the work is."""
    print(text, file=sys.stderr, flush=True)


def read_texts(options: Options) -> tuple[list[str], dict[str, Any]]:
    """All texts, and what is known of them."""
    return shipped_texts() if options.texts is None else texts_of_file(options.texts)


class Study:
    """What all measurements of a model share.

    Parameters
    ----------
    options
        What is studied.
    model
        With eager attention, in float32.
    parts
        Texts as tokens.
    """

    def __init__(self, options: Options, model: Any, parts: Split) -> None:
        self.options, self.parts = options, parts
        num_layers = model.config.get_text_config().num_hidden_layers
        self.layers = list(range(num_layers)) if options.layers is None else options.layers
        if not set(self.layers) <= set(range(num_layers)):
            message = f"layers are {self.layers}; the model has 0 to {num_layers - 1}"
            raise SystemExit(message)
        say(f"{options.name}: {len(parts.calibration)} + {len(parts.held_out)} texts")
        self.calibration = self.capture(model, parts.calibration)
        self.held_out = self.capture(model, parts.held_out)
        self.statistics = calibrate(self.calibration)
        self.coders = {name: Coder(each, self.statistics) for name, each in encodings().items()}

    def capture(self, model: Any, texts: list[list[int]]) -> list[Trace]:
        """What the model computes in the layers that are looked at."""
        return [each.of_layers(self.layers) for each in capture(model, texts)]

    def differences(self) -> list[ChannelStatistics]:
        """Of neighbouring layers; none where some are left out, or behind the final norm."""
        if self.layers != list(range(len(self.layers))):
            return []
        return calibrate(self.calibration, differences=True)

    def about(self, model: Any) -> dict[str, Any]:
        """What was studied."""
        config = model.config.get_text_config()
        lengths = [len(each) for each in self.parts.held_out]
        return {
            "name": self.options.name,
            "family": config.model_type,
            "parameters": sum(each.numel() for each in model.parameters()),
            "num_layers": config.num_hidden_layers,
            "layers": self.layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "calibration_texts": len(self.parts.calibration),
            "held_out_texts": len(lengths),
            "held_out_tokens": sum(lengths),
            "mean_tokens": sum(lengths) / len(lengths),
        }

    def states(self, differences: Sequence[ChannelStatistics]) -> dict[str, Any]:
        """Bits and errors by encoding."""
        return {
            name: {
                **measure_rate(coder, self.held_out),
                **measure_errors(coder, self.held_out, differences),
            }
            for name, coder in self.coders.items()
        }


def study_causal(options: Options) -> dict[str, Any]:
    """All measurements of a causal model."""
    tokenizer = load_tokenizer(str(options.folder))
    model = load_model(str(options.folder), device=options.device, dtype="float32")
    texts, about = read_texts(options)
    study = Study(options, model, split(texts, tokenizer, options.limits))
    bootstrap = Bootstrap(len(study.held_out), options.resamples)
    patched = Patched(model, anatomy_of(model), study.layers)
    found = {"about": {**study.about(model), **about}}
    say("bits and errors")
    # The last state is behind the final norm: its difference to the one before is none of a block.
    found["states"] = study.states(study.differences()[:-1])
    found["attentions"] = measure_weights(study.held_out)
    say("patching")
    found["patching"] = measure_patching(patched, study.coders, study.held_out, bootstrap)
    say("probes")
    found["probes"] = measure_probes(
        study.coders,
        Labelled(tokenizer, study.calibration),
        Labelled(tokenizer, study.held_out),
        bootstrap,
    )
    say("yardsticks")
    found["yardsticks"] = {
        name: _yardstick(study, patched, dtype, bootstrap) for name, dtype in YARDSTICKS.items()
    }
    return found


def study_encoder(options: Options) -> dict[str, Any]:
    """What can be measured of an encoder, which predicts no next token."""
    tokenizer = load_tokenizer(str(options.folder))
    model = AutoModel.from_pretrained(
        options.folder, attn_implementation="eager", dtype=torch.float32, add_pooling_layer=False
    )
    model = model.to(options.device).eval()
    texts, about = read_texts(options)
    study = Study(options, model, split(texts, tokenizer, options.limits))
    found = {"about": {**study.about(model), **about}}
    say("bits and errors")
    found["states"] = study.states(study.differences())
    found["attentions"] = measure_weights(study.held_out)
    found["embeddings"] = {
        name: measure_embeddings(coder, study.held_out) for name, coder in study.coders.items()
    }
    return found


def _yardstick(
    study: Study, patched: Patched, dtype: torch.dtype, bootstrap: Bootstrap
) -> dict[str, Any]:
    """What it changes to compute in another type than float32, weights included."""
    model = load_model(str(study.options.folder), device=study.options.device, dtype="float32")
    model = model.to(dtype)
    other = Patched(model, anatomy_of(model), study.layers)
    effects = Effects(len(study.held_out))
    for indices in batches(study.held_out):
        batch = [study.held_out[index] for index in indices]
        before, after = patched.logits(batch, {}), other.logits(batch, {})
        for row, index in enumerate(indices):
            effects.add(index, study.held_out[index], row, of=after, against=before)
    traces = study.capture(model, study.parts.held_out)
    squares = [
        np.square((a.astype(np.float64) - b) / each.sigma).mean(axis=1).sum()
        for one, two in zip(traces, study.held_out, strict=True)
        for a, b, each in zip(one.states, two.states, study.statistics, strict=True)
    ]
    num_states = len(study.layers) * sum(len(each.tokens) for each in study.held_out)
    return {
        "nrmse": float(np.sqrt(np.sum(squares) / num_states)),
        "flip_share": flip_share(study.held_out, traces),
        **effects.summary(bootstrap, predicted_tokens(study.held_out)),
    }
