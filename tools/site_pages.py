"""A hook of mkdocs: documents outside of docs/ become pages, and links between all of them fit."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
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
LINK: Final = re.compile(r"\[([^]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the documents outside of docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages.

    A link to a file that is no page becomes its text; one to no file at all is an error.
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
        if path not in OUTSIDE and not (path.startswith("docs/") and path.endswith(".md")):
            return text
        return f"[{text}]({os.path.relpath(uri, PurePosixPath(here).parent)}{anchor})"

    return "".join(
        part if part.startswith("```") else LINK.sub(replaced, part)
        for part in re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    )
