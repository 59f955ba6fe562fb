"""Results of tests as they come, one a line, in the file that ``$MEGATRON_MOD_GPU_RESULTS`` names:
what was found is there even if the tests do not come to an end."""

from __future__ import annotations

import json
import os

import pytest

from megatron_mod import parallel  # noqa: F401  (before any test file imports Megatron)

_results = os.environ.get("MEGATRON_MOD_GPU_RESULTS")


def pytest_configure(config: pytest.Config) -> None:
    if _results and not hasattr(config, "workerinput"):  # xdist's workers report to the first
        config.pluginmanager.register(_Results(), "results")


class _Results:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        record = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome != "passed":
            record["why"] = str(report.longrepr)[-2000:]
        with open(_results, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
