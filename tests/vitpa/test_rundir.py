"""Records that appear whole or not at all, claims that one process gets, processes that are recognised again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slurm.devcluster_processes import descendants
from tests.support.at_once import WITHOUT_ITS_FIRST_THREAD, at_once, start
from tests.support.waiting import finish, wait_for
from vitpa.checkpoint_file import Footer
from vitpa.metrics_file import to_line
from vitpa.records import ProcessId, RunError, create_exclusive, read_json, with_checksum, write_atomic, write_json
from vitpa.rundir import AttemptDir, Result, RunDir

RESULT: dict[str, Any] = {
    "signature": "0123456789abcdef",
    "dataset": "digits",
    "attention": "content",
    "seed": 0,
    "epochs": 4,
    "steps": 88,
    "val_top1": 0.9,
    "val_top5": 1.0,
    "val_loss": 0.3,
    "train_time_s": 4.5,
    "gpu_hours": 0.0,
    "images_per_s": 1000.0,
    "attempts": 1,
    "weights_sha256": "0" * 64,
    "code_version": "g0123456789ab",
    "beton_sha256": {"train": "1" * 64, "val": "2" * 64},
    "finished_utc": "2026-01-01T00:00:00Z",
}


ENVIRONMENT = {"code_version": RESULT["code_version"], "beton_sha256": RESULT["beton_sha256"], "steps_total": 88}
EVALUATION = to_line({"step": 88, "epoch": 4.0, "val/loss": 0.3, "val/top1": 0.9, "val/top5": 1.0})


@contextmanager
def watched(code: str, *arguments: object) -> Iterator[list[str]]:
    """Run `code` while the body runs; what it printed until its input ended is in the list afterwards."""
    until = """
    import sys, threading
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    """
    process = start(textwrap.dedent(until) + textwrap.dedent(code), *arguments)
    printed: list[str] = []
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield printed
        printed += finish(process)[0].split()
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_atomic(path, "a" * 300_000)
    read_on = """
    from pathlib import Path
    reads, parts = 0, 0
    print("ready", flush=True)
    while not ended.is_set():
        text = Path(sys.argv[1]).read_text()
        reads += 1
        parts += len(text) != 300_000 or len(set(text)) != 1
    print(reads, parts)
    """
    with watched(read_on, path) as printed:
        for number in range(200):
            write_atomic(path, "ab"[number % 2] * 300_000)
    reads, parts = map(int, printed)
    assert reads > 20
    assert parts == 0
    assert list(tmp_path.iterdir()) == [path]


def write_too_much(folder: Path, before: str = "") -> list[str]:
    """Try to replace a small record by 4 MiB in every way, in a process of its own; what it printed."""
    code = f"""
    import sys
    from pathlib import Path
    from vitpa.records import create_exclusive, write_atomic
    {before}
    folder = Path(sys.argv[1])
    for write, name in ((write_atomic, "record"), (create_exclusive, "new")):
        try:
            write(folder / name, "b" * (4 << 20))
        except OSError as error:
            print(error.strerror)
    """
    process = start(code, folder)
    printed = finish(process)[0].splitlines()
    assert process.returncode == 0
    return printed


def assert_as_before(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["record"]
    assert (folder / "record").read_text() == "whole"


def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False, capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a small disk needs root; a limit on the size of files is tested below")
    try:
        write_atomic(disk / "record", "whole")
        assert write_too_much(disk) == ["No space left on device"] * 2
        assert_as_before(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_the_size_of_files_leaves_the_old_record_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "record", "whole")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    assert write_too_much(tmp_path, limit) == ["File too large"] * 2
    assert_as_before(tmp_path)


def test_exactly_one_process_creates_a_file(tmp_path: Path) -> None:
    create = """
    import sys
    from pathlib import Path
    from vitpa.records import create_exclusive
    ready()
    folder, number = Path(sys.argv[1]), sys.argv[2]
    print(*(create_exclusive(folder / str(file), number * 1000) for file in range(50)))
    """
    answers = [answer.split() for answer in at_once(create, 4, tmp_path)]
    for file in range(50):
        winners = [number for number, answer in enumerate(answers) if answer[file] == "True"]
        assert len(winners) == 1
        assert (tmp_path / str(file)).read_text() == str(winners[0]) * 1000
    assert len(list(tmp_path.iterdir())) == 50  # no temporary file is left


def test_exactly_one_thread_creates_a_file(tmp_path: Path) -> None:
    barrier, won = threading.Barrier(16), []

    def create(number: int) -> None:
        barrier.wait()
        if create_exclusive(tmp_path / "file", str(number)):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "file").read_text() == str(won[0])
    assert len(list(tmp_path.iterdir())) == 1


def test_exactly_one_process_gets_an_attempt(tmp_path: Path) -> None:
    claim = """
    import sys
    from pathlib import Path
    from vitpa.rundir import RunDir
    ready()
    run, number = RunDir(Path(sys.argv[1]), "0123456789abcdef"), sys.argv[2]
    print(*(run.claim_attempt(attempt, {"by": number}) is not None for attempt in range(1, 51)))
    """
    answers = [answer.split() for answer in at_once(claim, 4, tmp_path)]
    run = RunDir(tmp_path, "0123456789abcdef")
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 51))
    for attempt in run.attempts():
        winners = [number for number, answer in enumerate(answers) if answer[attempt.number - 1] == "True"]
        assert len(winners) == 1
        assert read_json(attempt.claim_json) == {"by": str(winners[0])}
    assert len(list(run.attempts_dir.iterdir())) == 50  # those that were too late have tidied up


def test_a_claim_is_whole_from_the_first_moment(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0123456789abcdef")
    run.attempts_dir.mkdir(parents=True)
    look = """
    import json
    from pathlib import Path
    from vitpa.rundir import RunDir
    run, seen = RunDir(Path(sys.argv[1]), "0123456789abcdef"), set()
    print("ready", flush=True)
    while not ended.is_set():
        for attempt in run.attempts()[-2:]:
            if attempt.number not in seen:
                assert len(json.loads(attempt.claim_json.read_text())["by"]) == 100_000
                seen.add(attempt.number)
    print(len(seen))
    """
    with watched(look, tmp_path) as printed:
        for number in range(1, 101):
            assert run.claim_attempt(number, {"by": "x" * 100_000}) is not None
    assert int(printed[0]) > 20


def test_what_a_crashed_claimer_leaves_is_harmless(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0123456789abcdef")
    for name, content in ((".claim-0123", None), (".claim-4567", '{"by": '), (".claim-89ab", '{"by": "nobody"}')):
        (run.attempts_dir / name).mkdir(parents=True)
        if content is not None:
            (run.attempts_dir / name / "claim.json").write_text(content)
    assert run.attempts() == []
    attempt = run.claim_attempt(1, {"by": "me"})
    assert attempt is not None
    assert [attempt.number for attempt in run.attempts()] == [1]
    assert read_json(attempt.claim_json) == {"by": "me"}
    assert run.claim_attempt(1, {"by": "another"}) is None
    assert read_json(attempt.claim_json) == {"by": "me"}


def test_a_claim_that_cannot_be_written_is_no_lost_race(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0123456789abcdef")
    run.attempts_dir.parent.mkdir(parents=True)
    run.attempts_dir.write_text("in the way")
    with pytest.raises(FileExistsError, match="attempts"):
        run.claim_attempt(1, {})


def test_a_process_alive_zombie_and_dead() -> None:
    process = start("input()")
    me = ProcessId.of(process.pid)
    assert me.alive() is True
    assert ProcessId.mine().alive() is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet waited for: a zombie
    assert Path(f"/proc/{process.pid}").exists()
    assert me.alive() is False
    with pytest.raises(ProcessLookupError):
        ProcessId.of(process.pid)
    process.communicate()
    assert me.alive() is False


def test_a_process_lives_on_without_its_first_thread() -> None:
    process = start(WITHOUT_ITS_FIRST_THREAD)
    try:
        me = ProcessId.of(process.pid)
        wait_for(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
        assert me.alive() is True
        assert ProcessId.of(process.pid) == me
        assert process.pid in descendants([os.getpid()])
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie as above
    assert me.alive() is False
    assert process.pid not in descendants([os.getpid()])
    process.communicate()


def test_a_reused_pid_another_boot_and_another_host() -> None:
    me = ProcessId.mine()
    assert me.model_copy(update={"start_ticks": me.start_ticks - 1}).alive() is False
    assert me.model_copy(update={"boot_id": "00000000-0000-0000-0000-000000000000"}).alive() is False
    assert me.model_copy(update={"host": "elsewhere.invalid"}).alive() is None


def test_a_process_is_recognised_by_another_process_and_whatever_its_name(tmp_path: Path) -> None:
    name = tmp_path / "a) Z (0 \udcff"  # the kernel shows it in parentheses before the fields that are read
    name.symlink_to("/bin/sleep")
    process = subprocess.Popen([name, "60"])
    try:
        assert ProcessId.of(process.pid).start_ticks >= ProcessId.mine().start_ticks  # it is younger
        recorded = json.dumps(ProcessId.of(process.pid).model_dump())
        ask = "import sys; from vitpa.records import ProcessId; print(ProcessId.model_validate_json(sys.argv[1]).alive())"
        other = start(ask, recorded)
        assert finish(other)[0] == "True\n"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"record\.json: expected a JSON object, found list$"),
        ('{"a": 1', r"record\.json: not valid JSON \(.+ at line 1\); it was cut or edited$"),
        ("", r"record\.json: not valid JSON"),
        ("\xff", r"record\.json: not a JSON text"),
    ],
)
def test_a_record_that_is_no_whole_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=message):
        read_json(tmp_path / "record.json")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "record.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    assert read_json(tmp_path / "record.json") is None


def recorded(tmp_path: Path, text: str) -> RunDir:
    run = RunDir(tmp_path, RESULT["signature"])
    run.path.mkdir(parents=True)
    run.result_json.write_text(text)
    run.metrics_jsonl.write_text(EVALUATION)
    run.env_json.write_text(json.dumps(ENVIRONMENT))
    return run


def test_no_result_and_a_good_one(tmp_path: Path) -> None:
    assert RunDir(tmp_path, RESULT["signature"]).result() is None
    result = recorded(tmp_path, json.dumps({**RESULT, "host": "n1"})).result()
    assert result == Result(**{**RESULT, "host": "n1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(RESULT)[:-20], r"not valid JSON \(.+\); it was cut or edited"),
        ("", r"not valid JSON \(.+\); it was cut or edited"),
        ("[]", r"expected a JSON object, found list"),
        (json.dumps({**RESULT, "val_loss": float("nan")}), "NaN is no number of JSON"),
        (json.dumps({**RESULT, "val_loss": float("inf")}), "Infinity is no number of JSON"),
        (json.dumps({**RESULT, "signature": "f" * 16}), r"belongs to run f{16}, not 0123456789abcdef"),
        (json.dumps({k: v for k, v in RESULT.items() if k != "steps"}), r"steps: Field required"),
        (json.dumps({**RESULT, "val_top1": 90.0}), r"val_top1: .*less than or equal to 1"),
        (json.dumps({**RESULT, "val_top1": -0.1}), r"val_top1: .*greater than or equal to 0"),
        (json.dumps({**RESULT, "seed": "0"}), r"seed: .*valid integer"),
        (json.dumps({**RESULT, "beton_sha256": {"train": 1}}), r"beton_sha256\.train: .*valid string"),
    ],
)
def test_a_result_that_cannot_be_trusted_says_why_and_how_to_fix_it(tmp_path: Path, text: str, message: str) -> None:
    run = recorded(tmp_path, text)
    with pytest.raises(RunError, match=message) as raised:
        run.result()
    line = str(raised.value)
    assert line.startswith(f"{run.result_json}: ")
    assert line.endswith("; delete it to train the run again")
    assert "\n" not in line


@pytest.mark.parametrize("key", RESULT)
def test_a_result_that_was_changed_after_it_was_written_is_refused(tmp_path: Path, key: str) -> None:
    document = with_checksum(RESULT)
    run = recorded(tmp_path, json.dumps(document))
    run.env_json.write_text(json.dumps(with_checksum(ENVIRONMENT)))
    assert run.result() == Result(**RESULT)
    text = json.dumps(RESULT[key])
    digit = next(index for index, character in enumerate(text) if character.isalnum())
    other = text[:digit] + ("2" if text[digit] != "2" else "3") + text[digit + 1 :]
    run.result_json.write_text(json.dumps({**document, key: json.loads(other)}))
    with pytest.raises(RunError, match="was changed after it was written; its record_sha256 does not fit; delete it"):
        run.result()


GONE = "was changed after it was written; its record_sha256 is gone"
CHECKED = {**RESULT, "config_sha256": "3" * 64}
WITHOUT_CRC = re.sub(r', "crc32": "\w+"', "", EVALUATION)


@pytest.mark.parametrize(
    ("result", "environment", "metrics", "message"),
    [
        (with_checksum(CHECKED), with_checksum(ENVIRONMENT), EVALUATION, ""),
        (RESULT, ENVIRONMENT, WITHOUT_CRC, ""),  # as the versions without checksums wrote it
        (RESULT, ENVIRONMENT, EVALUATION, ""),
        (CHECKED, with_checksum(ENVIRONMENT), EVALUATION, rf"result\.json: {GONE}"),
        (RESULT, with_checksum(ENVIRONMENT), EVALUATION, rf"result\.json: {GONE}"),
        (CHECKED, ENVIRONMENT, EVALUATION, rf"result\.json: {GONE}"),
        (with_checksum(CHECKED), ENVIRONMENT, EVALUATION, rf"cannot be verified: env\.json {GONE}"),
        (with_checksum(CHECKED), with_checksum(ENVIRONMENT), WITHOUT_CRC, r"the end of metrics\.jsonl is damaged"),
        (RESULT, ENVIRONMENT, to_line({"step": 1}) + WITHOUT_CRC, r"the end of metrics\.jsonl is damaged"),
        (RESULT, None, WITHOUT_CRC, r"cannot be verified: env\.json is missing"),
        (RESULT, {}, WITHOUT_CRC, r"cannot be verified: env\.json has no code_version"),
        (with_checksum(CHECKED), with_checksum({}), EVALUATION, r"cannot be verified: env\.json has no code_version"),
        (RESULT, {**ENVIRONMENT, "steps_total": 89}, WITHOUT_CRC, r"says steps_total 88, env\.json 89"),
    ],
)
def test_checksums_that_a_version_wrote_must_be_there(
    tmp_path: Path, result: dict[str, Any], environment: dict[str, Any] | None, metrics: str, message: str
) -> None:
    """Both files and the rows got theirs before `config_sha256`, and env.json has been there from the first version on."""
    run = recorded(tmp_path, json.dumps(result))
    run.metrics_jsonl.write_text(metrics)
    run.env_json.unlink()
    if environment is None:
        run.env_json.symlink_to("nowhere")
    else:
        run.env_json.write_text(json.dumps(environment))
    if not message:
        assert run.result() is not None
        return
    with pytest.raises(RunError, match=message):
        run.result()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("step_x.pt", Path.touch),
        ("step_000000300.pt", Path.touch),
        ("step_000000300.pt", Path.mkdir),
        ("step_000000300.pt", os.mkfifo),
        ("step_000000300.pt", lambda path: path.symlink_to("nowhere")),
        ("step_00000300.pt", Path.mkdir),
        ("step_-00000300.pt", Path.touch),
        ("step_٣٣٣٣٣٣٣٣٣.pt", Path.touch),
        ("step_000000300.pt", lambda path: path.write_bytes(whole(200))),
        ("step_000000300.pt", lambda path: path.write_bytes(whole(300, "f" * 16))),
        ("step_000000300.pt", lambda path: path.write_bytes(whole(300)[:-1])),
        ("step_000000300.pt", lambda path: path.write_bytes(whole(300)[1:])),
    ],
)
def test_no_step_is_believed_of_what_is_no_checkpoint(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    run = RunDir(tmp_path, "0" * 16)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step_000000200.pt").write_bytes(whole(200))
    make(run.checkpoints / name)
    assert (run.checkpoint_steps(), run.newest_step()) == ({200}, 200)


def whole(step: int, signature: str = "0" * 16) -> bytes:
    """The bytes of a checkpoint file, but for the archive."""
    return b"archive" + Footer.of(b"archive", signature, step).line()


def test_steps_of_checkpoints_and_what_the_trainer_leaves(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0" * 16)
    assert (run.checkpoint_steps(), run.newest_step()) == (set(), 0)
    run.checkpoints.mkdir(parents=True)
    for step in (50, 100):
        (run.checkpoints / f"step_{step:09d}.pt").write_bytes(b"archive" + Footer.of(b"archive", run.signature, step).line())
    assert (run.checkpoint_steps(), run.newest_step()) == ({50, 100}, 100)
    assert AttemptDir(run.attempts_dir / "0002").left_json == tmp_path / "runs" / run.signature / "attempts/0002/left.json"
