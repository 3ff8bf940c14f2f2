"""The report of a run: one HTML file that opens anywhere, with its pictures and plots inside."""

from vitalloy.report.html import write_report

__all__ = ["write_report"]
