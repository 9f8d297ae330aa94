"""Names hidden states that are stored by position, when somebody says what the first one is."""

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
from h5traces.writing.stored_samples import StoredSample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.meaning.options import FirstState
    from h5traces.writing.preparation import Observation, Prepared

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
    """A stored trace that is copied with names of blocks; `is_whole`: no state was left out."""

    def __init__(
        self, trace: Trace, first_state: FirstState, *, is_whole: bool, first_source: int = 0
    ) -> None:
        super().__init__(trace, first_source=first_source)
        self._first_state, self._is_whole = first_state, is_whole

    @cached_property
    def _names(self) -> dict[str, tuple[str, str | None]]:
        """New name and site by old name."""
        form = self._form
        stored = self._trace.stored_layers(_STATES)
        names = [self._trace.array_name(_STATES, number) for number in stored]
        names = sorted({*names, *(form.absent or ())})
        from_dict = form.sequence == "dict"
        return named_positions(
            names, self._first_state, is_whole=self._is_whole, sites_known=not from_dict
        )

    @cached_property
    def _form(self) -> SourceForm:
        return self._trace.form(_STATES) if _STATES in self._trace.objects else SourceForm()

    def _new_form(self) -> SourceForm:
        form, names = self._form, self._names
        has_embedding = any(name == layout.EMBEDDING for name, _ in names.values())
        update = {
            "lists_embedding": has_embedding or None,
            "keys": form.keys and tuple((key, names[name][0]) for key, name in form.keys),
            "absent": form.absent and tuple(names[name][0] for name in form.absent),
        }
        return form.model_copy(update=update)

    def observation(self) -> Observation:
        """Layers and sizes of what is copied."""
        found = super().observation()
        if found.positions.pop(_STATES, None) is not None:
            for old, (name, _) in self._names.items():
                if f"{_STATES}/{old}" in self._trace.objects:
                    found.add_array(_STATES, name, ())
        return found

    def objects(self) -> Iterator[EncodedObject | Prepared]:
        """Groups and datasets, parents first."""
        for each in super().objects():
            kind, _, old = each.path.partition("/")
            if isinstance(each, EncodedObject):
                if each.path == _STATES:
                    kept = {k: v for k, v in each.attrs.items() if k not in SourceForm.model_fields}
                    attrs = {**kept, **to_attributes(self._new_form())}
                    yield EncodedObject(_STATES, attrs)
                else:
                    yield each
            elif kind == _STATES and old in self._names:
                name, site = self._names[old]
                attrs = each.attrs if site is None else {**each.attrs, "site": site}
                yield replace(each, path=f"{_STATES}/{name}", attrs=attrs)
            else:
                yield each
