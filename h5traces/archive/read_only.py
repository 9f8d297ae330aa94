"""What views of an archive have in common: they cannot be changed, and say what can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from h5traces.errors import ReadOnlyError

# Methods of dict and list that change it.
_CHANGING = frozenset(
    {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault"}
    | {"sort", "update"}
)


class ReadOnly:
    """A view that looks like a dict or list, and cannot be changed.

    Attributes
    ----------
    _way_out
        One clause for the error: what to change instead.
    """

    _way_out: ClassVar[str]

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        what = "entries cannot be assigned"
        raise self._cannot_change(what)

    def __delitem__(self, key: Any) -> NoReturn:
        what = "entries cannot be deleted"
        raise self._cannot_change(what)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        # Nothing inside can be changed: each array that is read is a new one.
        return self

    if not TYPE_CHECKING:  # other names stay errors of type checkers

        def __getattr__(self, name: str) -> Any:
            if name in _CHANGING:
                what = f"there is no {name}()"
                raise self._cannot_change(what)
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)

    def _cannot_change(self, what: str) -> ReadOnlyError:
        return ReadOnlyError(f"{self!r} is read from its file, so {what}; {self._way_out}")
