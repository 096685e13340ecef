"""The messages of a sweep, in `<sweep>/messages`: what is to be told, and what has been.

    notify.json                what is sent where, of the profile of the last submission
    KEY.json                   a message: whoever sees the event first creates it
    KEY.CHANNEL.sending-1      who is sending it now; a dead sender is followed by sending-2: all of them exclusive creations
    KEY.CHANNEL.sent           it has been taken

What could not be sent stays, and is tried again by the next job that ends and the next command that looks. Two send nothing
twice, unless one is killed between the receiver's answer and the next line.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.errors import SweepError
from jobs.notify.channels import NotSentError, channels, send
from jobs.notify.config import Notify
from jobs.notify.events import Event, complete_cells, events_of
from jobs.state import RunState
from jobs.sweep import Run, SweepDir
from vitpa.config_file import parse_model
from vitpa.errors import UserError
from vitpa.records import (
    Holder,
    ProcessId,
    RunError,
    create_exclusive,
    make_folders,
    read_json,
    read_record,
    to_json,
    utc_now,
    write_json,
)

LOGGER = logging.getLogger(__name__)
PAUSE_S = 20.0  # between a try that failed and the next by the same command
SENDING_S = 300.0  # longer than any sender takes; by the clock of the file system


def configure(root: Path, sweep: str, notify: Notify | None, states: Sequence[RunState]) -> None:
    """Take over a profile's `notify`; what had happened before messages were wanted is not told."""
    folder = SweepDir(root, sweep).messages
    settings = folder / "notify.json"
    if notify is None or not channels(notify):
        settings.unlink(missing_ok=True)
        return
    before = _settings(SweepDir(root, sweep))
    if new := set(channels(notify)) - set(channels(before) if before else []):
        make_folders(folder)
        past = [event.key for event in [*events_of(sweep, states, root), *complete_cells(sweep, states)]]
        for key in {*past, *(path.stem for path in folder.glob("*-*.json"))}:
            for channel in new:
                create_exclusive(folder / f"{key}.{channel}.sent", "")
    write_json(settings, notify.model_dump(mode="json"))


def tell(root: Path, sweep: str, states: Sequence[RunState], *, whole: bool) -> list[str]:
    """Note what is new about these runs, and send what is not sent yet; a line for each channel that does not take it.

    Cells are looked at if the runs are the `whole` sweep. Whatever goes wrong is such a line: no command fails for a message.
    """
    directory = SweepDir(root, sweep)
    try:
        notify = _settings(directory)
        if notify is None:
            return []
        found = events_of(sweep, states, root) + (complete_cells(sweep, states) if whole else [])
        _note(directory.messages, [event for event in found if event.kind in notify.events], notify)
        return _deliver(directory.messages, notify)
    except (UserError, OSError) as error:
        return [f"messages: {error}"]


class Teller:
    """Tells about a sweep at each look of a command; where a receiver is down it is left in peace for a while."""

    def __init__(self, root: Path, sweep: str, runs: Iterable[Run]) -> None:
        """`runs` are all of the sweep's."""
        self._root, self._sweep, self._all = root, sweep, {run.signature for run in runs}
        self._not_before_s = 0.0

    def __call__(self, states: Sequence[RunState]) -> list[str]:
        """As `tell`."""
        if time.monotonic() < self._not_before_s:
            return []
        whole = self._all <= {state.run.signature for state in states}
        problems = tell(self._root, self._sweep, states, whole=whole)
        if problems:
            self._not_before_s = time.monotonic() + PAUSE_S
        return problems


def tell_of_ended(root: Path, sweep: str, signatures: Iterable[str]) -> list[str]:
    """The same by the job that has trained these runs, for itself and without a question to SLURM."""
    directory = SweepDir(root, sweep)
    try:
        if _settings(directory) is None:
            return []
        ours, runs = set(signatures), directory.recorded() or []
        cells = {run.cell for run in runs if run.signature in ours}
        states = [_ended(run, root, run.signature in ours) for run in runs if run.cell in cells]
    except (UserError, OSError) as error:
        return [f"messages: {error}"]
    return tell(root, sweep, states, whole=True)


def _ended(run: Run, root: Path, is_ours: bool) -> RunState:
    """The state of a run whose job is over (`is_ours`), by its own records; of another, whether it is done."""
    directory = run.directory(root)
    try:
        if (result := directory.result()) is not None:
            return RunState(run, "done", result=result)
        last = directory.attempts()[-1:] if is_ours else []
        ended = (read_json(last[0].exit_json) if last else None) or {}
    except RunError:
        return RunState(run, "broken")
    if ended.get("requeued") or not last:
        return RunState(run, "running")
    return RunState(run, str(ended.get("state")), str(ended.get("reason") or ""), last[0])


def _settings(directory: SweepDir) -> Notify | None:
    path = directory.messages / "notify.json"
    document = read_json(path)
    return None if document is None else parse_model(Notify, document, str(path))


def _note(folder: Path, events: Sequence[Event], notify: Notify) -> None:
    """Create the messages that nobody has created or sent before."""
    there = {path.name for path in folder.iterdir()}
    for event in events:
        names = {f"{event.key}.json", *(f"{event.key}.{channel}.sent" for channel in channels(notify))}
        if there.isdisjoint(names):
            document = {"kind": event.kind, "text": f"vitpa {event.text}", "utc": utc_now()}
            create_exclusive(folder / f"{event.key}.json", to_json(document))


def _deliver(folder: Path, notify: Notify) -> list[str]:
    """Send what is not sent; a channel that does not take a message gets no other in this look."""
    there = {path.name for path in folder.iterdir()}
    problems = []
    for channel in channels(notify):
        waiting = [
            name.removesuffix(".json")
            for name in sorted(there)
            if name.endswith(".json") and name != "notify.json" and f"{name.removesuffix('.json')}.{channel}.sent" not in there
        ]
        for number, key in enumerate(waiting):
            try:
                _send_once(folder, key, channel, notify)
            except NotSentError as why:
                left = len(waiting) - number
                problems.append(f"messages that wait for the {channel}: {left} ({why}); they are tried again later")
                break
    return problems


def _send_once(folder: Path, key: str, channel: str, notify: Notify) -> None:
    sent = folder / f"{key}.{channel}.sent"
    claim = _claim(folder, f"{key}.{channel}.sending-")
    if claim is None:
        return
    try:
        message = read_json(folder / f"{key}.json")
        if not sent.exists() and message is not None:
            send(notify, channel, str(message.get("text")))
            create_exclusive(sent, to_json({"utc": utc_now()}))
    finally:
        claim.unlink(missing_ok=True)


def _claim(folder: Path, stem: str) -> Path | None:
    """Make the sending mine; None if another process has it."""
    numbers = sorted(int(path.name.removeprefix(stem)) for path in folder.glob(f"{stem}*"))
    if numbers and not _is_over(folder / f"{stem}{numbers[-1]}"):
        return None
    claim = folder / f"{stem}{numbers[-1] + 1 if numbers else 1}"
    mine = {"process": ProcessId.mine().model_dump(), "utc": utc_now()}
    return claim if create_exclusive(claim, to_json(mine)) else None


def _is_over(claim: Path) -> bool:
    """Whether its sender is dead, or, of another host, has it for longer than anybody takes."""
    try:
        holder = read_record(Holder, claim)
        if holder is None:  # just sent, or given back
            return False
        if (alive := holder.process.alive()) is not None:
            return not alive
        now = claim.with_name(f".now-{secrets.token_hex(4)}")
        now.touch()  # the file system's clock, for both
        try:
            return now.stat().st_mtime - claim.stat().st_mtime > SENDING_S
        finally:
            now.unlink()
    except (OSError, RunError, SweepError):
        return False
