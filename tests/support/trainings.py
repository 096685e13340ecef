"""Small trainings on the digits: their configuration, their command, what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for
from vitpa.config import RunConfig
from vitpa.config_file import load_config, shipped_configs
from vitpa.metrics_file import read_metrics
from vitpa.rundir import Result, RunDir
from vitpa.train_command import main

EPOCHS, EPOCH_STEPS = 4, 22  # 1,437 images at batch 64


def arguments(data: Path, root: Path, *overrides: str) -> list[str]:
    """Arguments for a run of a few seconds; of each key the last one."""
    small = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", f"train.epochs={EPOCHS}", "optim.warmup_epochs=1"]
    runtime = [f"runtime.data_dir={data}", f"runtime.root={root}", "runtime.device=cpu", "runtime.tensorboard=false"]
    return ["digits", *{word.partition("=")[0]: word for word in (*small, *runtime, *overrides)}.values()]


def config_of(words: list[str]) -> RunConfig:
    return load_config(shipped_configs()[words[0]], words[1:])


def result_of(words: list[str]) -> Result:
    result = config_of(words).run_dir.result()
    assert result is not None
    return result


def trained(words: list[str]) -> Result:
    """Train in this process, to the end."""
    assert main(words) == 0
    return result_of(words)


def start(words: list[str], *launcher: str) -> subprocess.Popen[str]:
    """Train in a process of its own."""
    command = [sys.executable, "-m", *(launcher or ("vitpa.train",)), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    def looked() -> bool:
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        return condition()

    wait_for(looked)


def rows(run: RunDir) -> int:
    return run.metrics_jsonl.read_bytes().count(b"\n") if run.metrics_jsonl.exists() else 0


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """The record without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "time_s"))} for row in read_metrics(run.metrics_jsonl)]
