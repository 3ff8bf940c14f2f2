"""Prints the table of goldens (system, case, outputs compared, largest difference) at the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = sorted(v for r in reports for k, v in getattr(r, "user_properties", []) if k == "parity")
    if rows:
        terminalreporter.section("parity with the authors' code")
        for system, case, outputs, worst in rows:
            terminalreporter.write_line(f"{system:26} {case:34} {outputs:3} outputs   {worst:.1e}")
