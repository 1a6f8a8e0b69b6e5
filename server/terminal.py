"""Moved to common/terminal.py, where a hospital's commands find it too."""

from cohortium.common.terminal import emit, err, failures, out, report

__all__ = ["emit", "err", "failures", "out", "report"]
