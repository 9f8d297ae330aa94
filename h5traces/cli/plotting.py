"""``h5traces plot``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from h5traces.archive.opening import open as open_archive
from h5traces.cli.command import command
from h5traces.cli.console import note, print_line
from h5traces.cli.options import Archives, NewFile, option
from h5traces.errors import OptionError
from h5traces.storage.publish import PartFile, make_folder

_FORMATS = (".png", ".svg", ".pdf")
Quantity = Literal["norm", "change", "cosine_before", "cosine_last", "entropy", "sink"]


@command()
def plot(
    sources: Archives,
    *,
    sample: Annotated[int, option(None, "--sample N", "Index of the sample.", min=0)] = 0,
    layer: Annotated[
        int | None,
        option(None, "--layer N", "Draw the attention of each head of this layer.", min=0),
    ] = None,
    quantity: Annotated[
        Quantity,
        option(
            None,
            "--quantity NAME",
            f"Of the map of layers and tokens: {', '.join(get_args(Quantity))}.",
        ),
    ] = "norm",
    output: Annotated[str, option(None, "-o --output FILE", "Ends in `.png`, `.svg` or `.pdf`.")],
    target: NewFile,
) -> None:
    """Draw a sample as a picture.

    A map of layers and tokens, or with `--layer` the attention of each head.

    - `h5traces plot run.h5 --sample 2 -o map.png`
    - `h5traces plot run.h5 --quantity entropy -o entropy.svg`
    - `h5traces plot run.h5 --layer 3 -o heads.pdf`
    """
    path = Path(output)
    if path.suffix not in _FORMATS:
        message = f"output={output!r}: pictures end in {', '.join(_FORMATS)}"
        raise OptionError(message)
    # Here, so that help needs no extra, and a missing one is an error as any other.
    from h5traces.plotting import attention_grid, layer_map, without_windows

    without_windows()

    trace = open_archive(sources)[sample]
    figure: Any = (
        layer_map(trace, quantity).figure if layer is None else attention_grid(trace, layer)
    )
    make_folder(path.parent)
    with PartFile(path) as part, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(part.file, format=path.suffix[1:], dpi=150)
        part.file.raise_error()
        part.publish(overwrite=target.overwrite)
    if any("missing from font" in str(each.message) for each in caught):
        note("some characters of tokens are boxes: matplotlib's font does not have them")
    print_line(f"{path}: {trace.metadata.sample_id or f'sample {sample}'}")
