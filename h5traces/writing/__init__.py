"""Writes archives; the writer knows trace records and nothing else."""
