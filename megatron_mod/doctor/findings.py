"""What a user should know, and do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What keeps trainings from running, and what does not; each with its remedy."""

    problems: list[dict[str, str]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append({"what": what, "remedy": remedy})

    def warn(self, what: str, remedy: str) -> None:
        self.warnings.append({"what": what, "remedy": remedy})
