"""A minute of chaos on a real SLURM, by the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import require_slurm
from tests.support.digits_sweeps import DIGITS, TRAIN
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end


@pytest.mark.slurm
@pytest.mark.slow
def test_a_sweep_comes_through(digits: Path, tmp_path: Path) -> None:
    require_slurm()
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump({**DIGITS, "train": {**TRAIN, "epochs": 1}}))
    grid = {"name": "little", "recipes": ["digits.yaml"], "attentions": ["content"], "seeds": [0]}
    (tmp_path / "little.yaml").write_text(yaml.safe_dump(grid))
    words = [str(tmp_path / "little.yaml"), "--data-dir", str(digits), "--json", str(tmp_path / "certificate.json")]
    words += ["--seed", "2657", "--mttf", "0.4", "--hours", "0.003", "--checkpoint-every", "2", "--epochs", "150"]
    command = [sys.executable, "-m", "vitpa.cli", "devcluster", "chaos", *words]
    done = run_to_end(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 doubled, 0 different of 1 runs" in done.stdout
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    runs = certificate["runs"]
    assert (runs["count"], runs["lost"], runs["doubled"], runs["different"]) == (1, [], {}, {})
    assert certificate["seed"] == 2657
    assert certificate["ettr"]["restart_s"] > 0
    found = {kind: its["interruptions"] for kind, its in certificate["faults_by_kind"].items()}
    assert found == {"disk full": 0}  # trainings wait for room
    assert certificate["recoveries"] == {"itself": 0, "submit": 0, "retry": 0, "nobody": 0}
    assert certificate["left_out"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nosuch"], "'nosuch': no such file"),
        (["demo", "optim.lr=high"], "optim.lr=high"),
        (["demo", "--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
    ],
)
def test_what_cannot_begin_says_why_in_a_line(words: list[str], reason: str) -> None:
    require_slurm()
    done = run_to_end([sys.executable, "-m", "vitpa.cli", "devcluster", "chaos", *words], cwd=ROOT)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert line.startswith("vitpa devcluster chaos: ")
    assert reason in line
