"""What is recorded of a run: model, tokenizer, libraries, device, options."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash

from h5traces.format.extraction import ExtractionMetadata

if TYPE_CHECKING:
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.questions import QuestionSet


def plain_json(document: Any) -> Any:
    """A document as JSON gives it back; what JSON has no type for as its text."""
    return json.loads(json.dumps(document, default=str))


def weights_digest(model: Any) -> str | None:
    """xxh3-128 over name, type, shape and bytes of every parameter and stored buffer.

    None where some are not in memory, as when a model is spread over devices and disk.
    """
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            return None
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        values = value.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3-128 over a tokenizer's rules, or where it has none its vocabulary, and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    text = f"{rules}\0{tokenizer.chat_template or ''}"
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _quantization(model: Any) -> str | None:
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    document = found if isinstance(found, dict) else found.to_dict()
    return json.dumps(plain_json(document), sort_keys=True)


def extraction_metadata(
    model: Any,
    tokenizer: Any,
    options: ExtractOptions,
    *,
    generation: Any,
    questions: QuestionSet | None = None,
) -> ExtractionMetadata:
    """Everything that decided what a run stores.

    Parameters
    ----------
    model, tokenizer
        What computes.
    options
        The options of the run.
    generation
        The generation config in force.
    questions
        The data set.
    """
    drawing = {
        name: getattr(options.generation, name) for name in ("temperature", "top_k", "top_p")
    }
    return ExtractionMetadata(
        model_class=type(model).__name__,
        config=plain_json(model.config.to_dict()),
        weights_digest=weights_digest(model),
        tokenizer_class=type(tokenizer).__name__,
        tokenizer_digest=tokenizer_digest(tokenizer),
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
        model_dtype=str(model.dtype).removeprefix("torch."),
        quantization=_quantization(model),
        device=device_name(model.get_input_embeddings().weight.device),
        generation=plain_json(
            {
                **generation.to_diff_dict(),
                "max_new_tokens": options.generation.max_new_tokens,
                "num_beams": options.generation.num_beams,
                "do_sample": options.generation.do_sample,
                **(drawing if options.generation.do_sample else {}),
            }
        ),
        seed=options.seed,
        batch_size=options.batch_size,
        prompt_template=options.prompt_template,
        chat_template=tokenizer.chat_template if options.chat else None,
        answer_cut=options.answer_cut,
        dataset_config=questions.config if questions else None,
        dataset_split=questions.split if questions else None,
        dataset_revision=questions.revision if questions else None,
    )
