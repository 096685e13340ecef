"""Where a search stands: what its runs have reached, and what they have taken, by their own records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.failures import cause_of
from jobs.search.ledger import Ledger, Round, Trial
from jobs.search.plan import SearchPlan
from jobs.state import LIVE, RETRYABLE, RunState
from jobs.sweep import TRIAL, Run, Sweep, with_newest_rounds
from vitpa.metrics_file import read_metrics
from vitpa.records import RunError

NOT_FINITE = "not finite"  # a failure that is the setting's own


def trial_number(run: Run) -> int:
    """The trial of a run of a search."""
    return int(dict(run.labels)[TRIAL].removeprefix("t"))


@dataclass(frozen=True)
class Standing:
    """A search at one moment.

    Attributes:
        plan: Its settings.
        ledger: Its rounds so far.
        scores: Accuracies of the runs of those trials of the last round that are all there, by the trial's number.
        failed: Those of which a run has failed, was cancelled or is broken: the reason.
        hopeless: Those of them whose failure is their own setting's: it would fail again.
        waiting: Runs of the other trials of the last round that are not where they have to come to.
        gpu_hours: That the runs of each trial have taken, by its number, as far as they have paused or finished.
    """

    plan: SearchPlan
    ledger: Ledger
    scores: dict[int, list[float]]
    failed: dict[int, str]
    hopeless: dict[int, str]
    waiting: list[RunState]
    gpu_hours: dict[int, float]

    @staticmethod
    def of(sweep: Sweep, states: Sequence[RunState], root: Path) -> Standing:
        """That of a search with these states of all its runs."""
        assert sweep.search is not None and sweep.ledger is not None
        of_trial: dict[int, list[RunState]] = {}
        for state in states:
            of_trial.setdefault(trial_number(state.run), []).append(state)
        gpu_hours = {number: math.fsum(_gpu_hours(state, root) for state in its) for number, its in of_trial.items()}
        standing = Standing(sweep.search, sweep.ledger, {}, {}, {}, [], gpu_hours)
        for trial in sweep.ledger.trials:
            if trial.in_training and trial.number in of_trial:
                standing._add(trial.number, of_trial[trial.number], root)
        return standing

    @staticmethod
    def now(sweep: Sweep, look: Callable[[list[Run]], list[RunState]], root: Path) -> Standing | None:
        """That of a search by its ledger as it is now, to which another launcher may have added rounds; None of another sweep.

        Args:
            sweep: As it was loaded.
            look: Gives the states of runs.
            root: Of the sweep's folders.

        Raises:
            SweepError, RunError: the ledger, or a record of a run, cannot be used.
        """
        if sweep.ledger is None:
            return None
        sweep = with_newest_rounds(sweep)
        return Standing.of(sweep, look(sweep.runs), root)

    def _add(self, number: int, states: Sequence[RunState], root: Path) -> None:
        """Take in a trial of the last round, with the states of its runs."""
        reached = [accuracy_at(state, root) for state in states]
        bad = [state for state in states if state.state in RETRYABLE and not state.ended_early]
        scores = [each for each in reached if each is not None]
        if len(scores) == len(states):
            self.scores[number] = scores
        elif bad:
            self.failed[number] = f"{bad[0].run.label} {bad[0].state}: {bad[0].reason}"
            not_finite = [state for state in bad if state.state == "failed" and cause_of(state.reason, "").name == NOT_FINITE]
            self.hopeless.update({number: self.failed[number]} if not_finite else {})
        else:
            self.waiting.extend(state for state, value in zip(states, reached, strict=True) if value is None)

    def next_round(self, given_up: Mapping[int, str]) -> Round:
        """The round after the last one, when that is over.

        Raises:
            SweepError: as for `SearchPlan.next_round`.
        """
        return self.plan.next_round(self.ledger, self.scores, given_up, math.fsum(self.gpu_hours.values()))

    @property
    def trials(self) -> list[Trial]:
        """All trials, with the scores that are not in the ledger yet."""
        trials = self.ledger.trials
        for number, found in self.scores.items():
            trials[number].scores[trials[number].epochs] = found
        return trials

    @property
    def best(self) -> Trial | None:
        """The first of `ranked`; None if there is none."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[Trial]:
        """Trials with a score that are not given up: those that have come farthest first, the best of them first."""

        def order(trial: Trial) -> tuple[int, float, int]:
            return -max(trial.scores), -trial.score(max(trial.scores)), trial.number

        return sorted((trial for trial in self.trials if trial.scores and not trial.out), key=order)


def accuracy_at(state: RunState, root: Path) -> float | None:
    """Top-1 accuracy of a run, a fraction, at the epoch that it is to come to now; None if it has not come there.

    Raises:
        RunError: the record of its pause, or of its metrics, cannot be read.
    """
    epoch = state.run.stop_after_epoch
    if state.state in LIVE:
        return None
    if state.result is not None and epoch is None:
        return state.result.top1
    directory = state.run.directory(root)
    pause = directory.paused()
    if epoch is None or (state.result is None and (pause is None or pause.epoch < epoch)):
        return None
    try:
        rows = read_metrics(directory.metrics_jsonl)
    except OSError as error:
        raise RunError(f"{directory.metrics_jsonl}: cannot be read ({error.strerror})") from error
    top1 = state.run.config.top1_metric
    found = next((row[top1] for row in rows if top1 in row and row.get("epoch", 0) > epoch - 1e-6), None)
    if found is None:
        raise RunError(f"{directory.metrics_jsonl}: has no evaluation after epoch {epoch}; delete the run's folder and submit")
    return float(found)


def _gpu_hours(state: RunState, root: Path) -> float:
    if state.result is not None:
        return state.result.gpu_hours
    if state.attempt is None:
        return 0.0
    pause = state.run.directory(root).paused()
    return pause.gpu_hours if pause is not None else 0.0
