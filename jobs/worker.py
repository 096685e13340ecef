"""What a job on this machine does: works through the claimed runs of its submission, one at a time.

It takes a run by creating its start.json, trains it (jobs/training.py), and records how it ended. It never outlives its
use: it ends when every claim of its submission has been started by somebody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.slots import Slot, take_slot
from jobs.training import Request, Signals, Training
from vitpa.config import AttemptDir, ProcessId, RunDir, RunError, create_exclusive, read_json, to_json, utc_now


def work(root: str, submission: str) -> None:
    """Work through the claims of `submission` (a path below `root`)."""
    signals = Signals()
    signals.listen()
    intent = read_json(Path(root) / submission / "intent.json")
    assert intent is not None, "a job is started only after the intent is written"
    slots = [Slot.model_validate(slot) for slot in intent["slots"]]

    def useful() -> bool:
        return not signals.received and any(True for _ in waiting_claims(Path(root), intent))

    def request() -> Request | None:
        return Request(f"signal {signals.received[0]}") if signals.received else None

    slot = take_slot(Path(root), slots, useful)
    if slot is None:
        return
    for run, attempt, claim in waiting_claims(Path(root), intent):
        if signals.received:
            return
        start = {
            "process": ProcessId.mine().model_dump(),
            "host": os.uname().nodename,
            "slot": slot.units,
            "gpus": slot.gpus,
            "started_utc": utc_now(),
        }
        if create_exclusive(attempt.start_json, to_json(start)):
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}
            training = Training(run, attempt, claim, intent["train_command"], environment)
            training.record(training.supervise(request))


def waiting_claims(root: Path, intent: dict[str, Any]) -> Iterator[tuple[RunDir, AttemptDir, dict[str, Any]]]:
    """The claims of a submission that nobody has started or withdrawn, in order."""
    for entry in intent["runs"]:
        run = RunDir(root, entry["signature"])
        attempt = AttemptDir(run.attempts_dir / f"{entry['attempt']:04d}")
        if attempt.start_json.exists():
            continue
        try:
            claim = read_json(attempt.claim_json)
        except RunError:
            continue  # `status` shows it as broken; the others go on
        if claim is not None and claim.get("token") == intent["token"] and isinstance(claim.get("runtime"), dict):
            yield run, attempt, claim
