"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace archives that exist.")]
Layers = Annotated[
    str | None,
    typer.Option(metavar="0,5,10-12", help="Keep only these decoder blocks (0-based)."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read all back from disk and compare with the source before naming a file.",
    ),
]
Archives = Annotated[list[str], typer.Argument(metavar="FILE…", help="Archives, globs or folders.")]


def is_number(text: str) -> bool:
    """Whether `text` is a decimal number; `str.isdigit` takes superscripts, too."""
    return text.isascii() and text.isdigit()


def parse_layers(value: str | None) -> list[int] | None:
    """Layer numbers from ``0,5,10`` and ranges such as ``28-31``.

    Raises
    ------
    typer.BadParameter
        The text is something else.
    """
    if value is None:
        return None
    layers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not is_number(first) or (dash and not is_number(last)):
            message = f"{part!r} is no layer number; expected 0-based numbers such as 0,5,10 or 0-7"
            raise typer.BadParameter(message)
        layers += range(int(first), int(last if dash else first) + 1)
    return layers
