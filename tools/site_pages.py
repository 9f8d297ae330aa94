"""A hook of mkdocs: documents outside of docs/ become pages, links fit, and llms.txt lists them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.structure.nav import Navigation
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
# Document in the repository: page of the site. Those in docs/ keep their names.
OUTSIDE: Final = {
    "README.md": "index.md",
    **{
        path: path
        for path in (
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "SECURITY.md",
            "schema/README.md",
            "schema/SPEC.md",
            "schema/RATIONALE.md",
            "schema/VERSIONING.md",
            "schema/CHANGELOG.md",
        )
    },
}
# What each page begins with, by its name; filled while the site is built.
_ABOUT: Final[dict[str, str]] = {}
_SECTIONS: Final[list[tuple[str, list[Page]]]] = []
LINK: Final = re.compile(r"\[([^]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the documents outside of docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages.

    A link to a file that is not a page becomes its text; one to no file at all is an error.
    """
    here = page.file.src_uri
    document = next((path for path, uri in OUTSIDE.items() if uri == here), f"docs/{here}")

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = os.path.normpath(PurePosixPath(document).parent / target)
        if not (ROOT / path).exists():
            message = f"{document} links to {target}, which does not exist"
            raise PluginError(message)
        uri = OUTSIDE.get(path, path.removeprefix("docs/"))
        if path not in OUTSIDE and not (
            path.startswith("docs/") and path.endswith((".md", ".png"))
        ):
            return text
        return f"[{text}]({os.path.relpath(uri, PurePosixPath(here).parent)}{anchor})"

    _ABOUT[here] = _first_sentence(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(replaced, part)
        for part in re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    )


def on_nav(nav: Navigation, **_: Any) -> None:
    """Keep the order of pages for llms.txt."""
    _SECTIONS[:] = [(item.title or "", list(_pages(item))) for item in nav.items]


def on_post_build(config: Any) -> None:
    """Write llms.txt: every page, by section, with its first sentence (https://llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {_ABOUT['index.md']}"]
    for title, pages in _SECTIONS:
        lines += ["", f"## {title}", ""]
        lines += [
            f"- [{page.title}]({page.url or '.'}): {_ABOUT[page.file.src_uri]}" for page in pages
        ]
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _pages(item: Any) -> Iterator[Page]:
    if item.is_page:
        yield item
    for child in item.children or ():
        yield from _pages(child)


def _first_sentence(markdown: str) -> str:
    """The first sentence of a page's prose, without its links."""
    without_code = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.search(r"^[A-Z`*].*?(?=\n\n|\Z)", without_code, flags=re.DOTALL | re.MULTILINE)
    text = " ".join(LINK.sub(r"\1", prose[0]).split()) if prose else ""
    return re.split(r"(?<=\.)\s", text)[0]
