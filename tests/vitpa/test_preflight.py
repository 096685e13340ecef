"""The pre-flight, for real: as a process, with data that is missing, damaged or hangs, and on a GPU."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.waiting import run_to_end
from vitpa import preflight
from vitpa.arguments import literal_path
from vitpa.config_file import shipped_configs
from vitpa.data.beton import Beton


def run(*words: str, cuda: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) if cuda is None else {**os.environ, "CUDA_VISIBLE_DEVICES": cuda}
    command = [sys.executable, "-m", "vitpa.preflight", *words]
    return run_to_end(command, env=environment)


def report(data: Path, root: Path, *words: str, gpus: int = 0, cuda: str | None = None) -> dict[str, Any]:
    answer = run("digits", f"runtime.data_dir={data}", f"runtime.root={root}", f"--gpus={gpus}", *words, cuda=cuda)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    assert found["ok"] == all(check["ok"] for check in found["checks"])
    return found


def failures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What failed, and whom it blames."""
    return [(check["name"], check["blames"]) for check in found["checks"] if not check["ok"]]


def detail(found: dict[str, Any], name: str) -> str:
    return next(str(check["detail"]) for check in found["checks"] if check["name"] == name)


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    """Data of one's own, to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


def test_a_good_node_passes(digits: Path, tmp_path: Path) -> None:
    found = report(digits, tmp_path / "not" / "yet", "runtime.device=cpu", gpus=2)  # on the CPU nobody looks for GPUs
    assert found["ok"]
    assert [check["name"] for check in found["checks"]] == ["cpus", "disk", "data_train", "data_val"]
    assert {"host", "duration_s"} < found.keys()


def test_a_dollar_sign_in_a_path_is_handed_on(digits: Path, tmp_path: Path) -> None:
    """To the processes that make the checks that may hang."""
    config = tmp_path / "L$y" / "config.yaml"
    config.parent.mkdir()
    shutil.copy(shipped_configs()["digits"], config)
    words = [f"runtime.data_dir={digits}", f"runtime.root={literal_path(config.parent)}", "runtime.device=cpu", "--gpus=0"]
    answer = run(literal_path(config), *words)
    assert json.loads(answer.stdout)["ok"], answer.stdout + answer.stderr


def test_the_cpu_needs_no_torch() -> None:
    code = "import sys, vitpa.preflight; print(sorted({'torch', 'timm', 'ffcv', 'cv2'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_too_few_cpus_blame_the_node(digits: Path, tmp_path: Path) -> None:
    one = os.sched_getaffinity(0).pop()
    words = ["digits", f"runtime.data_dir={digits}", f"runtime.root={tmp_path}", "--gpus=0", "--cpus=2"]
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from vitpa.preflight import main; main()"
    answer = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    assert failures(found) == [("cpus", "node")]
    assert detail(found, "cpus") == "1 CPUs of 2 asked for; start it with srun --cpus-per-task=2"


def test_too_little_room_blames_the_disk(digits: Path, tmp_path: Path) -> None:
    found = report(digits, tmp_path, "--min-free-gib=1e9")
    assert failures(found) == [("disk", "disk")]
    assert "1e+09 are wanted; make room" in detail(found, "disk")


def test_a_root_that_is_no_folder_blames_the_run(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = report(digits, tmp_path / "file" / "outputs")
    assert failures(found) == [("disk", "run")]


def test_missing_data_blames_the_data_and_says_how_to_get_it(data: Path, tmp_path: Path) -> None:
    (data / "digits" / "train.beton").unlink()
    (data / "digits" / "val.json").unlink()
    found = report(data, tmp_path)
    assert failures(found) == [("data_train", "data"), ("data_val", "data")]
    assert "no such file; make it with `vitpa prep digits`" in detail(found, "data_train")
    assert "no manifest beside the .beton" in detail(found, "data_val")


def test_data_that_was_cut_blames_the_data(data: Path, tmp_path: Path) -> None:
    path = data / "digits" / "val.beton"
    os.truncate(path, path.stat().st_size - 1)
    found = report(data, tmp_path)
    assert failures(found) == [("data_val", "data")]
    assert "it was cut or changed" in detail(found, "data_val")


@pytest.mark.parametrize(("number", "blames"), [(errno.EIO, "node"), (errno.ESTALE, "node"), (errno.EACCES, "data")])
def test_a_file_that_cannot_be_read_here_blames_the_node(
    digits: Path, monkeypatch: pytest.MonkeyPatch, number: int, blames: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Beton, "open", broken)
    check = preflight.check_data(digits / "digits" / "val.beton", "digits", "val")
    assert (check.ok, check.blames) == (False, blames)
    assert os.strerror(number) in check.detail


@pytest.mark.parametrize(("number", "blames"), [(errno.EROFS, "node"), (errno.EIO, "node"), (errno.EDQUOT, "disk")])
def test_a_disk_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, blames: str) -> None:
    def broken(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    check = preflight.check_disk(tmp_path, 0)
    assert (check.ok, check.blames) == (False, blames)


HANGS = """
import os, time
opened = os.open
def gone(path, *arguments, **options):
    if str(path).endswith("digits/train.beton"):
        time.sleep(1000)
    return opened(path, *arguments, **options)
os.open = gone
"""


@pytest.mark.slow
def test_what_hangs_is_given_up_at_the_deadline_and_blames_the_node(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = time.monotonic()
    run("digits", "--gpus=0")
    deadline_s = max(2, round(3 * (time.monotonic() - began_s)))  # a busy machine takes its time
    (tmp_path / "sitecustomize.py").write_text(HANGS)  # opening the file waits for ever: its server is gone
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = report(digits, tmp_path, f"--deadline-s={deadline_s}")
    assert failures(found) == [("data_train", "node")]
    assert detail(found, "data_train") == f"no answer in {deadline_s} s"
    assert detail(found, "disk").endswith("GiB free")  # what was found before counts
    assert found["duration_s"] < 5 * deadline_s


def test_a_check_that_dies_blames_the_node_and_one_that_fails_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    names = ["disk", "data_train"]
    killed = preflight.Probe("files", names, ["digits", "--gpus=0"], 60)
    killed.process.send_signal(signal.SIGBUS)  # a page of a mapped file that cannot be read
    (check,) = killed.checks()
    assert check == preflight.Check("disk", False, "the check was killed by SIGBUS", "node")
    (check,) = preflight.Probe("files", names, ["digits", "--gpus=0", "seed=x"], 60).checks()
    assert (check.name, check.ok, check.blames) == ("disk", False, "run")
    assert "seed=x" in check.detail
    assert "seed=x" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optim.lrr=1", "--gpus=0"), "unknown key optim.lrr; did you mean optim.lr?"),
        (("runtime.device=cuda", "--gpus=0"), "runtime.device=cuda with --gpus 0: ask for GPUs"),
    ],
)
def test_an_error_of_the_users_is_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["digits", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("vitpa preflight: ")
    assert message in captured.err


def test_the_product_is_exact_in_every_number_type() -> None:
    assert preflight.multiplies(torch.device("cpu")) == (True, "matrix products are exact")


@pytest.mark.slow
def test_gpus_that_are_not_there_blame_the_node(digits: Path, tmp_path: Path) -> None:
    found = report(digits, tmp_path, gpus=2, cuda="")
    assert failures(found) == [("gpu_count", "node")]
    assert detail(found, "gpu_count") == "0 visible GPUs, 2 expected (CUDA_VISIBLE_DEVICES: )"


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.whole_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class TestOnGpu:
    """No test beside these, but what other processes of pytest keep of a GPU, as this one does, counts as used."""

    pytestmark = on_gpu

    @pytest.fixture
    def limit(self) -> float:
        """What may be in use: a GiB more than is."""
        used = [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]
        return max(used) / 2**30 + 1

    def test_good_gpus_pass(self, digits: Path, tmp_path: Path, limit: float) -> None:
        found = report(digits, tmp_path, f"--max-used-gib={limit}", gpus=torch.cuda.device_count())
        assert found["ok"], found
        assert detail(found, "gpu0_product") == "matrix products are exact"
        assert float(detail(found, "gpu0_memory").split()[0]) < limit

    def test_a_gpu_too_many_blames_the_run(self, digits: Path, tmp_path: Path, limit: float) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        found = report(digits, tmp_path, f"--max-used-gib={limit}", gpus=1, cuda="0,1")
        assert failures(found) == [("gpu_count", "run")]

    def test_somebody_elses_memory_blames_the_node_unless_runs_share_it(
        self, digits: Path, tmp_path: Path, limit: float
    ) -> None:
        held = torch.zeros(3 * 2**30, dtype=torch.uint8, device="cuda:0")
        assert failures(report(digits, tmp_path, f"--max-used-gib={limit}", gpus=1, cuda="0")) == [("gpu0_memory", "node")]
        assert not failures(report(digits, tmp_path, "runtime.runs_per_gpu=2", f"--max-used-gib={limit}", gpus=1, cuda="0"))
        assert not failures(report(digits, tmp_path, f"--max-used-gib={limit + 4}", gpus=1, cuda="0"))
        del held
        torch.cuda.empty_cache()


def test_what_a_library_prints_is_no_check() -> None:
    check = preflight.Check("disk", True, "room", "node")
    assert preflight._check(json.dumps(asdict(check)).encode()) == check
    for line in (b"hello", b"[" * 100_000, b'{"name": "disk"}', b"[]", b"\xff", b"7"):
        assert preflight._check(line) is None
