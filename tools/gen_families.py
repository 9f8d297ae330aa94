#!/usr/bin/env python3
"""Tries every family of models that the tests know, and writes the table of docs/families.md.

Each is a tiny model with random weights. ``--check`` compares the table with what is measured now,
and changes nothing. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "extract")]

from family_table import lines_of_table  # noqa: E402  needs the path

PAGE = ROOT / "docs" / "families.md"
START, END = "<!-- generated: families -->\n", "<!-- end: families -->\n"


def main() -> int:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    wanted = before + START + "\n".join(lines_of_table()) + "\n" + END + rest.partition(END)[2]
    if not arguments.check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(*(each.splitlines(keepends=True) for each in (text, wanted)))
    )
    return int(text != wanted)


if __name__ == "__main__":
    sys.exit(main())
