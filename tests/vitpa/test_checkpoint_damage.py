"""Damaged, foreign and forged checkpoints: none is believed, each is named with its reason, and the older one is used."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import EVALUATION, SIGNATURE, fields, load_newest
from vitpa import checkpoint, snapshot
from vitpa.checkpoint import Checkpoint, Layout, Progress, weights_sha256
from vitpa.checkpoint_file import CheckpointError, Footer
from vitpa.records import RunError
from vitpa.rundir import RunDir

TOTAL_STEPS = 100


LAYOUT = Layout.of(fields(1)["model"], fields(1)["optimizer"], TOTAL_STEPS)


def content(document: Any, step: int) -> bytes:
    """The bytes of a checkpoint file with that content and a checksum that fits."""
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue() + Footer.of(buffer.getvalue(), SIGNATURE, step).line()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a good checkpoint of step 10."""
    run = RunDir(tmp_path, SIGNATURE)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step_000000010.pt").write_bytes(content(fields(10), 10))
    return run


def newest(run: RunDir) -> int:
    found = load_newest(run, LAYOUT)
    assert found is not None
    return found[1].progress.step


def test_a_good_one_is_used_without_a_word(run: RunDir) -> None:
    (run.checkpoints / "step_000000020.pt").write_bytes(content(fields(20), 20))
    assert newest(run) == 20


def progress(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["progress"].update(values)


def moment(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["optimizer"]["state"][0].update({name: value})


def weights(value: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["model"].update(weight=value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (progress(step=10), "is a checkpoint of step 10, which is not what its name says"),
        (progress(step=10**9), "is a checkpoint of step 1000000000, which"),
        (progress(step=-1), "progress.step: .*greater than or equal to 0"),
        (progress(step=[20]), "progress.step: .*valid integer"),
        (progress(step=20.0), "progress.step: .*valid integer"),
        (progress(step=True), "progress.step: .*valid integer"),
        (progress(train_time_s=-1.0), "progress.train_time_s"),
        (progress(gpu_time_s=float("nan")), "progress.gpu_time_s: .*finite"),
        (progress(val={"val/top1": 0.5}), "an evaluation of val/top1"),
        (progress(val={**EVALUATION, "val/loss": float("inf")}), "progress.val.val/loss: .*finite"),
        (progress(more=1), "progress.more: Extra"),
        (lambda document: document.update(progress=[20]), "progress: .*dictionary"),
        (lambda document: document.update(signature="f" * 16), "is a checkpoint of another run"),
        (lambda document: document.update(more=1), "more: Extra"),
        (lambda document: document.update(window=torch.zeros(3)), r"window is float32 \[3\]"),
        (lambda document: document.update(window=torch.zeros(4, dtype=torch.float64)), r"window is float64 \[4\]"),
        (lambda document: document.update(window=-torch.ones(3, dtype=torch.float64)), "window is negative"),
        *((lambda document, key=key: document.pop(key), f"({key}: Field required|checksum is missing)") for key in fields(1)),
        (weights(torch.full((2, 3), torch.nan)), "model weight is not finite"),
        (weights(torch.full((2, 3), torch.inf)), "model weight is not finite"),
        (weights(torch.zeros(2, 3, dtype=torch.float64)), r"model weight is float64 \[2, 3\], the run's float32 \[2, 3\]"),
        (weights(torch.zeros(3, 2)), r"model weight is float32 \[3, 2\]"),
        (lambda document: document["model"].pop("bias"), "model bias is missing"),
        (lambda document: document["model"].update(more=torch.zeros(1)), "the run's missing"),
        (lambda document: document["model"].update(weight=[1.0]), "model.weight"),
        (moment("exp_avg", torch.zeros(3, 2)), "optimizer 0 exp_avg is"),
        (moment("exp_avg_sq", -torch.ones(2, 3)), "optimizer 0 exp_avg_sq is negative"),
        (moment("exp_avg_sq", torch.full((2, 3), torch.nan)), "optimizer 0 exp_avg_sq is not finite"),
        (moment("step", torch.tensor(10.0)), "optimizer 0 step is 10 at step 20"),
        (lambda document: document["optimizer"]["state"].pop(1), "optimizer 1 exp_avg is missing"),
        (lambda document: document["optimizer"].update(state=[]), "not AdamW's"),
        (lambda document: document["optimizer"].pop("param_groups"), "not AdamW's"),
        (lambda document: document["optimizer"]["param_groups"].reverse(), "groups its parameters otherwise"),
    ],
)
def test_what_does_not_fit_is_passed_over(
    run: RunDir, change: Callable[[dict[str, Any]], object], reason: str, warned: Callable[[str], str]
) -> None:
    document = fields(20)
    change(document)
    (run.checkpoints / "step_000000020.pt").write_bytes(content(document, 20))
    assert newest(run) == 10
    told = warned(rf"step_000000020\.pt: .*{reason}.*; it is passed over")
    assert told.count("\n") == 1


@pytest.mark.parametrize("step", [TOTAL_STEPS + 1, 10**9])
def test_a_step_beyond_the_last_is_passed_over(run: RunDir, step: int, warned: Callable[[str], str]) -> None:
    (run.checkpoints / f"step_{step:09d}.pt").write_bytes(content(fields(step), step))
    assert newest(run) == 10
    warned(rf"it does not fit the run: step {step} of {TOTAL_STEPS}")


@pytest.mark.parametrize("document", [[1, 2], 7, "text", None, {}, {"step": 20}, torch.zeros(3)])
def test_another_object_is_passed_over(run: RunDir, document: object, warned: Callable[[str], str]) -> None:
    (run.checkpoints / "step_000000020.pt").write_bytes(content(document, 20))
    assert newest(run) == 10
    warned("it is no checkpoint")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("step_x.pt", Path.touch, "a checkpoint's name is step_, its step in nine digits"),
        ("step_00000020.pt", Path.mkdir, "a checkpoint's name is"),
        ("step_-00000020.pt", Path.touch, "a checkpoint's name is"),
        ("step_000000000.pt", Path.touch, "a checkpoint's name is"),
        ("step_٠٠٠٠٠٠٠٢٠.pt", Path.touch, "a checkpoint's name is"),
        ("step_000000020.pt", Path.mkdir, "cannot be read .Is a directory"),
        ("step_000000020.pt", os.mkfifo, "cannot be read .not a regular file"),
        ("step_000000020.pt", lambda path: path.symlink_to("nowhere"), "cannot be read"),
        ("step_000000020.pt", lambda path: path.symlink_to("step_000000010.pt"), "is a checkpoint of step 10"),
        ("step_000000020.pt", lambda path: path.symlink_to(path.name), "cannot be read"),
        ("step_000000020.pt", Path.touch, "is empty"),
        ("step_000000020.pt", sparse, "it is larger than .*, the most that a checkpoint of this run has"),
    ],
)
def test_odd_files_are_passed_over(
    run: RunDir, name: str, make: Callable[[Path], object], reason: str, warned: Callable[[str], str]
) -> None:
    make(run.checkpoints / name)
    assert newest(run) == 10
    warned(rf"{name}: .*{reason}.*it is passed over")
    assert run.newest_step() == 10
    checkpoint.save(run, later())  # and it is in nobody's way
    assert run.newest_step() == 30


def fails(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, fail)


@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        *(
            ("vitpa.checkpoint_file.read_bytes", OSError(number, os.strerror(number)), os.strerror(number))
            for number in (errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT)
        ),
        ("vitpa.checkpoint_file.read_bytes", MemoryError(), "out of memory"),
        ("torch.load", MemoryError(), "out of memory"),
        ("torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), "out of memory"),
        ("torch.load", OSError(errno.EIO, "Input/output error"), "Input/output error"),
        ("os.listdir", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_cannot_be_read_now_ends_the_run_and_stays_as_it_is(
    run: RunDir, where: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about the file, so the run neither goes back to an older one nor begins anew."""
    (run.checkpoints / "step_000000020.pt").write_bytes(content(fields(20), 20))
    before = sorted(run.checkpoints.iterdir())
    with monkeypatch.context() as patched:
        fails(patched, where, error)
        with pytest.raises(RunError, match=rf"checkpoints.*: cannot be read \({reason}\); all is left as it is") as caught:
            newest(run)
    assert "\n" not in str(caught.value)
    assert sorted(run.checkpoints.iterdir()) == before
    assert newest(run) == 20


def test_without_memory_for_one_of_an_earlier_version_it_is_not_damaged(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.checkpoints / "step_000000020.pt").write_bytes(without_checksum(20))
    with monkeypatch.context() as patched:
        fails(patched, "zipfile.ZipFile", MemoryError())
        with pytest.raises(RunError, match="out of memory"):
            newest(run)
    assert newest(run) == 20


def test_a_snapshot_that_cannot_be_read_now_is_not_called_damaged(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = fields(20)["model"]
    path = snapshot.write(run, 20, weights)
    with monkeypatch.context() as patched:
        fails(patched, "torch.load", MemoryError())
        with pytest.raises(RunError, match="out of memory"):
            snapshot.read(path, SIGNATURE, weights)
    assert weights_sha256(snapshot.read(path, SIGNATURE, weights)) == weights_sha256(weights)


def test_a_folder_that_is_not_mounted_is_no_empty_folder(run: RunDir) -> None:
    run.checkpoints.rename(elsewhere := run.path / "elsewhere")
    assert load_newest(run, LAYOUT) is None
    run.checkpoints.symlink_to("not_mounted")
    with pytest.raises(RunError, match=r"checkpoints: cannot be read \(No such file or directory\)"):
        load_newest(run, LAYOUT)
    assert run.newest_step() == 0
    elsewhere.rename(run.path / "not_mounted")
    assert newest(run) == 10


def later() -> Checkpoint:
    """A checkpoint of step 30."""
    return Checkpoint(**{**fields(30), "progress": Progress(step=30, val=EVALUATION)})


def test_two_good_ones_stay_beside_a_damaged_one(run: RunDir, warned: Callable[[str], str]) -> None:
    """One that was passed over does not count as one of the two that are kept."""
    (run.checkpoints / "step_000000020.pt").write_bytes(content(fields(20), 20)[:-100])
    assert newest(run) == 10
    warned("it is passed over, and is passed_over_step_000000020.pt now")
    checkpoint.save(run, later())
    assert run.checkpoint_steps() == {10, 30}


def test_the_only_one_is_damaged_and_the_run_is_grouped_with_those_that_start_anew(
    run: RunDir, tmp_path: Path, warned: Callable[[str], str]
) -> None:
    path = run.checkpoints / "step_000000010.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert run.checkpoint_steps() == {10}  # a flipped bit is seen only when all is read
    assert checkpoint.in_step([run, RunDir(tmp_path, "f" * 16)], LAYOUT) == {0: None, 1: None}
    warned("its checksum does not fit")
    assert run.checkpoint_steps() == set()


def without_checksum(step: int) -> bytes:
    """As commit 89b4f68 wrote it."""
    document = fields(step)
    del document["metrics"], document["progress"]["wall_time_s"]
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def test_one_of_an_earlier_version_is_used_with_a_word(run: RunDir, warned: Callable[[str], str]) -> None:
    (run.checkpoints / "step_000000020.pt").write_bytes(without_checksum(20))
    assert newest(run) == 20
    warned(r"step_000000020\.pt: .*carries no checksum of its own; .* it is used$")
    assert run.newest_step() == 20


def test_a_flipped_bit_in_the_tensors_of_an_earlier_version_is_found(run: RunDir, warned: Callable[[str], str]) -> None:
    data = without_checksum(20)
    at = data.index(fields(20)["model"]["weight"].numpy().tobytes())
    damaged = bytearray(data)
    damaged[at + 2] ^= 4
    (run.checkpoints / "step_000000020.pt").write_bytes(damaged)
    assert newest(run) == 10
    warned("it is damaged .*; it is passed over")


def test_a_checksum_cannot_be_taken_off(run: RunDir, warned: Callable[[str], str]) -> None:
    data = content(fields(20), 20)
    (run.checkpoints / "step_000000020.pt").write_bytes(data[: data.rindex(b'\n{"vitpa')])
    assert newest(run) == 10
    warned("its checksum is missing")


WHOLE = content(fields(20), 20)
mutations = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 8 * len(WHOLE) - 1), st.just(0)),
    st.tuples(st.just("flip"), st.integers(8 * (len(WHOLE) - 250), 8 * len(WHOLE) - 1), st.just(0)),
    st.tuples(st.just("cut"), st.integers(0, len(WHOLE) - 1), st.just(0)),
    st.tuples(st.just("zero"), st.integers(0, len(WHOLE) - 1), st.integers(1, 4096)),
    st.tuples(st.just("drop"), st.integers(0, len(WHOLE) - 1), st.integers(1, 64)),
    st.tuples(st.just("append"), st.integers(0, 255), st.integers(1, 64)),
    st.tuples(st.just("double"), st.integers(0, len(WHOLE) - 1), st.integers(1, 600)),
)


def mutated(kind: str, where: int, length: int) -> bytes:
    data = bytearray(WHOLE)
    if kind == "flip":
        data[where // 8] ^= 1 << where % 8
    elif kind == "cut":
        del data[where:]
    elif kind == "zero":
        data[where : where + length] = bytes(len(data[where : where + length]))
    elif kind == "drop":
        del data[where : where + length]
    elif kind == "double":
        data[where:where] = data[where : where + length]
    else:
        data += bytes([where]) * length
    return bytes(data)


@pytest.mark.fuzz
@given(mutation=mutations)
def test_any_mutation_is_refused_in_one_line_or_changes_nothing(
    mutation: tuple[str, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "step_000000020.pt"
    data = mutated(*mutation)
    path.write_bytes(data)
    try:
        found, has_checksum = checkpoint.load(path, SIGNATURE, LAYOUT)
    except CheckpointError as error:
        assert data != WHOLE
        assert "\n" not in str(error)
        return
    assert data == WHOLE and has_checksum
    assert weights_sha256(found.model) == weights_sha256(fields(20)["model"])


@pytest.mark.fuzz
@given(mutation=mutations)
def test_any_mutation_of_an_earlier_version_is_refused_or_changes_nothing(
    mutation: tuple[str, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, where, length = mutation
    data = bytearray(without_checksum(20))
    if kind == "flip":
        data[where // 8 % len(data)] ^= 1 << where % 8
    else:
        data[where % len(data) :] = data[where % len(data) + length :]
    path = tmp_path_factory.getbasetemp() / "step_000000020.pt"
    path.write_bytes(data)
    try:
        found, _ = checkpoint.load(path, SIGNATURE, LAYOUT)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    expected = fields(20)
    assert weights_sha256(found.model) == weights_sha256(expected["model"])
    assert found.progress == Progress(**expected["progress"])
    for number, moments in expected["optimizer"]["state"].items():
        assert weights_sha256(found.optimizer["state"][number]) == weights_sha256(moments)


@pytest.mark.slow
def test_killed_while_it_writes_there_is_always_a_good_one(run: RunDir) -> None:
    """SIGKILL at four moments: what is there by its name is whole, and half-written files are no checkpoints."""
    program = """
        import sys
        from pathlib import Path
        from tests.support.checkpoints import EVALUATION, SIGNATURE, fields
        from vitpa import checkpoint
        from vitpa.rundir import RunDir

        run, step = RunDir(Path(sys.argv[1]), SIGNATURE), int(sys.argv[2])
        while True:
            step += 1
            document = {**fields(step), "metrics": "x" * 300_000}
            document["progress"] = checkpoint.Progress(**document["progress"])
            checkpoint.save(run, checkpoint.Checkpoint(**document))
            print(step, flush=True)
    """
    root, last = run.path.parent.parent, 10
    for number in range(4):
        command = [sys.executable, "-c", textwrap.dedent(program), str(root), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for _ in range(3):
                last = int(process.stdout.readline())
            time.sleep(0.003 * number)
            os.kill(process.pid, signal.SIGKILL)
            last = max([last, *map(int, process.stdout.read().split())])
        found = load_newest(run)
        assert found is not None
        assert found[1].progress.step in (last, last + 1)
        last = found[1].progress.step
