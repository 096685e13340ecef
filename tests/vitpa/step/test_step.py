"""Seeds trained together on the digits: each as if it were alone, whatever happens to it or to the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch.nn import functional as F

from tests.support.checkpoints import load_newest
from tests.support.trainings import EPOCH_STEPS, EPOCHS, arguments, config_of, metrics, result_of, start
from tests.support.waiting import finish, run_to_end
from vitpa import checkpoint
from vitpa.config import RunConfig
from vitpa.config_file import load_config
from vitpa.data.augment.mixup import Mixup
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path
from vitpa.data.resident import decoded
from vitpa.data.rng import Purpose, key, permutation
from vitpa.datasets import facts_of
from vitpa.distributed import Group
from vitpa.logs import Logs
from vitpa.models import build_model
from vitpa.optim import adamw, learning_rates
from vitpa.rundir import AttemptDir, Result, RunDir
from vitpa.step.step import ReplicaSteps
from vitpa.train import set_up
from vitpa.train_command import main

SEEDS = [0, 1, 2]
STEPS = EPOCHS * EPOCH_STEPS
OPTIONS = [
    "runtime.cpu_threads=1",
    "runtime.log_every_steps=1",
    "runtime.poll_every_steps=1",
    "runtime.checkpoint_every_steps=10",
]
HALFWAY = 46  # a step in the middle of an epoch
AUGMENTED = ["augment.policy=autoaugment_cifar10", "augment.crop=padded", "augment.crop_padding_px=1", "augment.hflip=true"]
FAST = ["train.epochs=3", "optim.lr=1e-2"]  # the weights go far from where they were


def together(words: list[str], seeds: Sequence[int] = SEEDS) -> int:
    """Train these seeds in one step, in this process; the exit code."""
    return main([*words, "--seeds", ",".join(map(str, seeds))])


def run_of(words: list[str], seed: int) -> RunDir:
    return config_of([*words, f"seed={seed}"]).run_dir


def runs_of(words: list[str]) -> list[RunDir]:
    return [run_of(words, seed) for seed in SEEDS]


def attempt_of(words: list[str], seed: int) -> AttemptDir:
    return run_of(words, seed).attempts()[-1]


def exit_of(words: list[str], seed: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(attempt_of(words, seed).exit_json.read_text())
    return record


def weights_of(run: RunDir) -> dict[str, Tensor]:
    newest = load_newest(run)
    assert newest is not None
    weights: dict[str, Tensor] = newest[1].model
    return weights


def check_same(words: list[str], reference: list[str], seeds: Sequence[int] = SEEDS) -> None:
    """These runs ended with the same bits as those of `reference`, by the same curve."""
    for seed in seeds:
        ours, theirs = (result_of([*each, f"seed={seed}"]) for each in (words, reference))
        assert ours.weights_sha256 == theirs.weights_sha256, f"seed {seed}"
        assert scores(ours) == scores(theirs)
        assert metrics(run_of(words, seed)) == metrics(run_of(reference, seed))


def scores(result: Result) -> tuple[Any, ...]:
    return result.seed, result.steps, result.val_top1, result.val_top5, result.val_loss


@contextmanager
def stops(files: Mapping[Path, str], at_step: int) -> Iterator[None]:
    """In a run that writes a row and looks for `stop` at every step: these files appear for the stop after `at_step` steps."""
    original = Logs.row

    def row(logs: Logs, step: int, epoch: float, values: Mapping[str, float]) -> None:
        original(logs, step, epoch, values)
        if step == at_step - 1:  # it is written after the next step
            for file, content in files.items():
                file.write_text(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logs, "row", row)
        yield


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of three runs that were trained together to their end."""
    words = arguments(digits, tmp_path_factory.mktemp("undisturbed"), *OPTIONS)
    assert together(words) == 0
    return words


@pytest.fixture(scope="module")
def stopped(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs whose stop was requested halfway, with checkpoints of two steps."""
    root = tmp_path_factory.mktemp("stopped")
    words = arguments(digits, root, *OPTIONS)
    with stops({run.stop: '{"reason": "test"}\n' for run in runs_of(words)}, HALFWAY):
        assert together(words) == 0
    for seed, run in enumerate(runs_of(words)):
        assert run.checkpoint_steps() == {40, HALFWAY}
        assert not run.result_json.exists()
        assert exit_of(words, seed)["state"] == "interrupted"
        assert not attempt_of(words, seed).left_json.exists()  # they did not leave one another
    return root


@pytest.fixture
def halfway(digits: Path, tmp_path: Path, stopped: Path) -> list[str]:
    """The arguments of a copy of those runs."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return arguments(digits, tmp_path, *OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_each_seed_is_trained_as_if_it_were_alone(
    digits: Path, tmp_path: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"model.attention={attention}", *AUGMENTED, *FAST, "runtime.log_every_steps=1"]
    options += ["runtime.cpu_threads=1", "runtime.tensorboard=true"]
    words, alone = (arguments(digits, tmp_path / name, *options) for name in ("together", "alone"))
    assert together(words) == 0
    for seed in SEEDS:
        assert main([*alone, f"seed={seed}"]) == 0
    different = set()
    for seed in SEEDS:
        run, reference = run_of(words, seed), run_of(alone, seed)
        ours, theirs = weights_of(run), weights_of(reference)
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            # not bit for bit: on some CPUs the order of a sum depends on how many replicas there are
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)
        result, other = (result_of([*each, f"seed={seed}"]) for each in (words, alone))
        assert scores(result) == pytest.approx(scores(other), rel=1e-5)
        assert (result.steps, result.attempts, result.signature) == (3 * EPOCH_STEPS, 1, run.signature)
        for ours_row, their_row in zip(metrics(run), metrics(reference), strict=True):
            assert ours_row == pytest.approx(their_row, rel=1e-5)
        different.add(result.weights_sha256)

        recorded = load_config(run.config_yaml)
        assert (recorded.seed, recorded.signature) == (seed, run.signature)
        assert json.loads(run.env_json.read_text())["trained_with_seeds"] == SEEDS
        assert json.loads(reference.env_json.read_text())["trained_with_seeds"] == [seed]
        sizes = [path.stat().st_size for each in (run, reference) for path in each.checkpoints.iterdir()]
        assert max(sizes) < 1.05 * min(sizes)  # a checkpoint does not carry the other replicas
        assert exit_of(words, seed)["state"] == "done"

        boards = [EventAccumulator(str(each.tensorboard)).Reload() for each in (run, reference)]
        curves = [[(event.step, event.value) for event in board.Scalars("train/loss")] for board in boards]
        assert [step for step, _ in curves[0]] == list(range(1, 3 * EPOCH_STEPS + 1))
        for ours_point, their_point in zip(*curves, strict=True):
            assert ours_point == pytest.approx(their_point, rel=1e-5)
        images = [[event.encoded_image_string for event in board.Images("augmented")] for board in boards]
        assert images[0] == images[1]
        assert len(boards[0].Images("positional_similarity")) == len(boards[1].Images("positional_similarity")) > 0
    assert len(different) == len(SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "more"),
    [
        ("content", []),
        ("positional", []),
        ("positional", ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1.0"]),
        ("content", ["model.global_pool=avg"]),
    ],
)
def test_a_group_computes_what_timms_module_and_torchs_adamw_do(
    digits: Path, tmp_path: Path, attention: str, more: list[str]
) -> None:
    """Against a training written out here: the module, autograd, clipping and optimiser that everybody uses.

    The bias of the keys is left out: its gradient is 0, and what rounding makes of that AdamW scales to a step of full size.
    """
    options = [f"model.attention={attention}", *AUGMENTED, *more, *FAST, "runtime.cpu_threads=1"]
    words = arguments(digits, tmp_path, *options)
    assert together(words) == 0
    key_bias = slice(16, 32)
    for seed in SEEDS:
        config = config_of([*words, f"seed={seed}"])
        ours, model = weights_of(config.run_dir), trained_in_the_usual_way(config, digits)
        theirs = model.state_dict()
        for name, value in ours.items():
            if name.endswith((".qkv.bias", ".qk.bias")):
                assert torch.count_nonzero(value[key_bias]) == 0  # as they were
                value[key_bias] = theirs[name][key_bias]
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=name)


def trained_in_the_usual_way(config: RunConfig, data: Path) -> VisionTransformer:
    beton = Beton.open(beton_path(data, "digits", "train"))
    images, labels = decoded(beton, 8)
    augmentation = Augmentation([config.augment], facts_of("digits"), img_size=8, device=torch.device("cpu"))
    model = build_model(**dict(config.model), num_classes=10, seed=key(config.seed, Purpose.INIT))
    optim, batch_size = config.optim, config.train.global_batch_size
    optimizer = adamw(model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, fused=False)
    rates = learning_rates([config], EPOCH_STEPS)[:, 0].tolist()
    for step in range(config.train.epochs * EPOCH_STEPS):
        epoch, number = divmod(step, EPOCH_STEPS)
        order = permutation(key(config.seed, Purpose.ORDER, epoch), len(labels))
        samples = order[number * batch_size : (number + 1) * batch_size]
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        keys = epoch_keys([config.seed], epoch)
        batch, targets = augmentation(images[samples], samples, keys), F.one_hot(labels[samples], 10).float()
        if config.augment.mixes:
            batch, partners, share = Mixup([config.augment], device=batch.device)(batch, labels[samples], samples, keys)
            targets = share[:, None] * targets + (1 - share[:, None]) * F.one_hot(partners, 10).float()
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets, label_smoothing=optim.label_smoothing).backward()
        assert optim.grad_clip_norm is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip_norm)
        optimizer.step()
    return model


KILLED = """
import json, os, signal, sys
from pathlib import Path
from vitpa.logs import Logs
from vitpa.train_command import main

def killing(function, counts, left):
    def instead(self, *arguments, **folders):
        nonlocal left
        left -= counts(*arguments)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(self, *arguments, **folders)
    return instead

for what, count in json.loads(sys.argv[1]):
    child = os.fork()  # it need not import everything again
    if not child:
        os.replace = killing(os.replace, lambda target: Path(target).match(what), count)
        Logs.row = killing(Logs.row, lambda *_: what == "row", count)
        os._exit(main(sys.argv[2:]))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (what, status)
    print("killed at", what, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_group_ends_bit_identical(digits: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    words = arguments(digits, tmp_path, *OPTIONS)
    moments = [
        ["row", 20],  # before the first checkpoint; seed 0 has written a row that seed 1 has not
        ["step_*.pt", 5],  # seed 0 has a checkpoint of step 20, the others of step 10; a whole temporary file is left
        ["row", 110],  # seeds 0 and 1 have rows after the last checkpoint that seed 2 has not
        ["step_*.pt", 9],  # seeds 0 and 1 are one checkpoint ahead
        ["result.json", 2],  # seed 0 is finished
    ]
    command = [sys.executable, "-c", KILLED, json.dumps(moments), *words, "--seeds", "0,1,2"]
    process = run_to_end(command)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("killed at") == len(moments)
    resumed = re.findall(r"digits-content-s0,1,2: (?:starts|resumed) at step (\d+) of", process.stderr)
    assert resumed == ["0", "0", "10", "40", "60"], process.stderr  # what all had at each moment
    runs = runs_of(words)
    assert [run.result_json.exists() for run in runs] == [True, False, False]
    assert together(words) == 0
    check_same(words, undisturbed)
    assert [result_of([*words, f"seed={seed}"]).attempts for seed in SEEDS] == [5, 6, 6]
    assert [len(run.attempts()) for run in runs] == [5, 6, 6]


def test_a_group_whose_stop_was_requested_goes_on_as_a_group(
    halfway: list[str], undisturbed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert together(halfway) == 0
    assert f"resumed at step {HALFWAY} of {STEPS}" in capfd.readouterr().err
    check_same(halfway, undisturbed)
    assert [result_of([*halfway, f"seed={seed}"]).attempts for seed in SEEDS] == [2, 2, 2]


def test_a_group_whose_stop_was_requested_goes_on_one_by_one(halfway: list[str], undisturbed: list[str]) -> None:
    for seed in (2, 0):
        assert main([*halfway, f"seed={seed}"]) == 0
    check_same(halfway, undisturbed, [2, 0])


@pytest.mark.slow
def test_a_row_that_was_begun_before_the_stop_is_that_of_all_its_steps(digits: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "runtime.log_every_steps=9"]
    words, reference = (arguments(digits, tmp_path / name, *options) for name in ("stopped", "reference"))
    with stops({run.stop: "{}" for run in runs_of(words)}, 28):  # the row of step 36 is one step old
        assert together(words) == 0
    assert [run.newest_step() for run in runs_of(words)] == [28] * 3
    assert together(words) == together(reference) == 0
    check_same(words, reference)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_they_go_on_from_the_newest_step_that_all_have(
    halfway: list[str], undisturbed: list[str], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = run_of(halfway, 1).checkpoints / f"step_{HALFWAY:09d}.pt"
    if damage == "gone":
        newest.unlink()
        assert together(halfway) == 0
    else:
        os.truncate(newest, newest.stat().st_size // 2)
        assert together(halfway) == 0
    told = capfd.readouterr().err
    assert (f"{newest.name}: it does not end as a checkpoint does" in told) == (damage == "cut")
    assert f"resumed at step 40 of {STEPS}" in told
    check_same(halfway, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "damaged"),
    [([(1, 40), (1, HALFWAY)], []), ([(1, HALFWAY), (2, 40)], []), ([], [(1, 40), (1, HALFWAY)])],
    ids=["one has none", "no step in common", "one has none that can be read"],
)
def test_one_without_a_common_step_is_left_out_and_goes_on_apart(
    halfway: list[str],
    undisturbed: list[str],
    gone: list[tuple[int, int]],
    damaged: list[tuple[int, int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for seed, step in gone:
        (run_of(halfway, seed).checkpoints / f"step_{step:09d}.pt").unlink()
    for seed, step in damaged:
        (run_of(halfway, seed).checkpoints / f"step_{step:09d}.pt").write_text("hi")
    assert together(halfway) == 0
    reason = f"the others go on from step {HALFWAY}, where it has no checkpoint that can be read; train it apart from them"
    assert f"seed 1 is left out: {reason}\n" in capfd.readouterr().err
    assert [exit_of(halfway, seed)["state"] for seed in SEEDS] == ["done", "interrupted", "done"]
    assert exit_of(halfway, 1)["reason"] == reason
    check_same(halfway, undisturbed, [0, 2])
    assert not run_of(halfway, 1).result_json.exists()
    assert main([*halfway, "seed=1"]) == 0
    check_same(halfway, undisturbed, [1])


def poison(run: RunDir) -> None:
    """Weights of the newest checkpoint become so large that the next loss is not finite."""
    newest = load_newest(run)
    assert newest is not None
    newest[1].model["blocks.1.mlp.fc1.weight"].fill_(3e38)
    checkpoint.save(run, newest[1])


@pytest.mark.parametrize("log_every_steps", [1, 1000])
def test_a_seed_that_is_not_finite_is_frozen_and_the_others_go_on(
    halfway: list[str], undisturbed: list[str], log_every_steps: int, capfd: pytest.CaptureFixture[str]
) -> None:
    poison(run_of(halfway, 1))
    others = [word for word in halfway if not word.startswith("runtime.log_every_steps=")]
    assert together([*others, f"runtime.log_every_steps={log_every_steps}"]) == 1
    error = capfd.readouterr().err
    run, step = run_of(halfway, 1), HALFWAY + 1
    reason = f"{run.path}: the loss or its gradient became non-finite at step {step} (epoch {step / EPOCH_STEPS:.2f}); "
    assert error.count(f"seed 1 is not trained any more, the others go on: {reason}") == 1
    assert error.strip().splitlines()[-1].startswith(f"vitpa train: 1 of 3 runs have failed: {reason}")
    left = json.loads(attempt_of(halfway, 1).left_json.read_text())
    assert (left["state"], left["reason"].startswith(reason)) == ("failed", True)
    record = exit_of(halfway, 1)
    assert (record["state"], record["reason"]) == ("failed", left["reason"])
    assert not run.result_json.exists()
    assert run.newest_step() == HALFWAY  # NaN never came into a checkpoint of ours
    assert "NaN" not in run.metrics_jsonl.read_text()
    assert max(row["step"] for row in metrics(run)) <= HALFWAY
    for seed in (0, 2):
        assert exit_of(halfway, seed)["state"] == "done"
        assert not attempt_of(halfway, seed).left_json.exists()
        ours, theirs = (result_of([*words, f"seed={seed}"]) for words in (halfway, undisturbed))
        assert (ours.weights_sha256, scores(ours)) == (theirs.weights_sha256, scores(theirs))
    if log_every_steps == 1:
        check_same(halfway, undisturbed, [0, 2])


def test_with_no_finite_seed_left_it_ends(halfway: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for run in runs_of(halfway):
        poison(run)
    assert together(halfway) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vitpa train: ")
    assert last.count(f"became non-finite at step {HALFWAY + 1} ") == 1
    assert last.endswith("; so did 2 more of the runs trained together")
    for seed, run in enumerate(runs_of(halfway)):
        assert not run.result_json.exists()
        assert run.newest_step() == HALFWAY
        record = exit_of(halfway, seed)
        assert record["state"] == "failed"
        assert str(run.path) in record["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "state"), [('{"reason": "deadline"}\n', "interrupted"), ('{"reason": "cancel"}\n', "cancelled")]
)
def test_a_seed_whose_stop_is_requested_leaves_and_is_finished_alone(  # noqa: PLR0917 - fixtures
    digits: Path, tmp_path: Path, undisturbed: list[str], content: str, state: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, *OPTIONS)
    run = run_of(words, 1)
    with stops({run.stop: content}, 33):
        assert together(words) == 0  # a seed that was stopped is no failure
    assert "seed 1 is not trained any more, the others go on: stopped at step 33" in capfd.readouterr().err
    check_same(words, undisturbed, [0, 2])
    assert not run.result_json.exists()
    assert run.newest_step() == 33
    assert json.loads(attempt_of(words, 1).left_json.read_text())["state"] == "stopped"
    assert [exit_of(words, seed)["state"] for seed in SEEDS] == ["done", state, "done"]

    assert main([*words, "seed=1"]) == 0
    assert f"resumed at step 33 of {STEPS}" in capfd.readouterr().err
    check_same(words, undisturbed)
    assert result_of([*words, "seed=1"]).attempts == 2
    assert exit_of(words, 1)["state"] == "done"


def test_a_seed_that_has_left_is_not_trained_any_more(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, seen = arguments(digits, tmp_path, *OPTIONS, "train.epochs=2"), []
    freeze = ReplicaSteps.freeze

    def seen_freezing(steps: ReplicaSteps, replica: int) -> None:
        seen.append(steps)
        freeze(steps, replica)

    monkeypatch.setattr(ReplicaSteps, "freeze", seen_freezing)
    with stops({run_of(words, 1).stop: "{}"}, 15):
        assert together(words) == 0
    (steps,) = seen
    for seed in SEEDS:  # as they were in the newest checkpoint
        last = steps.adamw.of_replica(steps.adamw.values, seed)
        saved = weights_of(run_of(words, seed))
        assert all(torch.equal(value, saved[name]) for name, value in last.items())


@pytest.mark.slow
def test_seeds_that_leave_one_after_the_other(digits: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    words = arguments(digits, tmp_path, *OPTIONS)
    with (
        stops({run_of(words, 0).stop: "{}"}, 12),
        stops({run_of(words, 2).stop: "{}"}, 30),
        stops({run_of(words, 1).stop: "{}"}, 50),
    ):
        assert together(words) == 0
    assert [run.newest_step() for run in runs_of(words)] == [12, 50, 30]
    assert [exit_of(words, seed)["state"] for seed in SEEDS] == ["interrupted"] * 3
    for seed in SEEDS:
        assert main([*words, f"seed={seed}"]) == 0
    check_same(words, undisturbed)


@pytest.mark.slow
def test_finished_seeds_are_left_out(
    digits: Path, tmp_path: Path, undisturbed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, *OPTIONS)
    assert main([*words, "seed=1"]) == 0
    first = run_of(words, 1).result_json.read_bytes()
    assert together(words) == 0
    assert f"{run_of(words, 1).result_json}: the run is finished already" in capfd.readouterr().err
    check_same(words, undisturbed)
    assert run_of(words, 1).result_json.read_bytes() == first
    assert json.loads(run_of(words, 2).env_json.read_text())["trained_with_seeds"] == [0, 2]
    assert together(words) == 0  # nothing is left to do
    assert capfd.readouterr().err.count("the run is finished already") == 3
    assert [len(run.attempts()) for run in runs_of(words)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("1,2,1", "1,2,1: a seed comes up twice"),
        ("1,two", "'1,two': expected whole numbers from 0 up with commas between"),
        ("", "'': expected whole numbers from 0 up with commas between"),
    ],
)
def test_seeds_that_are_no_list_of_seeds(
    digits: Path, tmp_path: Path, seeds: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(digits, tmp_path), "--seeds", seeds])
    assert f"argument --seeds: {message}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_seed_and_seeds_contradict_each_other(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(digits, tmp_path), "--seeds", "0,1", "seed=7"]) == 1  # overrides may come after the option, too
    assert capsys.readouterr().err == "vitpa train: seed=7 and --seeds: say one of the two\n"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["runtime.loader=stream"], "runtime.loader=stream: "),
        (["augment.crop=random_resized"], "augment.crop=random_resized: "),
        (["model.img_size=16"], "their images do not stay on the device"),
    ],
)
def test_what_cannot_be_trained_together_is_one_line(
    digits: Path, tmp_path: Path, overrides: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert together(arguments(digits, tmp_path, *overrides)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"vitpa train: 3 runs cannot be trained together: {reason}")
    assert error.endswith("; train them one by one")
    assert "\n" not in error


def test_one_seed_is_trained_in_either_way(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1")
    assert together([*words, "runtime.loader=stream"], [1]) == 0
    assert result_of([*words, "seed=1"]).seed == 1


@pytest.mark.slow
def test_several_processes_do_not_take_several_seeds(digits: Path, tmp_path: Path) -> None:
    words = [*arguments(digits, tmp_path, "runtime.cpu_threads=1"), "--seeds", "0,1"]
    process = start(words, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
    output = finish(process)[0]
    assert process.returncode == 1
    assert output.count("vitpa train: several runs are trained together by one process, without torchrun") == 1


def test_images_that_do_not_fit_are_streamed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitpa.data.open.RESIDENT_SHARE", 0.0)
    words = arguments(digits, tmp_path, "train.epochs=1")
    assert main(words) == 0
    error = capfd.readouterr().err
    assert f"that are free on cpu: they are streamed from {digits}" in error
    assert error.count("the images take 0.00 GiB, more than 0 % of the ") == 1
    assert "(streamed images, evaluated on val)" in error
    assert together(words, [1, 2]) == 1
    assert "2 runs cannot be trained together: their images do not stay on the device" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "seeds"), [("content", SEEDS), ("positional", [0])])
def test_a_block_is_compiled_once_whatever_the_depth(
    digits: Path, tmp_path: Path, attention: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {"forward": 0, "backward": 0}

    def counted(kind: str, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs[kind] += 1
        return nop(graph, examples)

    backend = aot_autograd(fw_compiler=partial(counted, "forward"), bw_compiler=partial(counted, "backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    options = [f"model.attention={attention}", "train.precision=bfloat16", "runtime.step=compile", "model.drop_path_rate=0.1"]
    for depth in (2, 4):
        torch._dynamo.reset()
        graphs |= {"forward": 0, "backward": 0}
        words = arguments(digits, tmp_path, *options, f"model.depth={depth}", "runtime.cpu_threads=1")
        steps = set_up([config_of([*words, f"seed={seed}"]) for seed in seeds], Group(0, 1, 0, 1, torch.device("cpu"))).steps
        assert steps.prepare(0) == []
        # the batch, the network's three parts, loss, count and update; without the last two, and without gradients
        assert graphs == {"forward": 7 + 5, "backward": 4}, f"depth {depth}"
        steps.begin_epoch(0, 0)
        for _ in range(2):
            steps.load()
            steps.step()
        steps.evaluate()
        assert graphs == {"forward": 7 + 5, "backward": 4}, f"depth {depth}: compiled again after the start"


NOT_COMPILED = "the step could not be compiled"


@pytest.mark.slow
def test_a_compiled_step_is_the_same_to_rounding(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["model.depth=3", "train.epochs=2", "runtime.cpu_threads=1"]
    eager, compiled = (arguments(digits, tmp_path / step, *options, f"runtime.step={step}") for step in ("eager", "graph"))
    assert together(eager, [0, 1]) == together(compiled, [0, 1]) == 0
    error = capfd.readouterr().err
    assert error.count("runtime.step=graph: a CPU has no CUDA graphs; compiled instead") == 1
    assert NOT_COMPILED not in error
    for seed in (0, 1):
        ours, theirs = (result_of([*words, f"seed={seed}"]) for words in (compiled, eager))
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-5)
        assert ours.weights_sha256 != theirs.weights_sha256  # the compiler does round in another way: it was at work
        expected = weights_of(run_of(eager, seed))
        for name, value in weights_of(run_of(compiled, seed)).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_without_a_compiler_it_trains_uncompiled_and_says_so(digits: Path, tmp_path: Path) -> None:
    options = ["model.depth=1", "train.epochs=1", "runtime.cpu_threads=1"]
    eager, words = (arguments(digits, tmp_path / step, *options, f"runtime.step={step}") for step in ("eager", "compile"))
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "vitpa.train", *words, "--seeds", "0,1"]
    process = run_to_end(command, env=environment)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if NOT_COMPILED in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{NOT_COMPILED} (") and "); it runs uncompiled, slowly; if files of " in lines[0]
    assert lines[0].endswith(f"delete {tmp_path / 'cache'}")
    assert "C++ compiler" in lines[0]
    assert together(eager, [0, 1]) == 0
    check_same(words, eager, [0, 1])  # trying left no trace


def test_closed_steps_hold_no_graph_and_decode_no_more(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for CUDA graphs that hold its work, so a process with one of them would not end."""

    class Graph:
        left = 2

        def reset(self) -> None:
            Graph.left -= 1

    closed, begin_epoch = [], ReplicaSteps.begin_epoch

    def with_graphs(steps: ReplicaSteps, epoch: int, step: int) -> None:
        begin_epoch(steps, epoch, step)
        monkeypatch.setattr(steps, "_graphs", [Graph(), Graph()])
        monkeypatch.setattr(steps.feed, "close", lambda: closed.append(steps))

    monkeypatch.setattr(ReplicaSteps, "begin_epoch", with_graphs)
    assert main(arguments(digits, tmp_path, *OPTIONS, "train.epochs=1")) == 0
    (steps,) = closed
    assert Graph.left == 0 and steps._graphs == []
    assert steps._run_step == steps._step and steps._run_evaluation == steps._evaluate_batch


def test_what_a_compiler_warns_of_does_not_stop_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def compiler(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        warnings.warn("a module of the compiler is deprecated", DeprecationWarning, stacklevel=1)  # an error in our tests
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    options = ["model.depth=1", "train.epochs=1", "runtime.cpu_threads=1", "runtime.step=compile"]
    assert together(arguments(digits, tmp_path, *options), [0, 1]) == 0
    assert compiled
    assert NOT_COMPILED not in capfd.readouterr().err


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GPU = [
    "runtime.device=cuda",
    "model.embed_dim=64",
    "model.num_heads=2",
    "runtime.log_every_steps=1",
    "runtime.poll_every_steps=1",
]


class TestOnGpu:
    """The CUDA graph: the same numbers to rounding, and the same bits when it is resumed."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("attention", ["content", "positional"])
    def test_graph_compiled_and_eager_agree(
        self, digits: Path, tmp_path: Path, attention: str, precision: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        options = [*GPU, *AUGMENTED, f"model.attention={attention}", f"train.precision={precision}", "train.epochs=2"]
        losses = {}
        for step in ("eager", "compile", "graph"):
            words = arguments(digits, tmp_path / step, *options, f"runtime.step={step}")
            assert together(words) == 0
            losses[step] = [result_of([*words, f"seed={seed}"]).val_loss for seed in SEEDS]
        error = capfd.readouterr().err
        assert NOT_COMPILED not in error
        assert "no CUDA graph of the step could be made" not in error
        bound = 1e-3 if precision == "float32" else 0.02  # 44 steps apart by rounding
        assert losses["compile"] == pytest.approx(losses["eager"], rel=bound)
        assert losses["graph"] == pytest.approx(losses["compile"], rel=1e-3)  # the same kernels

    @pytest.mark.parametrize("attention", ["content", "positional"])
    def test_stopped_and_resumed_it_ends_bit_identical(self, digits: Path, tmp_path: Path, attention: str) -> None:
        options = [*GPU, *AUGMENTED, f"model.attention={attention}", "train.precision=bfloat16"]
        undisturbed, words = (arguments(digits, tmp_path / name, *options) for name in ("undisturbed", "stopped"))
        assert together(undisturbed) == 0
        with stops({run.stop: "{}" for run in runs_of(words)}, HALFWAY):
            assert together(words) == 0
        # a row is written when the device is there, which may be some steps later
        steps = {run.newest_step() for run in runs_of(words)}
        assert len(steps) == 1
        assert HALFWAY <= steps.pop() < STEPS
        assert together(words) == 0
        check_same(words, undisturbed)

    def test_an_epoch_may_have_fewer_steps_than_it_takes_to_warm_up(
        self, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        words = arguments(digits, tmp_path, *GPU, "train.global_batch_size=1000", "train.epochs=2", "runtime.step=graph")
        assert together(words) == 0
        assert "no CUDA graph of the step could be made" not in capfd.readouterr().err
        assert [result_of([*words, f"seed={seed}"]).steps for seed in SEEDS] == [2] * 3

    def test_a_group_is_trained_as_each_alone(self, digits: Path, tmp_path: Path) -> None:
        options = [*GPU, *AUGMENTED, "train.precision=bfloat16", "train.epochs=2"]
        words, alone = (arguments(digits, tmp_path / name, *options) for name in ("together", "alone"))
        assert together(words) == 0
        for seed in SEEDS:
            assert main([*alone, f"seed={seed}"]) == 0
            ours, theirs = (result_of([*each, f"seed={seed}"]) for each in (words, alone))
            assert ours.val_loss == pytest.approx(theirs.val_loss, rel=0.02)
            assert ours.gpu_hours < ours.train_time_s / 3600 / 2  # they share the GPU

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @pytest.mark.parametrize("step", ["compile", "graph"])
    def test_two_gpus_train_the_same_run_and_end(self, digits: Path, tmp_path: Path, step: str) -> None:
        options = [*GPU, *AUGMENTED, "train.precision=bfloat16", "train.epochs=2", f"runtime.step={step}"]
        two, one = (arguments(digits, tmp_path / name, *options) for name in ("two", "one"))
        process = start(two, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
        said = finish(process)[0]
        assert process.returncode == 0, said
        assert main(one) == 0
        assert result_of(two).val_loss == pytest.approx(result_of(one).val_loss, rel=0.02)
