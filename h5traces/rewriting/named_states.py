"""Names hidden states that are stored by position, once the first one is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from h5traces.errors import OptionError
from h5traces.format import layout
from h5traces.format.document import to_attributes
from h5traces.format.record import SourceForm
from h5traces.format.values import EncodedObject
from h5traces.meaning.numbering import named_positions
from h5traces.writing.preparation import Prepared
from h5traces.writing.stored_samples import StoredSample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.meaning.options import FirstState
    from h5traces.writing.preparation import Observation

_STATES = layout.HIDDEN_STATES


def check_nameable(archive: Archive) -> None:
    """Raise OptionError unless hidden states are stored by position, each by itself."""
    for file in archive._files:
        kind = file.store.kinds.get(_STATES, {})
        if "positions" not in kind:
            message = (
                f"{file.path}: first_state names hidden states that are stored by position, and "
                f"there are {'blocks' if kind else 'none'}; leave it out"
            )
            raise OptionError(message)
        if file.metadata.precision is not None and file.metadata.precision.step is not None:
            message = (
                f"{file.path}: hidden states are stored in steps, with scales by position; pass "
                "first_state for the archive that this one was made of"
            )
            raise OptionError(message)


class NamedSample(StoredSample):
    """A stored trace that is copied with the names of blocks for its hidden states."""

    def __init__(self, trace: Trace, first_state: FirstState, *, first_source: int = 0) -> None:
        super().__init__(trace, first_source=first_source)
        self._first_state = first_state

    @cached_property
    def _form(self) -> SourceForm:
        return self._trace.form(_STATES) if _STATES in self._trace.objects else SourceForm()

    @cached_property
    def _names(self) -> dict[str, str]:
        """New names by old ones, those of items that were None included."""
        stored = self._trace.stored_layers(_STATES)
        names = {self._trace.array_name(_STATES, number) for number in stored}
        return named_positions(names.union(self._form.absent or ()), self._first_state)

    def _new_form(self) -> SourceForm:
        form, names = self._form, self._names
        update = {
            "lists_embedding": layout.EMBEDDING in names.values() or None,
            "keys": form.keys and tuple((key, names[name]) for key, name in form.keys),
            "absent": form.absent and tuple(names[name] for name in form.absent),
        }
        return form.model_copy(update=update)

    def observation(self) -> Observation:
        """Layers and sizes of copied arrays."""
        found = super().observation()
        for number in found.positions.pop(_STATES, ()):
            old = layout.position_name(number)
            found.add_array(_STATES, self._names[old], ())
        return found

    def objects(self) -> Iterator[EncodedObject | Prepared]:
        """Groups and datasets, parents first."""
        for each in super().objects():
            kind, _, old = each.path.partition("/")
            if each.path == _STATES and isinstance(each, EncodedObject):
                own = {k: v for k, v in each.attrs.items() if k not in SourceForm.model_fields}
                yield replace(each, attrs={**own, **to_attributes(self._new_form())})
            elif kind == _STATES and old in self._names and isinstance(each, Prepared):
                name = self._names[old]
                site = {"site": layout.SITE_EMBEDDING} if name == layout.EMBEDDING else {}
                yield each._replace(path=f"{_STATES}/{name}", attrs={**each.attrs, **site})
            else:
                yield each
