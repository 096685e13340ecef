"""The first section: which runs are missing, have failed or are not finished, why, and the command that takes them further."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jobs.failures import without_particulars
from jobs.report.document.content import Block, Problem, Section, Text
from jobs.report.logs import Failure, failure_of
from jobs.report.status import MATTERS
from jobs.report.waiting import advice
from jobs.state import LIVE, RETRYABLE, RunState, fails_alike

LINES = 12  # of a log without a traceback
TOLD = 60  # of a traceback: its end


def section(
    states: Sequence[RunState],
    root: Path,
    suffix: Callable[[str], str],
    damaged: Sequence[str],
    *,
    changed: str,
    is_search: bool,
    given_up: Collection[str] = (),
) -> Section:
    """What is not done.

    Args:
        states: Of all runs.
        root: Folder of runs/ and sweeps/.
        suffix: What follows `vitpa sweep VERB`, for a verb, to mean this sweep.
        damaged: Lines about finished runs whose curves have gaps.
        changed: How the sweep's file differs from the submitted sweep, which the report is of; empty: not at all.
        is_search: Trials that pause are pruned on purpose, and no problem.
        given_up: Signatures of the runs of trials that a search has given up: nothing is to be done about them.
    """
    open_ones = [state for state in states if state.state != "done" and not (is_search and state.state == "paused")]
    blocks: list[Block] = []
    if changed:
        blocks.append(Text([f"CHANGED: {changed}; this is the sweep as it was submitted."], strong=True))
    if not open_ones:
        blocks.append(Text([f"Nothing is missing and nothing has failed: all {len(states)} runs are done."]))
    groups: dict[tuple[int, bool, str, str], list[tuple[RunState, Failure | None]]] = {}
    for state in open_ones:
        failure = failure_of(state, LINES)
        alike = failure.alike if failure else without_particulars(state.reason)
        cause = failure.cause.name if failure else ""
        out = state.run.signature in given_up
        groups.setdefault((MATTERS.index(state.state), out, cause, alike), []).append((state, failure))
    others = [state for state in states if state.run.signature not in given_up]
    for (_, out, _, _), members in sorted(groups.items(), key=lambda group: group[0]):
        command = "" if out else _command([state for state, _ in members], others, root, suffix)
        blocks.append(_problem(members, command))
    if damaged:
        blocks.append(Text(["The curves of these runs have gaps; their results were checked, and count:", *damaged]))
    return Section("problems", "What is missing or failed", blocks, [f"vitpa sweep status {suffix('status')}"])


def _problem(members: Sequence[tuple[RunState, Failure | None]], command: str) -> Problem:
    first, failure = members[0]
    reason = first.reason
    if first.state == "pending" and advice(first.job):
        reason = "; ".join(filter(None, [reason, advice(first.job)]))
    return Problem(
        state=first.state,
        runs=[state.run.label for state, _ in members],
        reason=reason or {"missing": "never started"}.get(first.state, ""),
        cause=f"{failure.cause.name}; to fix it: {failure.cause.advice}" if failure else "",
        told=failure.told[-TOLD:] if failure else [],
        log=str(failure.log) if failure else "",
        command=command,
    )


def _command(chosen: Sequence[RunState], states: Sequence[RunState], root: Path, suffix: Callable[[str], str]) -> str:
    """What takes these runs further, with filters that leave out others in the same state."""
    state = chosen[0].state
    if state in LIVE:
        return f"vitpa sweep status {suffix('status')} --watch"
    verb = "retry" if state in RETRYABLE or chosen[0].ended_early else "submit"
    force = " --force" if verb == "retry" and any(fails_alike(each, root) for each in chosen) else ""
    return " ".join(["vitpa sweep", verb, suffix(verb), *_filters(chosen, states)]) + force


def _filters(chosen: Sequence[RunState], states: Sequence[RunState]) -> list[str]:
    """state=, and the values of `chosen` on each axis on which others in their state have different ones, too."""
    alike = [state for state in states if state.state == chosen[0].state]
    said = [f"state={chosen[0].state}"]
    if len(alike) == len(chosen):
        return said

    def position(state: RunState) -> dict[str, str]:
        run = state.run
        return {"dataset": run.dataset, "attention": run.attention, **run.settings, "seed": str(run.seed)}

    for key in position(chosen[0]):
        values = list(dict.fromkeys(position(state)[key] for state in chosen))
        if {position(state)[key] for state in alike} != set(values):
            said.append(shlex.quote(f"{key}={','.join(values)}"))
    return said
