#!/usr/bin/env python3
"""Measure h5traces beside the ways that traces are stored otherwise, and write a report.

    python benchmarks/run.py                  # everything, 12 minutes; updates benchmarks/
    python benchmarks/run.py --scale small    # a look, about a minute; writes benchmarks/out/

Large samples are synthetic, of Llama-2-7B's shape: they are not measurements of Llama-2 itself.
"""

from suite.main import main

if __name__ == "__main__":
    main()
