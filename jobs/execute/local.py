"""What a job on this machine does: works through the groups of claimed runs of its submission, one at a time.

It takes the runs of a group by creating their start.json, trains them (attempt.py), and records how each ended. That
a group of several goes to one worker as a whole is settled before, by the exclusive creation of its taken-N.json. A worker
never outlives its use: it ends when each claim of its submission has been started by one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jobs.execute.attempt import Member, Outcome, Request, Signals, Training
from jobs.execute.slots import Slot, take_slot
from jobs.notify.outbox import tell_of_ended
from jobs.records import Claim, Intent, WantedRun
from vitpa.records import ProcessId, RunError, create_exclusive, read_record, to_json, utc_now
from vitpa.room import wait_for_room
from vitpa.rundir import RunDir


class LocalIntent(Intent):
    """Of a submission to this machine."""

    slots: list[Slot]
    train_command: list[str]


def work(root: str, submission: str) -> None:
    """Work through the claims of `submission` (a path below `root`)."""
    signals = Signals()
    signals.listen()
    intent = LocalIntent.of(Path(root) / submission)

    def useful() -> bool:
        return not signals.received and any(True for _ in waiting_groups(Path(root), intent))

    def request() -> Request | None:
        return Request(f"signal {signals.received[0]}") if signals.received else None

    slot = take_slot(Path(root), intent.slots, useful)
    if slot is None:
        return
    for task, group in waiting_groups(Path(root), intent):
        wait_for_room(Path(root), stop=lambda: bool(signals.received))
        if signals.received:
            return
        taken = Path(root) / submission / f"taken-{task}.json"
        if len(intent.groups[task]) > 1 and not create_exclusive(taken, to_json({"utc": utc_now()})):
            continue
        start = {
            "process": ProcessId.mine().model_dump(),
            "host": os.uname().nodename,
            "slot": slot.units,
            "gpus": slot.gpus,
            "started_utc": utc_now(),
        }
        ours = [member for member in group if create_exclusive(member.attempt.start_json, to_json(start))]
        if ours:
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}
            training = Training(ours, intent.train_command, environment)
            for member, ended in training.supervise(request):
                _record(training, member, ended)
            sweep = Path(submission).parent.parent.name
            for line in tell_of_ended(Path(root), sweep, [member.run.signature for member in ours]):
                print(line)


def _record(training: Training, member: Member, ended: Outcome) -> None:
    """Write exit.json. Without it, on a full disk, the run counts as lost, and the other runs are trained as well."""
    try:
        training.record(member, ended)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; the attempt ended as {ended.state} ({ended.reason})", flush=True)


def waiting_groups(root: Path, intent: Intent) -> Iterator[tuple[int, list[Member]]]:
    """The tasks of a submission with their runs, as far as nobody has started or withdrawn the claims; none is empty."""
    for task, indices in enumerate(intent.groups):
        group = [member for index in indices if (member := _waiting(root, intent.runs[index], intent.token)) is not None]
        if group:
            yield task, group


def _waiting(root: Path, wanted: WantedRun, token: str) -> Member | None:
    run = RunDir(root, wanted.signature)
    attempt = run.attempt(wanted.attempt or 1)
    if attempt.start_json.exists():
        return None
    try:
        claim = read_record(Claim, attempt.claim_json)
    except RunError:
        return None  # `status` shows it as broken; the others go on
    return Member(run, attempt) if claim and claim.token == token else None
