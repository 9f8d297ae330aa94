"""From a transformers model straight into the archive.

>>> from h5traces.extract import extract              # doctest: +SKIP
>>> with h5traces.create("traces/") as writer:        # doctest: +SKIP
...     for record in extract(model, tokenizer, questions):
...         writer.append(record)
"""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces.extract.estimate import shape_of
    from h5traces.extract.extracting import estimate_with_pilot, extract_dataset
    from h5traces.extract.extractor import extract, extract_activations_and_attentions
    from h5traces.extract.models import (
        MODEL_ALIASES,
        hide_progress_bars,
        load_config,
        load_model,
        load_tokenizer,
    )
    from h5traces.extract.options import (
        DEFAULT_TEMPLATE,
        DatasetChoice,
        ExtractOptions,
        GenerationOptions,
        ModelChoice,
        StoreOptions,
    )
    from h5traces.extract.questions import Columns, Question
    from h5traces.extract.running import ExtractionReport

__all__ = [
    "DEFAULT_TEMPLATE",
    "MODEL_ALIASES",
    "Columns",
    "DatasetChoice",
    "ExtractOptions",
    "ExtractionReport",
    "GenerationOptions",
    "ModelChoice",
    "Question",
    "StoreOptions",
    "estimate_with_pilot",
    "extract",
    "extract_activations_and_attentions",
    "extract_dataset",
    "hide_progress_bars",
    "load_config",
    "load_model",
    "load_tokenizer",
    "shape_of",
]

_HOMES = {
    "Columns": "h5traces.extract.questions",
    "DEFAULT_TEMPLATE": "h5traces.extract.options",
    "DatasetChoice": "h5traces.extract.options",
    "ExtractOptions": "h5traces.extract.options",
    "ExtractionReport": "h5traces.extract.running",
    "GenerationOptions": "h5traces.extract.options",
    "MODEL_ALIASES": "h5traces.extract.models",
    "ModelChoice": "h5traces.extract.options",
    "Question": "h5traces.extract.questions",
    "StoreOptions": "h5traces.extract.options",
    "estimate_with_pilot": "h5traces.extract.extracting",
    "extract": "h5traces.extract.extractor",
    "extract_activations_and_attentions": "h5traces.extract.extractor",
    "hide_progress_bars": "h5traces.extract.models",
    "extract_dataset": "h5traces.extract.extracting",
    "load_config": "h5traces.extract.models",
    "load_model": "h5traces.extract.models",
    "load_tokenizer": "h5traces.extract.models",
    "shape_of": "h5traces.extract.estimate",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES, extra="extract")
