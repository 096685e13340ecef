"""Causes of failures from real texts: made here where that is possible, otherwise as torch prints them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from jobs.failures import CAUSES, OTHER, cause_of, essence
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end
from vitpa.train_command import main as train

FRAMES = """[rank1]: Traceback (most recent call last):
[rank1]:   File "/home/u/vitpa/train.py", line 271, in step
[rank1]:     loss.backward()
"""
CUDA_2_6 = (
    FRAMES + "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
    " 79.11 GiB of which 3.12 MiB is free. Including non-PyTorch memory, this process has 79.09 GiB memory in use."
)
CUDA_2_0 = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.78 GiB total capacity; 13.61 GiB "
    "already allocated; 1.18 GiB free; 13.64 GiB reserved in total by PyTorch)"
)
NCCL_LOST = (
    '[rank0]: Traceback (most recent call last):\n[rank0]:   File "/home/u/vitpa/train.py", line 271, in step\n'
    "[rank0]: torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:94, "
    "remote process exited or there was a network error, NCCL version 2.21.5\n"
    "[rank0]: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
)
WATCHDOG = (
    "[rank0]:[E517 14:40:12.480 ProcessGroupNCCL.cpp:616] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=42, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds"
)
NCCL_WARNING = "[rank0]:[W517 14:40:12.480 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed"
GLOO_LOST = (
    "[rank0]: Traceback (most recent call last):\n[rank0]:     work.wait()\n[rank0]: RuntimeError: "
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:34986. "
    "This is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error."
)
ECC = FRAMES + "[rank1]: RuntimeError: CUDA error: uncorrectable ECC error encountered"
NO_DRIVER = "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
PREFLIGHT = "failed its pre-flight: gpu: no CUDA-capable device is detected"
PREFLIGHT_DATA = "failed its pre-flight: data: /data/digits/train.beton: no such file; make it with `vitpa prep digits`"
PREFLIGHT_DISK = "failed its pre-flight: disk: /outputs: 0.6 GiB free, 1 are wanted; make room"
WRITER = (
    "RuntimeError: [enforce fail at inline_container.cc:626] . PytorchStreamWriter failed writing file data/12: file write"
)
STAGING = (
    "vitpa train: runtime.stage_dir=$TMPDIR: the copy of /data/digits to /tmp/vitpa-0/digits-1 on n1 failed: No space left on "
    "device; it needs 0.01 GiB; set runtime.stage_dir=null to read from /data, or name a folder on another disk"
)
SLURM_MEMORY = "host out of memory: SLURM ended job 12_3 (OUT_OF_MEMORY); ask for more with `mem`"


@pytest.mark.parametrize(
    ("name", "reason", "log"),
    [
        ("cuda out of memory", "RuntimeError: it failed", CUDA_2_6),
        ("cuda out of memory", CUDA_2_0, ""),
        ("cuda out of memory", "", f"{NCCL_LOST}\n{CUDA_2_6}"),
        ("nccl", "", NCCL_LOST),
        ("nccl", "killed by SIGABRT", WATCHDOG),
        ("node", "", ECC),
        ("node", "DistBackendError: NCCL error in: x", f"{NCCL_LOST}\n{ECC}"),
        ("node", NO_DRIVER, ""),
        ("node", PREFLIGHT, ""),
        ("missing data", PREFLIGHT_DATA, ""),
        ("disk full", WRITER, ""),
        ("disk full", PREFLIGHT_DISK, ""),
        ("staging", "", STAGING),
        ("host out of memory", SLURM_MEMORY, "step 1"),
        ("killed by a signal", "killed by SIGKILL (out of memory?)", f"step 1\n{NCCL_WARNING}"),
        ("other", "ValueError: no", f"{GLOO_LOST}\n{FRAMES}[rank1]: ValueError: no"),
        ("other", "RuntimeError: Connection closed by peer", f"{GLOO_LOST}\n{FRAMES}[rank1]: ValueError: no"),
        ("other", "the training ended without a result", ""),
        ("other", "ValueError: no", "Traceback (most recent call last):\n  except ImportError: x\nValueError: no"),
    ],
)
def test_causes_as_they_are_printed(name: str, reason: str, log: str) -> None:
    assert cause_of(reason, log).name == name


def test_every_cause_has_one_line_of_advice() -> None:
    for cause in (*CAUSES, OTHER):
        assert cause.advice
        assert "\n" not in cause.advice


def run_train(capsys: pytest.CaptureFixture[str], root: Path, data: Path, *terms: str) -> str:
    assert train(["digits", f"runtime.root={root}", f"runtime.data_dir={data}", "runtime.device=cpu", *terms]) == 1
    return capsys.readouterr().err


def test_real_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_train(capsys, tmp_path, tmp_path / "nowhere")
    assert cause_of("", text).name == "missing data"


def test_real_non_finite_loss(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms = ["optim.lr=1e9", "optim.grad_clip_norm=null", "optim.warmup_epochs=0", "train.epochs=1", "model.depth=1"]
    text = run_train(capsys, tmp_path, digits, *terms)
    assert cause_of("", text).name == "not finite"
    assert essence(text.splitlines())[0].startswith("vitpa train: ")


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("import error", "import no_such_module"),
        ("import error", "from json import no_such_name"),
        ("import error", "import ctypes; ctypes.CDLL('libnothing.so.7')"),
        ("disk full", "open('/dev/full', 'w', buffering=1).write('x\\n')"),
        ("host out of memory", "bytearray(2**62)"),
        ("host out of memory", "import torch; torch.empty(10**15)"),
        ("host out of memory", "import numpy; numpy.ones(10**15)"),
        ("other", "{}['a']"),
    ],
)
def test_real_failures_of_a_process(name: str, program: str) -> None:
    done = run_to_end([sys.executable, "-c", program])
    assert done.returncode != 0
    assert cause_of(done.stderr.splitlines()[-1], done.stderr).name == name, done.stderr
    assert cause_of("", done.stderr).name == name


def torchrun(tmp_path: Path, program: str) -> str:
    """What two processes of that program print under torchrun."""
    script = tmp_path / "program.py"
    script.write_text(program)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_to_end(line, cwd=ROOT, env=environment)
    assert done.returncode == 1
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_traceback_of_the_process_that_failed_by_itself(tmp_path: Path) -> None:
    program = """
import torch.distributed as d
d.init_process_group("gloo")
if d.get_rank() == 1:
    raise ValueError("images do not fit")
d.barrier()
"""
    text = torchrun(tmp_path, program)
    assert "ChildFailedError" in text
    told = essence(text.splitlines())
    assert told[0] == "Traceback (most recent call last):"
    assert told[-1] == "ValueError: images do not fit"
    assert cause_of("RuntimeError: Connection closed by peer", text) is OTHER


@pytest.mark.slow
def test_a_process_killed_under_torchrun(tmp_path: Path) -> None:
    text = torchrun(tmp_path, "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)")
    told = "\n".join(essence(text.splitlines()))
    assert "rank      : 1 " in told
    assert "Traceback" not in told
    assert cause_of("", text).name == "killed by a signal"


def test_chained_errors_stay_together() -> None:
    program = "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError('b')"
    done = run_to_end([sys.executable, "-c", program])
    log = ["Traceback (most recent call last):", "OSError: an earlier one, fixed", *done.stderr.splitlines()]
    told = essence(log)
    assert "KeyError: 'a'" in told
    assert told[-1] == "ValueError: b"
    assert not any("fixed" in line for line in told)


def test_a_log_without_an_error_has_no_essence() -> None:
    assert essence(["step 1", "step 2"]) == []
    assert essence([]) == []
