"""From a transformers model straight into the archive.

>>> from h5traces.extract import extract              # doctest: +SKIP
>>> with h5traces.create("traces") as writer:         # doctest: +SKIP
...     for record in extract(model, tokenizer, questions):
...         writer.append(record)
"""

from h5traces.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401  # named here, so that its absence is told apart
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    _MESSAGE = (
        f"{error.name} is not installed, which extraction needs; pip install 'h5traces[extract]'"
    )
    raise MissingDependencyError(_MESSAGE) from error

from h5traces.extract.estimate import shape_of
from h5traces.extract.extracting import estimate_with_pilot, extract_dataset
from h5traces.extract.extractor import extract, extract_activations_and_attentions
from h5traces.extract.generation import DEFAULT_TEMPLATE, GenerationOptions
from h5traces.extract.models import MODEL_ALIASES, load_config, load_model, load_tokenizer
from h5traces.extract.options import DatasetChoice, ExtractOptions, ModelChoice, StoreOptions
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
    "load_config",
    "load_model",
    "load_tokenizer",
    "shape_of",
]
