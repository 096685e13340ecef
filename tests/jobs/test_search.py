"""Searches carried out: killed at any time, with failures, on the digits for real; what status and the end say."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.sweep import Sweep, load_sweep
from tests.support.jobs_sweeps import command, launch, settle
from tests.support.repository import ROOT
from tests.support.search_sweeps import ledger_of, make_search
from tests.support.slurm_sweeps import processes_below
from tests.support.waiting import wait_for
from vitpa.cli import main
from vitpa.config_file import load_config
from vitpa.records import made_with

pytestmark = pytest.mark.slow

HALVING: dict[str, Any] = {"budget": {"runs": 4}, "halving": {"epochs": [1, 3]}}


def carried_out(root: Path, *terms: str, code: int = 0) -> str:
    """What `submit --wait` says, to its end."""
    done = launch(root, 2, "submit", "--wait", *terms)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def begun(root: Path) -> subprocess.Popen[bytes]:
    """A `submit --wait` that goes on."""
    line = command(root, 2, "submit", "--wait")
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_all(root: Path, *launchers: subprocess.Popen[bytes]) -> None:
    """End the launcher, the workers and the trainers at once."""
    for launcher in launchers:
        launcher.kill()
        launcher.wait()
    while found := processes_below(root):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def in_training(root: Path) -> int:
    """Attempts that have been started."""
    return len(list(root.glob("runs/*/attempts/*/start.json")))


def now(root: Path) -> Sweep:
    return load_sweep("small", root)


def status_of(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main(["sweep", "status", "small", "--root", str(root), "--json"])
    document = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = document["search"]
    return found


def test_killed_again_and_again_it_ends_with_the_same_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = tmp_path / "undisturbed"
    make_search(undisturbed, **HALVING)
    said = carried_out(undisturbed)
    ledger = ledger_of(undisturbed)
    assert "round 2: 1 goes on to epoch 3, 3 new up to epoch 1" in said
    assert ledger[-1]["trials"] == []

    root = tmp_path / "killed"
    make_search(root, **HALVING)
    for starts in (2, 6):
        launcher = begun(root)
        wait_for(lambda starts=starts: in_training(root) >= starts)  # type: ignore[misc]
        kill_all(root, launcher)
        assert ledger_of(root) == ledger[: len(ledger_of(root))]
    said = carried_out(root)
    assert ledger_of(root) == ledger
    assert "search: over after round" in said
    found = status_of(root, capsys)
    assert found["over"]
    assert found["budget"] == {"runs": 4, "gpu_hours": None}
    assert carried_out(root).count("best so far:") == 1, "nothing is left to do"


def test_round_by_round_without_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_search(tmp_path, seeds=2, epochs=4, budget={"runs": 4}, halving={"epochs": [2]}, trials_at_once=2)
    assert (
        main(["sweep", "plan", str(tmp_path / "small.yaml"), "--root", str(tmp_path), "--data-dir", f"{tmp_path}/data"]) == 0
    )
    text = capsys.readouterr().out
    assert "search (random): 3 trials at most, as much training as 4.0 runs, 2 at a time, x 2 runs; epochs 2 -> 4" in text
    assert "submit would start 4 runs" in text
    assert "would start 4 runs" in launch(tmp_path, 2, "submit", "--dry-run").stdout
    nowhere = launch(tmp_path, 2, "submit", "--data-dir", str(tmp_path))
    assert "digits/train.beton: no such file" in nowhere.stderr
    assert not ledger_of(tmp_path), "what is not begun can still be changed"
    assert "submitted 4 of 4 runs" in launch(tmp_path, 2).stdout
    settle(tmp_path, now(tmp_path))
    assert "round 2: 1 new up to epoch 2" in launch(tmp_path, 2, "submit", "--dry-run").stdout
    assert "submitted 2 of 6 runs" in launch(tmp_path, 2).stdout
    settle(tmp_path, now(tmp_path))
    found = status_of(tmp_path, capsys)
    assert [trial["state"] for trial in found["trials"]] == ["paused"] * 3
    assert "round 3: 1 goes on to epoch 4" in carried_out(tmp_path)
    found = status_of(tmp_path, capsys)
    assert sorted(trial["state"] for trial in found["trials"]) == ["finished", "pruned", "pruned"]
    assert found["gpu_hours"] == pytest.approx((2 * 2 * 2 + 2 * 4) / 100), "as the stand-in says"
    best = found["best"]
    assert main(["sweep", "collect", "small", "--root", str(tmp_path)]) == 0
    assert f"| digits   | content   | {best}  |" in capsys.readouterr().out
    assert main(["sweep", "status", "small", f"trial={best}", "--root", str(tmp_path)]) == 0
    assert "came to epoch: 3 to 2, 1 to 4" in capsys.readouterr().out
    make_search(tmp_path, seeds=2, epochs=4, budget={"runs": 8}, halving={"epochs": [2]}, trials_at_once=2)
    assert "2 new up to epoch 2" in launch(tmp_path, 2, "submit", "--dry-run").stdout, "a larger budget goes on"


def test_failures_wait_for_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_search(tmp_path, budget={"runs": 2}, trials_at_once=3, halving={"epochs": [1]})
    (tmp_path / "fail").mkdir()
    (tmp_path / "fail" / sweep.runs[1].signature).touch()
    said = carried_out(tmp_path, code=4)
    assert "runs of t001 failed or were cancelled, and the search waits: vitpa sweep retry" in said
    assert len(ledger_of(tmp_path)) == 1
    (tmp_path / "fail" / sweep.runs[1].signature).unlink()
    launch(tmp_path, 2, "retry", "--wait")
    assert main(["sweep", "status", "small", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "search: in round 1; 3 trials: 3 paused" in text
    assert "best so far: t0" in text


def test_the_search_goes_on_without_what_is_given_up(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, budget={"runs": 2}, trials_at_once=3, halving={"epochs": [1]})
    (tmp_path / "fail").mkdir()
    (tmp_path / "fail" / sweep.runs[1].signature).touch()
    said = carried_out(tmp_path, "--give-up")
    assert "t001 is given up: digits-content-t001-s0 failed: RuntimeError: the test wants this run to fail" in said
    assert ledger_of(tmp_path)[1]["out"].keys() == {"1"}
    assert "1 given up" in said


def test_the_search_says_where_runs_pause(tmp_path: Path) -> None:
    make_search(tmp_path)
    done = launch(tmp_path, 2, "submit", "runtime.stop_after_epoch=2")
    assert done.returncode == 1
    assert "runtime.stop_after_epoch=2: where runs pause is for search.halving to say; leave it out" in done.stderr


DIGITS = """
name: small
recipes: [digits]
attentions: [content]
seeds: [0, 1]
overrides: {train.holdout: 0.2, train.epochs: 3, train.global_batch_size: 16, model.depth: 1, optim.warmup_epochs: 0}
search:
  space: {optim.lr: {low: 5.0e-4, high: 5.0e-2, log: true}, optim.weight_decay: [0.0, 0.05]}
  halving: {epochs: [2]}
  budget: {runs: 4}
"""


def test_on_the_digits(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in its midst, it goes on to its end. The command it ends with trains on all of train.

    The two seeds of a trial share a step.
    """
    root = tmp_path
    (root / "small.yaml").write_text(DIGITS)
    (root / "profile.yaml").write_text(
        f"slots: 1\nreplicas: 2\nruntime: {{device: cpu, data_dir: {digits}, tensorboard: false}}\n"
    )
    words = ["sweep", "submit", str(root / "small.yaml"), "--root", str(root), "--profile", str(root / "profile.yaml")]
    assert main(words) == 0
    wait_for(now(root).runs[1].directory(root).metrics_jsonl.exists)
    kill_all(root)
    capsys.readouterr()
    assert main([*words, "--wait"]) == 0
    ledger = ledger_of(root)
    assert [len(each["trials"]) for each in ledger] == [2, 1, 0]
    together = {tuple(made_with(run.directory(root).env_json)["trained_with_seeds"]) for run in now(root).runs}
    assert together == {(0, 1)}
    said = capsys.readouterr().out
    best = now(root).ledger.trials[ledger[1]["trials"][0]["number"]]  # type: ignore[union-attr]
    first, second = (100 * score for score in best.scores[3])
    of = f"best so far: {best.label} {(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f} % held-out top-1"
    assert f"{of} (epoch 3 of 3, 2 runs, 0.00 GPU-hours): optim.lr={best.values['optim.lr']}" in said
    line = next(line for line in said.splitlines() if line.startswith("  vitpa sweep submit digits"))
    chosen = shlex.split(line)[1:]
    assert main([*chosen, "--dry-run"]) == 0
    assert "would start 2 runs" in capsys.readouterr().out
    assert main(chosen) == 0  # where the search ran: the data are named by its profile
    config = next((root / "sweeps/small-chosen/by-name").iterdir()) / "config.yaml"
    trained = load_config(config)
    assert (trained.train.holdout, trained.train.epochs, trained.optim.lr) == (0.0, 3, best.values["optim.lr"])
    assert yaml.safe_load((root / "sweeps/small-chosen/sweep.yaml").read_text())["search"] is None
    kill_all(root)
