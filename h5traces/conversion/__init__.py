"""Converts legacy batches to archives: plans the targets, streams the samples, reports."""

from h5traces.conversion.converting import convert
from h5traces.conversion.plan import Job, Leftover, plan_jobs
from h5traces.conversion.reports import ConversionReport, FileReport, Progress

__all__ = ["ConversionReport", "FileReport", "Job", "Leftover", "Progress", "convert", "plan_jobs"]
