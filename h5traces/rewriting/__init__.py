"""Converts legacy batches to archives: plans the targets, streams the samples, reports."""
