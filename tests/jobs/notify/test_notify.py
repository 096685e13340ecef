"""Messages to a real receiver on loopback: each event once, with its cause, whoever looks and whatever is down."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_string, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.notify.config import Email, Notify
from jobs.notify.outbox import SENDING_S, configure, tell
from jobs.state import StateReader
from jobs.sweep import Run, Sweep, SweepDir
from tests.support.cluster import BoundCluster
from tests.support.jobs_sweeps import Field, launch, make_sweep, slurm_profile, write_result
from tests.support.waiting import wait_for
from vitpa.arguments import literal_path
from vitpa.records import ProcessId, write_json

VARIABLE, PATH = "TEST_WEBHOOK", "/services/T000/secret-token"
NOTIFY = Notify(webhook=VARIABLE)
REASONS = {  # of each a cause of its own
    "CUDA out of memory. Tried to allocate 2 GiB": "cuda out of memory",
    "MemoryError": "host out of memory",
    "runtime.stage_dir=/scratch: no such folder": "staging",
    "OSError: [Errno 28] No space left on device": "disk full",
    "the loss became non-finite at step 3": "not finite",
    "data/digits/train.beton: no such file": "missing data",
    "ModuleNotFoundError: No module named 'ffcv'": "import error",
    "CUDA error: uncorrectable ECC error encountered": "node",
    "ncclRemoteError: NCCL error": "nccl",
    "killed by SIGKILL (out of memory?)": "killed by a signal",
    "KeyError: 'pos_embed' <@everyone>": "other",
    "given up: 3 executions in a row without a new checkpoint (max_idle_attempts)": "other",
}


class Receiver(ThreadingHTTPServer):
    """Takes JSON by POST at PATH."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.got: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATH}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if self.path == PATH else 404)
        self.end_headers()
        if self.path == PATH:
            self.server.got.append(document)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    with Receiver(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fail(root: Path, run: Run, reason: str) -> None:
    """An attempt that has failed."""
    number = len(run.directory(root).attempts()) + 1
    me = {"process": ProcessId.mine().model_dump()}
    attempt = run.directory(root).claim_attempt(number, me)
    assert attempt is not None
    write_json(attempt.start_json, me)
    attempt.log.write_text(f"loading\nlast words of {run.label}\n{reason}\n")
    write_json(attempt.exit_json, {"state": "failed", "reason": reason})


def sweep_with_messages(root: Path, seeds: int = 6) -> Sweep:
    """A sweep that was submitted with a webhook before anything happened."""
    sweep = make_sweep(root, seeds=seeds)
    SweepDir(root, sweep.name).record(sweep)
    configure(root, sweep.name, NOTIFY, StateReader(root).states(sweep.runs))
    return sweep


def status(root: Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitpa.cli", "sweep", "status", str(root / "small.yaml"), "--root", str(root)]
    return subprocess.Popen(
        command, env={**os.environ, VARIABLE: url}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_never_written(secret: str, root: Path) -> None:
    assert not [path for path in root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_each_failure_is_told_once_with_its_cause_by_two_watchers_at_once(tmp_path: Path) -> None:
    sweep = sweep_with_messages(tmp_path)
    for run, reason in zip(sweep.runs, REASONS, strict=True):
        fail(tmp_path, run, reason)
    with receiving() as receiver:
        watchers = [status(tmp_path, receiver.url) for _ in range(2)]
        assert "warning" not in "".join(watcher.communicate()[0] for watcher in watchers)
        assert [watcher.returncode for watcher in watchers] == [4, 4]
        again = status(tmp_path, receiver.url)
        again.communicate()
    texts = [document["content"] for document in receiver.got]
    assert len(texts) == len(REASONS)
    for run, (reason, cause) in zip(sweep.runs, REASONS.items(), strict=True):
        (text,) = [text for text in texts if f" {run.label} " in text]
        assert f"({cause}): {reason}" in text
        assert f"last words of {run.label}" in text
        assert ("was given up" in text) == reason.startswith("given up")
    assert any("&lt;@everyone&gt;" in document["text"] for document in receiver.got)
    assert_never_written("secret-token", tmp_path)


@pytest.mark.slow
def test_while_the_receiver_is_down_nothing_is_lost(tmp_path: Path) -> None:
    sweep = sweep_with_messages(tmp_path, seeds=2)
    fail(tmp_path, sweep.runs[0], "MemoryError")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    down = status(tmp_path, f"http://127.0.0.1:{port}{PATH}")
    told = down.communicate()[0]
    assert "messages that wait for the webhook: 1 (Connection refused); they are tried again later" in told
    assert "secret-token" not in told
    for run in sweep.runs:  # the failure is history by then
        write_result(tmp_path, run, val_top1=0.75)
    with receiving(port) as receiver:
        up = status(tmp_path, receiver.url)
        assert "warning" not in up.communicate()[0]
    kinds = Counter(next(kind for kind in ("failed", "finished", "complete") if kind in each["text"]) for each in receiver.got)
    assert kinds == {"failed": 1, "finished": 4, "complete": 2}
    assert "vitpa small: digits-content complete: 75.00 ± 0.00 % over 2 seeds" in [each["text"] for each in receiver.got]


@pytest.mark.slow
def test_the_workers_tell_with_nobody_looking(tmp_path: Path) -> None:
    make_sweep(tmp_path, seeds=1)
    profile = tmp_path / "mine.yaml"
    runtime = f"{{device: cpu, data_dir: {literal_path(tmp_path)}/data}}"
    profile.write_text(f"slots: 2\nruntime: {runtime}\nnotify: {{webhook: {VARIABLE}, events: [finished, cell]}}\n")
    with receiving() as receiver:
        done = launch(tmp_path, profile, environment={**os.environ, VARIABLE: receiver.url})
        assert done.returncode == 0, done.stderr
        wait_for(lambda: len(receiver.got) >= 4, poll_s=0.1)
    texts = sorted(document["text"] for document in receiver.got)
    names = ("digits-content", "digits-positional")
    assert [text.split()[2:4] for text in texts] == [
        each for name in names for each in ([name, "complete:"], [f"{name}-s0", "finished:"])
    ]
    assert_never_written("secret-token", tmp_path)


def test_what_was_there_before_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    fail(tmp_path, sweep.runs[0], "MemoryError")
    states = StateReader(tmp_path).states(sweep.runs)
    assert tell(tmp_path, sweep.name, states, whole=True) == []  # no messages are wanted
    configure(tmp_path, sweep.name, NOTIFY, states)
    fail(tmp_path, sweep.runs[0], "MemoryError")
    with receiving() as receiver:
        monkeypatch.setenv(VARIABLE, receiver.url)
        assert tell(tmp_path, sweep.name, StateReader(tmp_path).states(sweep.runs), whole=True) == []
    assert len(receiver.got) == 1


@pytest.mark.parametrize(("host", "age_s", "sent"), [("here", 0, True), ("elsewhere", 10, False), ("elsewhere", 9999, True)])
def test_a_dead_sender_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, age_s: float, sent: bool
) -> None:
    sweep = sweep_with_messages(tmp_path, seeds=1)
    fail(tmp_path, sweep.runs[0], "MemoryError")
    claim = SweepDir(tmp_path, sweep.name).messages / f"{sweep.runs[0].signature}-0001-failed.webhook.sending-1"
    dead = ProcessId.mine().model_copy(update={"start_ticks": 1} if host == "here" else {"host": host})
    write_json(claim, {"process": dead.model_dump()})
    os.utime(claim, (time.time() - age_s,) * 2)
    assert (age_s > SENDING_S) == (age_s == 9999)
    with receiving() as receiver:
        monkeypatch.setenv(VARIABLE, receiver.url)
        tell(tmp_path, sweep.name, StateReader(tmp_path).states(sweep.runs), whole=True)
    assert len(receiver.got) == sent


class MailServer(socketserver.TCPServer):
    """Takes one mail."""

    lines: list[str]


class Mail(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, MailServer)
        self.wfile.write(b"220 here\r\n")
        inside = False
        for line in self.rfile:
            text = line.decode().rstrip()
            self.server.lines.append(text)
            inside = inside and text != "."
            if not inside:
                inside = text.upper() == "DATA"
                self.wfile.write(b"354 go on\r\n" if inside else b"221 bye\r\n" if text.upper() == "QUIT" else b"250 fine\r\n")


def email_of(lines: list[str]) -> EmailMessage:
    message = message_from_string("\n".join(lines), policy=policy.default)
    assert isinstance(message, EmailMessage)
    return message


def test_by_mail(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    with MailServer(("127.0.0.1", 0), Mail) as server:
        server.lines = []
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        email = Email(to="me@example.org", host="127.0.0.1", port=server.server_address[1], starttls=False)
        configure(tmp_path, sweep.name, Notify(email=email), [])
        fail(tmp_path, sweep.runs[0], "MemoryError")
        assert tell(tmp_path, sweep.name, StateReader(tmp_path).states(sweep.runs), whole=True) == []
        thread.join()
    assert "RCPT TO:<ME@EXAMPLE.ORG>" in " ".join(server.lines).upper()
    mail = email_of(server.lines[server.lines.index("data") + 1 : server.lines.index(".")])
    assert mail["Subject"].strip() == "vitpa small: digits-content-s0 failed (host out of memory): MemoryError"
    assert "last words of digits-content-s0" in mail.get_content()


@pytest.mark.slurm
def test_a_slurm_job_tells_with_nobody_looking(tmp_path: Path, cluster: BoundCluster) -> None:
    field = Field(tmp_path, cluster)
    (tmp_path / "fail").mkdir()
    run = field.sweep.runs[0]
    (tmp_path / "fail" / run.signature).touch()
    profile = slurm_profile(tmp_path, notify={"webhook": VARIABLE, "events": ["failed", "finished"]}, max_attempts=1)
    with receiving() as receiver:
        field.environment = {**field.environment, VARIABLE: receiver.url}
        done = field.vitpa("submit", profile=profile)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: len(receiver.got) >= 2, poll_s=0.2)
    field.clear()
    texts = sorted(document["text"] for document in receiver.got)
    assert [text.split()[2:4] for text in texts] == [[run.label, "failed"], [field.sweep.runs[1].label, "finished:"]]
