"""``h5traces view``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from h5traces.cli.command import command
from h5traces.cli.console import note, print_line
from h5traces.cli.options import Archives, option
from h5traces.format.text import counted

if TYPE_CHECKING:
    from h5traces.view.server import Page


@command()
def view(
    sources: Archives,
    *,
    port: Annotated[
        int, option(None, "--port N", "Of 127.0.0.1 [default: a free one].", min=0, max=65535)
    ] = 0,
    browser: Annotated[bool, option(None, "--browser/--no-browser", "Open the browser.")] = True,
    labels: Annotated[
        str | None,
        option(None, "--labels DIR", "Labels lie there instead of beside the archives."),
    ] = None,
    scores: Annotated[
        str | None,
        option(
            None,
            "--scores FILE",
            "Show the numbers of a features file (.h5, .npz) for layers and tokens.",
        ),
    ] = None,
    export: Annotated[
        str | None,
        option(
            None,
            "--export DIR",
            "Instead, write the page and the archives into a new folder, for a web server.",
        ),
    ] = None,
) -> None:
    """Look at archives in the browser.

    It shows samples, their tokens, heat maps of layers, attention and comparisons. The page is
    served to this machine only, at an address that nobody can guess, until Ctrl-C. Nothing is
    uploaded, and no model runs. On another machine, forward the port:
    `ssh -L 8000:127.0.0.1:8000 host h5traces view archives/ --no-browser --port 8000`.

    - `h5traces view archives/`
    - `h5traces view exact.h5 compact.h5` to compare two archives
    - `h5traces view s3://bucket/run/*.h5`
    - `h5traces view run.h5 --export page/` for nginx, Apache, S3 or GitHub Pages
    """
    # Here, so that help needs no extra, and a missing one is an error as any other.
    from h5traces.view import export_page, serve

    if export is not None:
        written = export_page(sources, export, labels=labels, scores=scores)
        print_line(f"{export}: {counted(len(written), 'file')} for any web server with byte ranges")
        return

    def started(page: Page) -> None:
        print_line(page.url)
        if not page.has_browser:
            note("there is no browser with a display here; open the address yourself")
        note(f"showing {counted(page.num_archives, 'archive')}; Ctrl-C ends it")

    serve(sources, port=port, browser=browser, labels=labels, scores=scores, started=started)
