"""Training for real on the digits: exactness, resume after kill -9, several processes, and clear ends."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.support.checkpoints import load_newest
from tests.support.trainings import (
    EPOCH_STEPS,
    EPOCHS,
    arguments,
    config_of,
    metrics,
    rows,
    start,
    trained,
    wait_until,
)
from tests.support.waiting import finish, wait_for
from vitpa import checkpoint
from vitpa.data.augment.permute import block_order, permute_blocks
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path
from vitpa.datasets import facts_of
from vitpa.metrics_file import read_metrics, to_line
from vitpa.models import build_model
from vitpa.records import RunError, read_json
from vitpa.rundir import Result, RunDir
from vitpa.train_command import main
from vitpa.trained import load_run


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a run that nothing disturbed, for both attentions the reference of the tests below."""
    return trained(arguments(digits, tmp_path_factory.mktemp("undisturbed"), "runtime.cpu_threads=1"))


def test_a_pause_changes_nothing(digits: Path, tmp_path: Path, undisturbed: Result) -> None:
    """It is evaluated, has a checkpoint, says what it has taken, and goes on to the same weights."""
    words = arguments(digits, tmp_path, "runtime.cpu_threads=1", "runtime.eval_every_epochs=4")
    run = config_of(words).run_dir
    for epoch in (1, 3, 3):  # the second time there is nothing to do
        assert main([*words, f"runtime.stop_after_epoch={epoch}"]) == 0
        pause = run.paused()
        assert pause is not None
        assert (pause.epoch, pause.step, run.newest_step()) == (epoch, epoch * EPOCH_STEPS, epoch * EPOCH_STEPS)
        assert metrics(run)[-1]["step"] == pause.step
        assert "val/top1" in metrics(run)[-1]
        assert run.result() is None
        ended = read_json(run.attempts()[-1].exit_json)
        assert ended is not None
        assert (ended["state"], ended["reason"]) == ("paused", f"after epoch {epoch}")
    result = trained(words)
    assert result.weights_sha256 == undisturbed.weights_sha256
    assert (result.val_loss, result.attempts) == (undisturbed.val_loss, 4)
    assert main([*words, "runtime.stop_after_epoch=2"]) == 0, "it is finished"


def test_a_pause_where_the_run_already_is(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of an epoch it is evaluated, in the middle of one nothing is said to be its accuracy."""
    often = ["runtime.checkpoint_every_steps=1", "runtime.eval_every_epochs=4", "runtime.cpu_threads=1"]
    words = arguments(digits, tmp_path, *often, "runtime.stop_after_epoch=2")
    run = config_of(words).run_dir
    assert main(words) == 0
    for step, epoch in ((2 * EPOCH_STEPS, 2), (EPOCH_STEPS + 5, 1)):
        newest = load_newest(run)
        assert newest is not None
        state = newest[1].model_copy(deep=True)
        evaluated = [row for row in read_metrics(run.metrics_jsonl) if "val/top1" in row]
        state.progress.step = step
        state.progress.val = {}
        for moments in state.optimizer["state"].values():
            moments["step"].fill_(step)
        kept = [to_line(row) for row in read_metrics(run.metrics_jsonl) if row["step"] <= step and "val/top1" not in row]
        state = state.model_copy(update={"metrics": "".join(kept)})
        for path in run.checkpoints.iterdir():
            path.unlink()
        checkpoint.save(run, state)
        capsys.readouterr()
        assert main([*words[:-1], "runtime.stop_after_epoch=1" if epoch == 1 else words[-1]]) == 0
        told, last = capsys.readouterr().err, metrics(run)[-1]
        if epoch == 2:
            assert (last["step"], last["val/top1"]) == (step, evaluated[-1]["val/top1"])
            assert f"paused after epoch 2 of {EPOCHS}: val top-1 {100 * last['val/top1']:.2f} %" in told
        else:
            assert "val/top1" not in last
            assert f"paused after epoch 1 of {EPOCHS}: at step {step}, where it is not evaluated" in told
        pause = run.paused()
        assert pause is not None
        assert (pause.epoch, pause.step) == (epoch, step)


def test_epochs_to_keep_that_are_past_are_named(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warned: Callable[[str], str]
) -> None:
    words = arguments(digits, tmp_path, "runtime.cpu_threads=1")
    line = "runtime.keep_epochs: the run is past epoch 1, and the weights were not kept then"
    assert main([*words, "runtime.stop_after_epoch=1"]) == 0
    assert main([*words, "runtime.stop_after_epoch=2", "runtime.keep_epochs=[1,2,3]"]) == 0
    assert capsys.readouterr().err.count(line) == 1
    assert main([*words, "runtime.keep_epochs=[2]"]) == 0
    assert "the run is past" not in capsys.readouterr().err
    assert main([*words, "runtime.keep_epochs=[1,2]"]) == 0, "it is finished"
    assert "past epoch 1, and" in warned("the weights were not kept then")


def test_a_healthy_run_of_a_group_is_paused_where_another_fails(digits: Path, tmp_path: Path) -> None:
    """It is not recorded as failed for the other's reason, so that `submit` takes it."""
    ways = ["optim.warmup_epochs=0", "optim.grad_clip_norm=null", "runtime.stop_after_epoch=1"]
    words = arguments(digits, tmp_path, *ways)
    assert main([*words, "optim.lr=2e-3,1e30"]) == 1
    ends = [read_json(config_of([*words, f"optim.lr={rate}"]).run_dir.attempts()[0].exit_json) for rate in ("2e-3", "1e30")]
    assert [(end or {})["state"] for end in ends] == ["paused", "failed"]
    assert (ends[0] or {})["reason"] == "after epoch 1"


def test_of_a_group_none_is_claimed_if_one_is_trained_already(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path)
    other = start([*words, "seed=1"])
    try:
        run = config_of([*words, "seed=1"]).run_dir
        wait_until(lambda: any(each.start_json.exists() for each in run.attempts()), other)
        assert main([*words, "--seeds=0,1"]) == 1
        assert f"this run is being trained by process {other.pid}" in capsys.readouterr().err
        assert config_of([*words, "seed=0"]).run_dir.attempts() == []
    finally:
        other.kill()
        other.communicate()


def test_an_evaluation_that_is_not_finite_is_a_failure(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a last step whose loss was finite, of the weights before it: no row, no result, no checkpoint, one line."""
    rates = ["optim.lr=1e30", "optim.min_lr=1e30", "optim.warmup_epochs=0"]
    words = arguments(digits, tmp_path, "train.global_batch_size=1437", "train.epochs=1", *rates)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "the loss or its gradient became non-finite at step 1 (epoch 1.00)" in error
    run = config_of(words).run_dir
    assert run.newest_step() == 0
    assert all("val/loss" not in row for row in read_metrics(run.metrics_jsonl))


def test_what_killed_attempts_left_of_checkpoints_goes(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path)
    run = config_of(words).run_dir
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".step_000000001.pt.22683.61311e49").write_bytes(b"half")
    assert main([*words, "runtime.stop_after_epoch=1"]) == 0
    assert {path.name for path in run.checkpoints.iterdir()} == {f"step_{EPOCH_STEPS:09d}.pt"}


def test_a_stop_is_seen_within_a_second(digits: Path, tmp_path: Path) -> None:
    seldom = ["runtime.poll_every_steps=1000000", "runtime.log_every_steps=1", "train.global_batch_size=2"]
    words = arguments(digits, tmp_path, *seldom)
    run = config_of(words).run_dir
    process = start(words)
    wait_until(lambda: rows(run) >= 1, process)
    run.stop.touch()
    wait_for(lambda: process.poll() is not None)
    assert process.returncode == 0
    process.communicate()
    assert 0 < run.newest_step() < 1437 // 2, "before the epoch's end"


def test_a_checkpoint_is_read_once(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find out whether it is whole, all of it is read; the training goes on with what was read then."""
    words = [*arguments(digits, tmp_path), "--seeds=0,1"]
    assert main([*words, "runtime.stop_after_epoch=1"]) == 0
    load, loaded = torch.load, []

    def counted(*args: Any, **options: Any) -> Any:
        loaded.append(args)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", counted)
    assert main([*words, "runtime.stop_after_epoch=2"]) == 0
    assert f"resumed at step {EPOCH_STEPS}" in capsys.readouterr().err
    assert len(loaded) == 2


def test_without_tensorboard_nothing_is_drawn(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("vitpa.data.open.Data.previews", refuse)
    monkeypatch.setattr("vitpa.train.positional_similarity", refuse)
    assert main(arguments(digits, tmp_path, "runtime.tensorboard=false", "runtime.stop_after_epoch=1")) == 0
    with pytest.raises(AssertionError, match="drawn for nobody"):
        main(arguments(digits, tmp_path / "other", "runtime.tensorboard=true", "runtime.stop_after_epoch=1"))


def test_a_pause_beyond_the_end_is_one_line(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(digits, tmp_path, f"runtime.stop_after_epoch={EPOCHS + 1}")) == 1
    assert f"runtime.stop_after_epoch={EPOCHS + 1} is beyond train.epochs={EPOCHS}" in capsys.readouterr().err


FORKING = """
import os, sys
from vitpa.train_command import main

for _ in sys.stdin:
    child = os.fork()  # it need not import everything again
    if not child:
        os._exit(main(sys.argv[1:]))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit("was not killed")
    print(os.WTERMSIG(status), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_killed_at_any_moment_ends_bit_identical(digits: Path, tmp_path: Path, attention: str) -> None:
    options = [
        f"model.attention={attention}",
        "runtime.cpu_threads=1",
        "runtime.log_every_steps=1",
        "runtime.tensorboard=true",
    ]
    reference = trained(arguments(digits, tmp_path / "reference", *options))
    words = arguments(digits, tmp_path, *options, "runtime.checkpoint_every_steps=3")
    run = config_of(words).run_dir

    moments: dict[str, Callable[[], bool]] = {
        "before the first checkpoint": lambda: rows(run) >= 2,
        "in the first epoch": lambda: rows(run) >= 12,
        "while a checkpoint is written": lambda: any(run.checkpoints.glob(".step_*")) and rows(run) > 20,
        "around an evaluation": lambda: rows(run) >= 2 * EPOCH_STEPS,
        "while a later checkpoint is written": lambda: any(run.checkpoints.glob(".step_*")) and rows(run) > 60,
        "near the end": lambda: rows(run) >= EPOCHS * EPOCH_STEPS - 4,
    }
    command = [sys.executable, "-c", FORKING, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for moment, reached in moments.items():
            print(file=process.stdin, flush=True)
            pid = int(process.stdout.readline())
            wait_until(reached, process)
            os.kill(pid, signal.SIGKILL)
            assert int(process.stdout.readline()) == signal.SIGKILL, moment
            assert not run.result_json.exists(), moment
    assert process.returncode == 0
    resumed = trained(words)

    assert resumed.weights_sha256 == reference.weights_sha256
    assert (resumed.val_top1, resumed.val_loss) == (reference.val_top1, reference.val_loss)
    assert resumed.attempts == len(moments) + 1
    assert resumed.steps == EPOCHS * EPOCH_STEPS
    assert metrics(run) == metrics(config_of(arguments(digits, tmp_path / "reference", *options)).run_dir)
    check_one_curve(run)


def check_one_curve(run: RunDir) -> None:
    """TensorBoard shows one curve over all attempts, every step once, and no run beside the run's own directory."""
    assert all(path.is_file() for path in run.tensorboard.iterdir())
    board = EventAccumulator(str(run.tensorboard)).Reload()
    steps = [event.step for event in board.Scalars("train/loss")]
    assert steps == list(range(1, EPOCHS * EPOCH_STEPS + 1))
    assert {"augmented", "positional_similarity"} <= set(board.Tags()["images"])
    written = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(written).session_start_info.hparams
    assert hparams["augment.permute_block_px"].number_value == 0, "defaults, too: a sweep may have other values"


def test_the_same_command_again_does_nothing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1")
    first = trained(words)
    assert trained(words) == first
    assert "finished already" in capsys.readouterr().err


def test_result_and_records_are_complete(undisturbed: Result, digits: Path) -> None:
    assert undisturbed.steps == EPOCHS * EPOCH_STEPS
    assert undisturbed.attempts == 1
    assert undisturbed.gpu_hours == 0
    assert undisturbed.beton_sha256["train"] == Beton.open(beton_path(digits, "digits", "train")).manifest.beton_sha256
    assert 0.1 < undisturbed.val_top1 <= undisturbed.val_top5 <= 1


@pytest.mark.parametrize("block_px", [0, 2])
def test_evaluation_equals_a_slow_loop_over_the_images(digits: Path, tmp_path: Path, block_px: int) -> None:
    words = arguments(digits, tmp_path, f"augment.permute_block_px={block_px}")
    result, config = trained(words), config_of(words)
    beton, facts = Beton.open(beton_path(digits, "digits", "val")), facts_of("digits")
    model = build_model(**dict(config.model), num_classes=10, seed=0).eval()
    newest = load_newest(config.run_dir)
    assert newest is not None
    model.load_state_dict(newest[1].model)
    correct = in_top5 = 0
    loss = 0.0
    for index, label in enumerate(beton.labels.tolist()):
        pixels = torch.from_numpy(beton.read_image(index)).permute(2, 0, 1)[None].float() / 255
        if block_px:
            pixels = permute_blocks(pixels, block_order(8 // block_px), block_px)
        with torch.no_grad():
            probabilities = model((pixels - facts.mean[0]) / facts.std[0]).double().softmax(dim=1)[0]
        correct += int(probabilities.argmax()) == label
        in_top5 += label in probabilities.topk(5).indices.tolist()
        loss -= float(probabilities[label].log())
    assert (result.val_top1, result.val_top5) == (correct / 360, in_top5 / 360)
    assert result.val_loss == pytest.approx(loss / 360, rel=1e-3)


@pytest.mark.parametrize("crop", ["none", "padded"])
def test_resident_and_streamed_images_train_the_same_weights(digits: Path, tmp_path: Path, crop: str) -> None:
    options = [
        "train.epochs=1",
        "augment.hflip=true",
        f"augment.crop={crop}",
        "augment.crop_padding_px=1",
        "augment.permute_block_px=4",
        "runtime.cpu_threads=1",
    ]
    resident = trained(arguments(digits, tmp_path / "resident", *options, "runtime.loader=resident"))
    streamed = trained(arguments(digits, tmp_path / "streamed", *options, "runtime.loader=stream"))
    assert streamed.weights_sha256 == resident.weights_sha256
    assert streamed.val_loss == resident.val_loss


@pytest.mark.slow
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_quasi_random_streams_and_goes_on_in_the_middle_of_an_epoch(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, accum_steps: int
) -> None:
    monkeypatch.setattr("vitpa.data.sampler.BUFFER_BYTES", 1437 * 192 // 5)
    monkeypatch.setattr("vitpa.data.sampler.SHARD_BYTES", 16 * 192)
    options = ["train.epochs=2", "train.order=quasi_random", "runtime.cpu_threads=1", f"runtime.accum_steps={accum_steps}"]
    options += ["runtime.checkpoint_every_steps=6"]
    whole = trained(arguments(digits, tmp_path / "whole", *options))
    assert "(streamed images, evaluated on val)" in capsys.readouterr().err
    words = arguments(digits, tmp_path / "resumed", *options)
    run = config_of(words).run_dir
    assert trained(words).weights_sha256 == whole.weights_sha256
    run.result_json.unlink()
    newest = sorted(run.checkpoints.iterdir())
    assert [path.name for path in newest] == ["step_000000042.pt", "step_000000044.pt"]
    newest[-1].unlink()  # step 42 is two steps before the end of the second epoch
    assert trained(words).weights_sha256 == whole.weights_sha256
    random = trained(arguments(digits, tmp_path / "random", *options, "train.order=random", "runtime.loader=stream"))
    assert random.weights_sha256 != whole.weights_sha256
    assert random.signature != whole.signature


def test_a_file_larger_than_the_memory_is_noted_where_random_order_streams_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes(name: str, *overrides: str) -> list[str]:
        trained(arguments(digits, tmp_path / name, "train.epochs=1", *overrides))
        return [line for line in capsys.readouterr().err.splitlines() if "train.order=quasi_random" in line]

    assert notes("enough memory", "runtime.loader=stream") == []
    monkeypatch.setattr("vitpa.data.open.total_memory", lambda: 100_000)
    (note,) = notes("streamed", "runtime.loader=stream")
    assert re.search(r"train\.beton has 0\.0 GiB, more than this node's memory \(0\.0 GiB\)", note)
    assert notes("resident", "runtime.loader=resident") == []  # it is read once
    assert notes("quasi_random", "train.order=quasi_random") == []


def test_accumulated_gradients_are_those_of_the_whole_batch(digits: Path, tmp_path: Path) -> None:
    one = trained(arguments(digits, tmp_path / "one", "train.epochs=1"))
    words = arguments(digits, tmp_path / "four", "train.epochs=1", "runtime.accum_steps=4")
    four = trained(words)
    assert four.signature == one.signature  # how the batch is cut is not part of the experiment
    assert four.val_loss == pytest.approx(one.val_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accum_steps", "loader"), [(2, 2, "resident"), (4, 1, "stream")])
def test_several_processes_train_the_same_run_and_resume(
    digits: Path, tmp_path: Path, processes: int, accum_steps: int, loader: str
) -> None:
    options = ["runtime.cpu_threads=1", "runtime.log_every_steps=1", "model.drop_path_rate=0.2", "runtime.poll_every_steps=1"]
    options += ["augment.hflip=true", "runtime.checkpoint_every_steps=10"]
    alone = arguments(digits, tmp_path / "alone", *options)
    trained(alone)
    more = [f"runtime.accum_steps={accum_steps}", f"runtime.loader={loader}"]
    words = arguments(digits, tmp_path / "several", *options, *more)
    run = config_of(words).run_dir
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "vitpa.train")
    process = start(words, *launcher)
    wait_until(lambda: rows(run) >= 30, process)
    run.stop.write_text('{"reason": "test"}\n')
    wait_for(lambda: process.poll() is not None, poll_s=0.01)
    assert process.returncode == 0, process.communicate()[0]
    process.communicate()
    assert not run.result_json.exists()

    process = start(words, *launcher)
    output = finish(process)[0]
    assert process.returncode == 0, output
    assert "resumed at step" in output
    expected, got = read_metrics(config_of(alone).run_dir.metrics_jsonl), read_metrics(run.metrics_jsonl)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for ours, theirs in zip(got, expected, strict=True):
        name = "val/loss" if "val/loss" in theirs else "train/loss"
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3)


@pytest.mark.slow
def test_stop_file_leaves_a_checkpoint_and_no_result(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(digits, tmp_path, "runtime.poll_every_steps=1", "runtime.log_every_steps=1")
    run = config_of(words).run_dir
    process = start(words)
    wait_until(lambda: rows(run) >= 5, process)
    run.stop.touch()
    wait_for(lambda: process.poll() is not None, poll_s=0.01)
    assert process.returncode == 0
    process.communicate()
    assert not run.result_json.exists()
    newest = load_newest(run)
    assert newest is not None
    assert 5 <= newest[1].progress.step < EPOCHS * EPOCH_STEPS
    exit_record = json.loads(run.attempts()[-1].exit_json.read_text())
    assert exit_record["state"] == "interrupted"
    assert trained(words).attempts == 2  # the same command goes on, whatever the old stop file says


def test_non_finite_loss_stops_with_the_step_named(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(digits, tmp_path, "optim.lr=1e30", "optim.warmup_epochs=0", "optim.grad_clip_norm=null")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "non-finite at step 2 (epoch 0.09)" in error
    assert "lower optim.lr=1e+30" in error
    assert json.loads(config_of(words).run_dir.attempts()[0].exit_json.read_text())["state"] == "failed"


def test_a_damaged_newest_checkpoint_is_passed_over(
    digits: Path, tmp_path: Path, undisturbed: Result, warned: Callable[[str], str]
) -> None:
    words = arguments(digits, tmp_path, "runtime.checkpoint_every_steps=8", "runtime.cpu_threads=1")
    first = trained(words)
    run = config_of(words).run_dir
    run.result_json.unlink()
    newest = sorted(run.checkpoints.iterdir())
    assert [path.name for path in newest] == ["step_000000080.pt", "step_000000088.pt"]  # the two newest are kept
    os.truncate(newest[-1], newest[-1].stat().st_size // 2)
    assert trained(words).weights_sha256 == first.weights_sha256 == undisturbed.weights_sha256
    warned(r"step_000000088.pt: it does not end as a checkpoint does")


def test_a_disk_that_does_not_answer_costs_no_progress(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(digits, tmp_path)
    run = config_of(words).run_dir
    assert main([*words, "runtime.stop_after_epoch=1"]) == 0
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}

    def fail(path: Path, _: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("vitpa.checkpoint_file.read_bytes", fail)
        assert main([*words, "runtime.stop_after_epoch=2"]) == 1
    line = capsys.readouterr().err
    assert re.search(r"step_000000022\.pt: cannot be read \(Input/output error\); all is left as it is", line)
    assert line.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before
    assert main([*words, "runtime.stop_after_epoch=2"]) == 0
    assert f"resumed at step {EPOCH_STEPS}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["zeroed", "digit", "gone", "line", "checkpoint without checksum"])
def test_damaged_metrics_are_said_and_restored_from_the_checkpoint(
    digits: Path, tmp_path: Path, damage: str, warned: Callable[[str], str]
) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1", "runtime.log_every_steps=2", "runtime.cpu_threads=1")
    reference, run = trained(words), config_of(words).run_dir
    expected, path = run.metrics_jsonl.read_bytes(), run.metrics_jsonl
    run.result_json.unlink()
    if damage == "checkpoint without checksum":  # as commit 89b4f68 wrote it
        newest = load_newest(run)
        assert newest is not None
        state = newest[1].state()
        del state["metrics"], state["progress"]["wall_time_s"]
        torch.save(state, newest[0])
        match = "carries no checksum of its own"
    else:
        lines = expected.splitlines(keepends=True)
        changed = {
            "zeroed": bytes(len(expected)),
            "digit": expected.replace(b'"train/loss": 2', b'"train/loss": 3', 1),
            "gone": b"",
            "line": b"".join(lines[:3] + lines[4:]),
        }[damage]
        assert changed != expected
        path.write_bytes(changed)
        line = {"line": 4}.get(damage, 1)
        match = (
            f"metrics.jsonl: damaged, cut or edited from line {line} on; its rows up to step 22 are restored from the check"
        )
    again = trained(words)
    warned(match)
    assert again.weights_sha256 == reference.weights_sha256
    assert path.read_bytes() == expected


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, "train.epochs=400")
    run = config_of(words).run_dir
    process = start(words)
    try:
        wait_until(lambda: rows(run) >= 1, process)
        for takeover in ("false", "true"):  # nobody's word takes a run from a process that is seen alive
            assert main([*words, f"runtime.takeover={takeover}"]) == 1
            assert f"this run is being trained by process {process.pid}" in capsys.readouterr().err
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
        output = finish(start(words, *launcher))[0]
        assert output.count(f"this run is being trained by process {process.pid}") == 1
        assert "DistNetworkError" not in output and "Connection closed" not in output
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch_size=1500", r"train.global_batch_size=1500 is more than the 1437 training images"),
        (
            "augment.mixup_alpha=1 train.global_batch_size=33",
            r"mix images in pairs: make train.global_batch_size / runtime.accum_steps=33 even",
        ),
        ("optim.lrr=1", r"unknown key optim.lrr; did you mean optim.lr\?"),
        ("dataset=digit", r"digits"),
        ("runtime.loader=resident augment.crop=random_resized", r"runtime.loader=resident takes whole images"),
        ("runtime.loader=resident model.img_size=16", r"runtime.loader=stream"),
        ("runtime.loader=resident train.order=quasi_random", r"train.order=quasi_random is for images that are streamed; "),
        ("runtime.loader=stream runtime.decoder=gpu", r"runtime.decoder=gpu: there is no GPU; set runtime.decoder=cpu$"),
    ],
)
def test_errors_are_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(arguments(digits, tmp_path, *override.split())) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("vitpa train: ")
    assert "\n" not in error
    assert re.search(message, error), error


@pytest.mark.parametrize(("place", "reason"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_a_root_that_cannot_be_a_folder(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    assert main(arguments(digits, tmp_path / place)) == 1
    root = f"runtime.root={tmp_path / place}"
    assert capsys.readouterr().err == f"vitpa train: {root}: cannot be made a folder ({reason}); name another one\n"


def test_other_data_than_the_checkpoints_is_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(digits, tmp_path)
    trained(words)
    run = config_of(words).run_dir
    run.result_json.unlink()
    newest = load_newest(run)
    assert newest is not None
    path, state = newest
    assert path.name == "step_000000088.pt"
    checkpoint.save(run, state.model_copy(update={"beton_sha256": {**state.beton_sha256, "train": "0" * 64}}))
    assert main(words) == 1
    assert "was trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize("step", [20, 1024])  # of 22
def test_other_data_is_refused_also_where_they_make_another_number_of_steps(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1")
    trained(words)
    run = config_of(words).run_dir
    run.result_json.unlink()
    newest = load_newest(run)
    assert newest is not None
    path, state = newest
    other = {
        "beton_sha256": {"train": "0" * 64, "val": "1" * 64},
        "progress": state.progress.model_copy(update={"step": step, "val": {}}),
    }
    checkpoint.save(run, state.model_copy(update=other))
    path.unlink(missing_ok=True)
    before = sorted(run.checkpoints.iterdir())
    capsys.readouterr()
    assert main(words) == 1
    told = capsys.readouterr().err
    assert f"was trained on other data than {digits}/digits holds now; restore that data, or remove {run.path}" in told
    assert told.count("\n") == 1
    assert sorted(run.checkpoints.iterdir()) == before


def test_a_start_from_0_believes_no_snapshots_of_an_earlier_training(
    digits: Path, tmp_path: Path, warned: Callable[[str], str]
) -> None:
    words = arguments(digits, tmp_path, "runtime.keep_epochs=[1,2]")
    run = config_of(words).run_dir
    for epoch in (1, 2):
        assert main([*words, f"runtime.stop_after_epoch={epoch}"]) == 0
    assert load_run(run.path).epochs() == [0, 1, 2]
    (run.checkpoints / f"step_{2 * EPOCH_STEPS:09d}.pt").unlink()  # as after a kill before that was written
    assert load_run(run.path).epochs() == [0, 1], "the one beyond it is not believed"
    with pytest.raises(RunError, match="no weights of epoch 2 were kept, only of 0, 1;"):
        load_run(run.path).model(2)
    shutil.rmtree(run.checkpoints)
    before = {path.name for path in run.snapshots.iterdir()}
    assert main([*arguments(digits, tmp_path), "runtime.stop_after_epoch=2"]) == 0
    warned("snapshots: 2 snapshots of an earlier training beyond step 0 passed over")
    assert load_run(run.path).epochs() == [0, 2]
    assert {path.name for path in run.snapshots.iterdir()} == {f"passed_over_{name}" for name in before}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which a training's checkpoint finds no room."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(root)], check=False)
    if mounted.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    yield root
    subprocess.run(["umount", str(root)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_training_outlasts_a_full_disk(digits: Path, tmp_path: Path, small_disk: Path, tensorboard: str) -> None:
    log_every, width = "runtime.log_every_steps=1", ("model.embed_dim=32", "runtime.cpu_threads=1")
    options = ["runtime.checkpoint_every_steps=10", f"runtime.tensorboard={tensorboard}", log_every]
    words = arguments(digits, small_disk, *options, *width)
    process = start(words)
    assert process.stdout is not None
    assert any("no space left for a checkpoint" in line for line in process.stdout), process.wait()
    run = config_of(words).run_dir
    with pytest.raises(subprocess.TimeoutExpired):  # its last checkpoint waits, and result.json with it
        process.wait(5)
    assert not run.result_json.exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    output = finish(process)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "there is space again, and the checkpoint is written\n" in output
    if tensorboard == "true":
        board = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
        assert len(board.Scalars("train/loss")) == EPOCHS * EPOCH_STEPS
    result, reference = run.result(), trained(arguments(digits, tmp_path, log_every, *width))
    assert result is not None
    assert (result.weights_sha256, result.attempts) == (reference.weights_sha256, 1)
    assert losses(run) == losses(config_of(arguments(digits, tmp_path, log_every, *width)).run_dir)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_training_that_is_stopped_on_a_full_disk_says_so(digits: Path, small_disk: Path) -> None:
    options = ["runtime.checkpoint_every_steps=10", "runtime.poll_every_steps=1", "train.epochs=1000"]
    words = arguments(digits, small_disk, *options, "model.embed_dim=32", "runtime.cpu_threads=1")
    process = start(words)
    assert process.stdout is not None
    assert any("no space left for a checkpoint" in line for line in process.stdout), process.wait()
    config_of(words).run_dir.stop.touch()
    output = finish(process)[0]
    assert process.returncode == 1, output
    assert re.search(r"vitpa train: /\S+: No space left on device; free some space and start again\n", output)
    assert "Traceback" not in output


def losses(run: RunDir) -> list[tuple[int, float, float]]:
    """What metrics.jsonl says of the training, without times."""
    return [(row["step"], row.get("train/loss", 0.0), row.get("val/loss", 0.0)) for row in metrics(run)]


def test_a_checkpoint_of_another_run_is_passed_over(
    digits: Path, tmp_path: Path, undisturbed: Result, warned: Callable[[str], str]
) -> None:
    words = arguments(digits, tmp_path, "runtime.cpu_threads=1")
    other = [*words, "seed=5"]
    trained(other)
    run = config_of(words).run_dir
    run.checkpoints.mkdir(parents=True)
    newest = sorted(config_of(other).run_dir.checkpoints.iterdir())[-1]
    (run.checkpoints / newest.name).write_bytes(newest.read_bytes())
    assert trained(words).weights_sha256 == undisturbed.weights_sha256
    warned(rf"{newest.name}: it is a checkpoint of another run \({config_of(other).signature}\)")


@pytest.mark.slow
def test_a_stop_that_cancels_is_recorded_as_such(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "runtime.poll_every_steps=1", "runtime.log_every_steps=1", "train.epochs=100")
    run = config_of(words).run_dir
    process = start(words)
    wait_until(lambda: rows(run) >= 5, process)
    run.stop.write_text('{"reason": "cancel"}\n')
    wait_for(lambda: process.poll() is not None, poll_s=0.01)
    assert process.returncode == 0
    process.communicate()
    exit_record = json.loads(run.attempts()[-1].exit_json.read_text())
    assert exit_record["state"] == "cancelled"
    environment = json.loads(run.attempts()[-1].env_json.read_text())
    assert environment == json.loads(run.env_json.read_text())
