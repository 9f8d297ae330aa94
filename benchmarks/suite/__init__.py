"""The benchmarks that ``benchmarks/run.py`` runs."""
