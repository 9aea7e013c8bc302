"""One self-contained page about a run, or several runs side by side."""

from retort.report.page import build_report

__all__ = ["build_report"]
