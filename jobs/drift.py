"""How a sweep differs from what was recorded at its last submission."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.sweep import Run, Sweep


@dataclass(frozen=True)
class Drift:
    """How a sweep's file differs from what was recorded at its last submission."""

    added: list[str]  # labels
    gone: list[str]  # labels of recorded runs that are no longer in the sweep, at least not with this configuration
    renamed: list[str] = field(default_factory=list)  # both labels of runs that are called otherwise: settings swapped, say

    @staticmethod
    def between(sweep: Sweep, recorded: list[Run] | None) -> Drift:
        """What came and what went since `recorded`."""
        if recorded is None:
            return Drift([], [])
        now = {run.signature: run.label for run in sweep.runs}
        before = {run.signature: run.label for run in recorded}
        return Drift(
            [run.label for run in sweep.runs if run.signature not in before],
            [run.label for run in recorded if run.signature not in now],
            [f"{was} -> {now[run]}" for run, was in before.items() if now.get(run, was) != was],
        )

    def describe(self) -> str:
        """One line for people; empty if nothing changed."""
        parts = []
        if self.added:
            parts.append(f"{len(self.added)} new ({_some(self.added)})")
        if self.gone:
            parts.append(f"{len(self.gone)} no longer in it as configured before ({_some(self.gone)}; results are kept)")
        if self.renamed:
            parts.append(f"{len(self.renamed)} called otherwise ({_some(self.renamed)})")
        return "since the last submission the sweep has changed: " + ", ".join(parts) if parts else ""


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (" ..." if len(labels) > 3 else "")
