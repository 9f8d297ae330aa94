#!/usr/bin/env python3
"""Write the register of checks, h5traces/meaning/checks.py, into docs/checks.md.

python tools/gen_checks.py           # after a change of the register
python tools/gen_checks.py --check   # what CI runs: exit 1 and a diff if the page is stale
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.meaning.checks import CHECKS, SEVERITIES

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "checks.md"
_MARKED: Final = re.compile(
    r"(<!-- generated: Checks -->\n)(.*?)(<!-- end: Checks -->\n)", re.DOTALL
)


def sections() -> str:
    """A section for every check, the gravest first."""
    parts = []
    for severity in SEVERITIES:
        for each in CHECKS.values():
            if each.severity == severity:
                only = " Only where traces are read from files or dicts." if each.of_reading else ""
                parts.append(
                    f"\n### {each.id}\n\n*{severity.capitalize()}.*{only} {each.reason}\n\n"
                    f"What to do: {each.remedy}\n"
                )
    return "".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; print a diff")
    options = parser.parse_args(arguments)
    present = PAGE.read_text(encoding="utf-8")
    wanted, number = _MARKED.subn(lambda found: f"{found[1]}{sections()}{found[3]}", present)
    if number != 1:
        parser.error(f"{PAGE} has no place between generated: Checks and end: Checks")
    if options.check and present != wanted:
        lines = difflib.unified_diff(
            present.splitlines(keepends=True), wanted.splitlines(keepends=True), "on disk", "wanted"
        )
        sys.stdout.writelines(lines)
        print("docs/checks.md is out of date; run python tools/gen_checks.py", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
