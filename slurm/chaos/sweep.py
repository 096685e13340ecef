"""A sweep as its user sees it: the commands of `vitpa sweep`, what they print, and the files below its root."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitpa.child_process import child_environment, run_program
from vitpa.documents import DocumentError, parse_json
from vitpa.errors import UserError

NAME = "chaos"


class ChaosError(UserError):
    """Why a sweep cannot be put to the test."""


@dataclass(frozen=True)
class Sweep:
    """A sweep below `root`, submitted with `profile`.

    Attributes:
        words: SWEEP and KEY=VALUE, as on the command line of `vitpa sweep submit`.
        cluster: Environment variables for SLURM's clients, or none.
    """

    words: Sequence[str]
    root: Path
    profile: Path
    data_dir: Path | None = None
    cluster: Mapping[str, str] = field(default_factory=dict)

    def command(self, verb: str, *more: str) -> list[str]:
        """The words of `vitpa sweep VERB`; before the first submission the sweep is made of `words`, then it has its name."""
        made = (self.root / "sweeps" / NAME / "sweep.yaml").exists()
        which = [NAME] if made else [*self.words, "--name", NAME]
        where = ["--root", str(self.root)]
        if verb in ("plan", "submit") and not made:
            where += ["--profile", str(self.profile), *(["--data-dir", str(self.data_dir)] if self.data_dir else [])]
        return [sys.executable, "-m", "vitpa.cli", "sweep", verb, *which, *where, *more]

    @property
    def environment(self) -> dict[str, str]:
        """For its commands."""
        return child_environment() | dict(self.cluster)

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        """`vitpa sweep VERB` to its end."""
        return run_program(self.command(verb, *more), env=self.environment)

    def rows(self, verb: str = "status") -> list[dict[str, Any]]:
        """A row for each run, as `status --json` or `plan --json` has it.

        Raises:
            ChaosError: the command fails: with its own words.
        """
        answer = self.run(verb, "--json")
        try:
            return list(parse_json(answer.stdout)["runs"])
        except (DocumentError, KeyError, TypeError):
            raise ChaosError(_last_words(answer)) from None

    def submit(self, *more: str) -> None:
        """`vitpa sweep submit` for the first time.

        Raises:
            ChaosError: it has started nothing: with its own words.
        """
        answer = self.run("submit", *more)
        if "submitted" not in answer.stdout:
            raise ChaosError(_last_words(answer))

    def submissions(self) -> list[str]:
        """The folders of its submissions, as claims name them, oldest first."""
        return [str(path.relative_to(self.root)) for path in sorted(self.root.glob(f"sweeps/{NAME}/submissions/*"))]

    def folder(self, signature: str) -> Path:
        """Where a run is."""
        return self.root / "runs" / signature


def _last_words(answer: subprocess.CompletedProcess[str]) -> str:
    said = (answer.stderr.strip() or answer.stdout.strip() or "`vitpa sweep` says nothing").splitlines()[-1]
    return said.removeprefix("vitpa sweep: ")


def document(path: Path) -> dict[str, Any]:
    """A record of a run; empty if it is not there, or not whole."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, DocumentError):
        return {}
    return found if isinstance(found, dict) else {}
