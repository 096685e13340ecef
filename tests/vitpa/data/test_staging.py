"""The node's copy of a data set: real processes, real kills, a disk that is really full."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.staging import ALONE, FILES, assert_whole, copied_by, stage
from tests.support.trainings import arguments, result_of, start, trained, wait_until
from tests.support.waiting import finish, run_to_end
from vitpa.arguments import ConfigError
from vitpa.config import RuntimeConfig
from vitpa.data import staging
from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, beton_path, manifest_path
from vitpa.data.staging import expanded, staged
from vitpa.records import ProcessId
from vitpa.train_command import main

SLOWLY = """
import sys, time
from vitpa.data import staging
staging.CHUNK_BYTES, staging.POLL_S, staging.LINE_EVERY_S, fast = 1 << 15, 0.05, 0.3, staging._copy_chunk
def slowly(*arguments):
    count = fast(*arguments)
    time.sleep({sleep_s})
    return count
staging._copy_chunk = slowly
"""  # 130 chunks a file, four at a time
TRAIN = "from vitpa.train_command import main\nsys.exit(main(sys.argv[1:]))"


def slow_training(words: list[str], *, sleep_s: float = 0.05) -> subprocess.Popen[str]:
    """Train in a process of its own that copies each split in sleep_s * 32 seconds."""
    command = [sys.executable, "-c", SLOWLY.format(sleep_s=sleep_s) + TRAIN, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def half_copied(disk: Path) -> list[Path]:
    return list(disk.glob("vitpa-*/digits-*/digits/*.beton.*"))


def test_the_copy_is_exact_and_private_and_made_once(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = stage(digits, tmp_path / "new" / "disk")
    assert copied_by(capsys.readouterr().err) == 2
    assert_whole(digits, copy)
    assert copy.parent == tmp_path / "new" / "disk" / f"vitpa-{os.getuid()}"
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    before = [(copy / "digits" / name).stat() for name in FILES]
    assert stage(digits, tmp_path / "new" / "disk") == copy
    assert [(copy / "digits" / name).stat().st_mtime_ns for name in FILES] == [each.st_mtime_ns for each in before]
    assert copied_by(capsys.readouterr().err) == 0


def test_a_training_reads_the_copy_and_ends_as_without_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    monkeypatch.setenv("VITPA_TEST_DISK", str(tmp_path / "disk"))
    options = ["runtime.cpu_threads=1", "train.epochs=1"]
    words = arguments(data, tmp_path / "staged", *options, "runtime.stage_dir=$VITPA_TEST_DISK/a")
    assert trained(words).weights_sha256 == trained(arguments(data, tmp_path / "not", *options)).weights_sha256

    for split in ("train", "val"):
        beton_path(data, "digits", split).unlink()  # the manifests are enough to find the copy
    streamed = "runtime.loader=stream"
    again = trained(arguments(data, tmp_path / "s", *options, streamed, "runtime.stage_dir=$VITPA_TEST_DISK/a"))
    assert again.weights_sha256 == trained(arguments(digits, tmp_path / "n", *options, streamed)).weights_sha256


@pytest.mark.slow
def test_runs_at_the_same_time_copy_once(digits: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    options = ["train.epochs=1", f"runtime.stage_dir={disk}"]
    processes = [slow_training(arguments(digits, tmp_path, *options, f"seed={seed}"), sleep_s=0.1) for seed in range(2)]
    outputs = [finish(process)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    copier, other = sorted(outputs, key=copied_by, reverse=True)
    assert (copied_by(copier), copied_by(other)) == (2, 0)
    assert re.search(r"^digits/train copied: 0\.0 of 0\.00 GiB, [\d,]+ MiB/s, \d+ s left$", copier, re.MULTILINE)
    (copy,) = disk.glob("vitpa-*/*")
    assert f"digits: is read from its copy in {copy} on " in other
    assert_whole(digits, copy)


@pytest.mark.slow
def test_a_copy_that_is_killed_is_taken_over_by_who_waits_for_it(digits: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    options = ["train.epochs=1", f"runtime.stage_dir={disk}"]
    first = slow_training(arguments(digits, tmp_path, *options), sleep_s=60)
    wait_until(lambda: bool(half_copied(disk)), first)
    second = slow_training(arguments(digits, tmp_path, *options, "seed=1"), sleep_s=0.01)
    assert second.stdout is not None
    assert f"process {first.pid} copies it to {disk}" in second.stdout.readline()
    (left,) = half_copied(disk)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    first.communicate()
    output = finish(second)[0]
    assert second.returncode == 0, output
    assert copied_by(output) == 2
    assert not left.exists()
    (copy,) = disk.glob("vitpa-*/*")
    assert_whole(digits, copy)


@pytest.mark.slow
def test_an_interrupted_copy_leaves_nothing_and_the_next_goes_on_at_once(digits: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    words = arguments(digits, tmp_path, "train.epochs=1", f"runtime.stage_dir={disk}")
    process = slow_training(words, sleep_s=0.5)
    wait_until(lambda: bool(half_copied(disk)), process)
    process.send_signal(signal.SIGINT)
    output = finish(process)[0]
    assert process.returncode == 130, output
    assert "interrupted" in output
    (copy,) = disk.glob("vitpa-*/*")
    assert not list((copy / "digits").iterdir())
    assert stage(digits, disk) == copy
    assert_whole(digits, copy)


def truncate(copy: Path) -> None:
    os.truncate(copy, copy.stat().st_size - 1)


def zero_header(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.write(bytes(64))


def zero_table(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(-1024, os.SEEK_END)
        file.write(bytes(1024))


def change_manifest(copy: Path) -> None:
    path = manifest_path(copy)
    path.write_text(path.read_text().replace("20", "19"))


def empty_manifest(copy: Path) -> None:
    manifest_path(copy).write_text("")


@pytest.mark.parametrize("damage", [truncate, zero_header, zero_table, change_manifest, empty_manifest, Path.unlink])
def test_a_damaged_copy_is_made_again(
    damage: Callable[[Path], None], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = stage(digits, tmp_path)
    capsys.readouterr()
    with Beton.open(beton_path(copy, "digits", "train")) as in_use:
        damage(beton_path(copy, "digits", "val"))
        assert stage(digits, tmp_path) == copy
        assert copied_by(capsys.readouterr().err) == 1  # the other split stays
        assert_whole(digits, copy)
        assert in_use.content_sha256() == in_use.manifest.beton_sha256


def test_pixels_of_a_copy_that_were_damaged_later_are_not_put_down_to_the_data(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    options = ["dataset=photos", "train.epochs=1", "train.global_batch_size=6", "model.img_size=32", "runtime.loader=stream"]
    words = arguments(photos, tmp_path, *options, f"runtime.stage_dir={disk}")
    copy = staged(photos, "photos", str(disk), ALONE)
    with Beton.open(beton_path(copy, "photos", "train")) as beton, beton.path.open("r+b") as file:
        file.seek(int(beton.offsets[5]))
        file.write(bytes(int(beton.sizes[5])))
        file.flush()
        stamp = copy / staging.STAMPS / "train.json"  # as if the disk had lost them, which changes no times
        stamp.write_text(json.dumps(staging._stamp_of(os.fstat(file.fileno()), beton.manifest)))
    assert main(words) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith(f"the JPEG of sample 5 cannot be decoded; delete {copy}, a copy on this node: it is made again")
    shutil.rmtree(copy)
    assert main(words) == 0


def test_what_goes_wrong_in_copying_is_noticed(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flips_a_bit(source: int, target: int, start: int, size: int) -> int:
        count = honest(source, target, start, size)
        at = (2 << 20) + 1000  # the first page with pixels
        if start <= at < start + count:
            os.pwrite(target, bytes([os.pread(source, 1, at)[0] ^ 4]), at)
        return count

    honest = staging._copy_chunk
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_copy_chunk", flips_a_bit)
        with pytest.raises(ConfigError, match=r"train\.beton is not what its manifest says; `vitpa prep digits --verify`"):
            stage(digits, tmp_path)
    (copy,) = tmp_path.glob("vitpa-*/*")
    assert not list((copy / "digits").iterdir())
    assert_whole(digits, stage(digits, tmp_path))


def test_a_damaged_original_is_not_used(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    with beton_path(data, "digits", "train").open("r+b") as file:
        file.seek((2 << 20) + 1000)
        file.write(b"something else")
    with pytest.raises(ConfigError, match="is not what its manifest says"):
        stage(data, tmp_path)
    truncate(beton_path(data, "digits", "train"))
    with pytest.raises(BetonError, match="it was cut or changed"):
        stage(data, tmp_path)
    manifest_path(beton_path(data, "digits", "val")).unlink()
    with pytest.raises(BetonError, match="no manifest"):
        stage(data, tmp_path)


def test_other_data_get_another_folder_and_the_old_copy_stays(digits: Path, tmp_path: Path) -> None:
    old = stage(digits, tmp_path)
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    path = manifest_path(beton_path(data, "digits", "val"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": "elsewhere"}))
    new = stage(data, tmp_path)
    assert new != old
    assert Beton.open(beton_path(new, "digits", "val")).manifest.source == "elsewhere"
    assert_whole(digits, old)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is too small for the digits' two files of 4 MiB, but not for one."""
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_what_does_not_fit_is_refused(
    digits: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1", f"runtime.stage_dir={small_disk}")
    assert main(words) == 1
    folder = f"{small_disk}/vitpa-{os.getuid()}"
    assert capsys.readouterr().err == (
        f"vitpa train: runtime.stage_dir={small_disk}: digits needs 0.01 GiB below {folder} on {socket.gethostname()} "
        f"(5 % to spare), 0.01 GiB are free; set runtime.stage_dir=null to read from {digits}, "
        "or name a folder on another disk\n"
    )
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert_whole(digits, stage(digits, small_disk))


@pytest.mark.parametrize("reserved", [True, False])
def test_a_disk_that_fills_up_meanwhile_is_one_line(
    reserved: bool, digits: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging, "SPARE", -1.0)  # as if there had been room
    if not reserved:  # as on a file system that cannot
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    words = arguments(digits, small_disk.parent, "train.epochs=1", f"runtime.stage_dir={small_disk}")
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vitpa train: runtime.stage_dir={small_disk}: the copy of {digits}/digits to {small_disk}/vitpa-")
    assert "failed: No space left on device; it needs 0.01 GiB; set runtime.stage_dir=null" in last
    (copy,) = small_disk.glob("vitpa-*/*")
    assert sorted(path.name for path in (copy / "digits").iterdir()) == ["train.beton", "train.json"]  # whole: it stays
    assert not half_copied(small_disk)


def test_a_folder_that_cannot_be_made_is_one_line(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"^runtime\.stage_dir=\S+/file: the copy of .* failed: (Not a directory|File exists)"
    ):
        stage(digits, tmp_path / "file")


def test_a_claim_of_another_host_or_of_nobody_is_refused(digits: Path, tmp_path: Path) -> None:
    copy = stage(digits, tmp_path)
    beton_path(copy, "digits", "train").unlink()
    claim = copy / "claims" / "2"
    claim.write_text(ProcessId.mine().model_copy(update={"host": "elsewhere"}).model_dump_json())
    with pytest.raises(ConfigError, match=f"on elsewhere copies, says {claim}, and cannot be seen .* a disk of its own"):
        stage(digits, tmp_path)
    claim.write_text("{}")
    with pytest.raises(ConfigError, match=f"{claim} does not say which process copies; delete it"):
        stage(digits, tmp_path)
    claim.unlink()
    assert_whole(digits, stage(digits, tmp_path))


def test_a_process_that_dies_or_gives_up_is_followed_by_exactly_one(digits: Path, tmp_path: Path) -> None:
    """Many threads want the claim at once, again and again; a copy that fails is the next one's."""
    fails = threading.Event()
    copies: list[str] = []

    class Counted(staging._Staging):
        def _copy(self, claim: str) -> None:
            copies.append(claim)
            time.sleep(0.01)
            if len(copies) < 5:
                raise OSError(5, "a broken disk")
            super()._copy(claim)

    manifests = {split: Beton.open(beton_path(digits, "digits", split)).manifest for split in ("train", "val")}
    folder = tmp_path / "vitpa" / "digits"
    errors: list[OSError] = []

    def work() -> None:
        while True:
            try:
                return Counted(digits, "digits", manifests, str(tmp_path), folder, fails).run()
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copies == ["1", "2", "3", "4", "5"]
    assert len(errors) == 4
    assert_whole(digits, folder)


def test_the_folder_is_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("VITPA_TEST_DISK", "/local")
    monkeypatch.setenv("VITPA_TEST_NOWHERE", "somewhere")
    monkeypatch.delenv("VITPA_TEST_UNSET", raising=False)
    assert expanded("/scratch") == Path("/scratch")
    assert expanded("~/stage") == Path("/home/someone/stage")
    assert expanded("${VITPA_TEST_DISK}/stage") == expanded("$VITPA_TEST_DISK/stage") == Path("/local/stage")
    for unset in ("$VITPA_TEST_UNSET", "${VITPA_TEST_UNSET}"):
        with pytest.raises(ConfigError, match=re.escape(f"runtime.stage_dir={unset}/x: {unset} is not set here; ")):
            expanded(f"{unset}/x")
    with pytest.raises(ConfigError, match="somewhere is not an absolute path; on "):
        expanded("$VITPA_TEST_NOWHERE")
    with pytest.raises(ValueError, match=r"runtime\.stage_dir=stage: expected an absolute path, or one that begins with ~"):
        RuntimeConfig(stage_dir="stage")


@pytest.mark.slow
def test_two_processes_of_a_node_copy_once_and_end_as_without_it(digits: Path, tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
    options = ["runtime.cpu_threads=1", "train.epochs=1", "train.precision=float32"]
    outputs = []
    for root, more in (("staged", [f"runtime.stage_dir={tmp_path / 'disk'}"]), ("not", [])):
        process = start(arguments(digits, tmp_path / root, *options, *more), *torchrun)
        outputs.append(finish(process)[0])
        assert process.returncode == 0, outputs
    assert copied_by(outputs[0]) == 2
    with_copy, without = (result_of(arguments(digits, tmp_path / root, *options)) for root in ("staged", "not"))
    assert with_copy.weights_sha256 == without.weights_sha256


NODES = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed as dist
from vitpa.arguments import ConfigError
from vitpa.distributed import Group
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=timedelta(seconds=3))
os.environ["DISK"] = sys.argv[2 + rank]
try:
    folder = staging.staged(Path(sys.argv[1]), "digits", "$DISK", Group(rank, 2, 0, 1, torch.device("cpu")))
    said = f"read from {folder}\\n"
except ConfigError as error:
    said = f"refused: {error}\\n"
finally:
    dist.destroy_process_group()
os.write(1, said.encode())  # at once: print writes in pieces, between which those of the other process may come
"""


def on_two_nodes(script: Path, digits: Path, *disks: Path, sleep_s: float) -> list[str]:
    """Stage on two nodes with a disk each, whose collectives time out after 3 s; what they say at the end."""
    script.write_text(SLOWLY.format(sleep_s=sleep_s) + NODES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(digits),
        *map(str, disks),
    ]
    done = run_to_end(command)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


@pytest.mark.slow
def test_a_node_that_has_its_copy_waits_long_for_one_that_has_not(digits: Path, tmp_path: Path) -> None:
    fast = stage(digits, tmp_path / "a")
    said = on_two_nodes(tmp_path / "script.py", digits, tmp_path / "a", tmp_path / "b", sleep_s=0.1)
    (slow,) = (tmp_path / "b").glob("vitpa-*/*")
    assert said == [f"read from {fast}", f"read from {slow}"]
    assert_whole(digits, slow)


@pytest.mark.slow
def test_a_node_that_cannot_copy_ends_the_others_with_its_words(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    said = on_two_nodes(tmp_path / "script.py", digits, tmp_path / "a", tmp_path / "b", sleep_s=5)
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith(f"refused: runtime.stage_dir=$DISK: the copy of {digits}/digits to {tmp_path}/b/vitpa-")
    assert not half_copied(tmp_path / "a")
