"""What an attack is, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Build = Callable[[Path], None]


@dataclass(frozen=True)
class Attack:
    """A way to make a hostile file out of a valid archive, and what must come of it.

    Attributes
    ----------
    name
        What is wrong with the file.
    build
        Changes the valid archive at a path.
    error
        Pattern of the error that reading must end in; None if reading must give what the
        valid archive gives.
    may_fall_back
        Whether reading may also give what the valid archive gives, from its HDF5 part.
    problem
        Pattern of what ``validate`` must report of the structure; None if only values are wrong,
        so that it reports what reading them does.
    """

    name: str
    build: Build
    error: str | None
    problem: str | None
    may_fall_back: bool = False


def register(
    attacks: list[Attack],
    error: str | None,
    *,
    problem: str | None = "",
    name: str | None = None,
    may_fall_back: bool = False,
) -> Callable[[Build], Build]:
    """Decorator: the function builds an attack; `problem` is `error` unless given."""

    def add(build: Build) -> Build:
        found = error if problem == "" else problem
        title = name or build.__name__.replace("_", "-")
        attacks.append(Attack(title, build, error, found, may_fall_back))
        return build

    return add
