"""Objects as they show in a notebook: compact, foldable, escaped, without scripts."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_LONGEST_TEXT: Final = 300
_MOST_ROWS: Final = 20
# Colours come from the notebook, so that both its themes are readable.
_STYLE: Final = (
    "<style>.h5traces{font-size:.9em;line-height:1.4}"
    ".h5traces table{border-collapse:collapse;margin:.3em 0 .3em 1em}"
    ".h5traces td,.h5traces th{text-align:left;vertical-align:top;padding:.1em .8em .1em 0;"
    "white-space:pre-wrap;overflow-wrap:anywhere}"
    ".h5traces summary{cursor:pointer}.h5traces .note{opacity:.7}"
    ".h5traces bdi{unicode-bidi:isolate}</style>"
)


def shortened(value: object) -> str:
    """The text of a value, escaped, and cut where it is long."""
    whole = value if isinstance(value, str) else str(value)
    cut = whole if len(whole) <= _LONGEST_TEXT else f"{whole[:_LONGEST_TEXT]}…"
    # Control characters would be dropped or obeyed; lone surrogates cannot be sent.
    plain = "".join(each if each in "\n\t" or each.isprintable() else "�" for each in cut)
    return f"<bdi>{escape(plain)}</bdi>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], more: int = 0) -> str:
    """A table of values; `more` rows are said to follow."""
    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{shortened(each)}</td>' for each in row)}</tr>" for row in rows
    )
    after = f'<div class="note">and {more} more</div>' if more else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}"


def section(summary: str, body: str, *, is_open: bool = False) -> str:
    """A part that can be folded; `summary` is text, `body` HTML."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(summary)}</summary>{body}</details>"


def named(values: Mapping[str, object]) -> str:
    """A table of names and values, without those that are absent or empty."""
    kept = {key: each for key, each in values.items() if each not in (None, "", (), [], {})}
    return table(("", ""), kept.items())


def page(title: str, *parts: str) -> str:
    """A whole object; `title` is text, parts are HTML."""
    return f'{_STYLE}<div class="h5traces"><strong>{escape(title)}</strong>{"".join(parts)}</div>'


class Report:
    """Base of what commands report: JSON-ready values, and a table in a notebook."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, with ``ok`` where it can fail."""
        verdict = {"ok": self.ok} if hasattr(self, "ok") else {}
        return {**verdict, **asdict(self)}  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        return page(type(self).__name__, report_body(self))


def report_body(report: Any) -> str:
    """The fields of a dataclass; lists of dataclasses become further tables."""
    plain: dict[str, object] = {}
    parts: list[str] = []
    for field in fields(report):
        value = getattr(report, field.name)
        if isinstance(value, (list, tuple)) and value and is_dataclass(value[0]):
            header = [each.name for each in fields(value[0])]
            rows = [[getattr(row, name) for name in header] for row in value[:_MOST_ROWS]]
            body = table(header, rows, more=max(0, len(value) - _MOST_ROWS))
            parts.append(section(f"{field.name} ({len(value)})", body, is_open=True))
        elif isinstance(value, (list, tuple)) and len(value) > 1:
            rows = [[each] for each in value[:_MOST_ROWS]]
            body = table(("",), rows, more=max(0, len(value) - _MOST_ROWS))
            parts.append(section(f"{field.name} ({len(value)})", body))
        else:
            plain[field.name] = value[0] if isinstance(value, (list, tuple)) and value else value
    return named(plain) + "".join(parts)


def reports_page(title: str, reports: Sequence[Any]) -> str:
    """A list of reports, each one to unfold."""
    parts = [
        section(f"{getattr(each, 'path', number)}", report_body(each), is_open=len(reports) == 1)
        for number, each in enumerate(reports[:_MOST_ROWS])
    ]
    more = len(reports) - len(parts)
    return page(title, *parts, f'<div class="note">and {more} more</div>' if more else "")
