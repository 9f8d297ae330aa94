"""What precision tiers cost a model downstream; `benchmarks/precision.py` runs it."""
