"""Labels: joins a table of scores to archives, beside them or in a rewritten one."""

from h5traces.labelling.joining import LabelReport, ScoreStats, label

__all__ = ["LabelReport", "ScoreStats", "label"]
