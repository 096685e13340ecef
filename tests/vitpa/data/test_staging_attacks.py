"""A node's disk that others can write to: two real users, one of whom is up to something. Nothing is lost or believed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from tests.support.staging import ALONE, FILES, assert_whole, copied_by, stage
from tests.support.trainings import arguments
from vitpa.arguments import ConfigError
from vitpa.data import staging
from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, beton_path
from vitpa.data.private_folder import NotOursError, PrivateFolder
from vitpa.data.staging import open_copy, staged
from vitpa.train_command import main

OTHER = 65534  # nobody
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become another user")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder in which everybody may make what they like, as /tmp is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of ours that holds just what a copy would replace."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in (*FILES, "train.notes", "val.tar"):
        (folder / name).write_text("years of work")
    return folder


def assert_untouched(precious: Path) -> None:
    assert sorted(path.name for path in precious.iterdir()) == sorted([*FILES, "train.notes", "val.tar"])
    assert all(path.read_text() == "years of work" for path in precious.iterdir())


def by_another(*command: str | Path) -> None:
    """Run a command as another user."""
    prefix = ("setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups")
    subprocess.run([*prefix, *map(str, command)], check=True, cwd="/")


@pytest.fixture
def name(digits: Path, tmp_path: Path) -> str:
    """What the folder of the digits' copy is called, which anybody who can read the manifests knows."""
    return stage(digits, tmp_path / "elsewhere").name


def trained(words: list[str]) -> tuple[int, list[str]]:
    """The exit code of a training, and the lines of its errors."""
    with redirect_stderr(StringIO()) as errors:
        code = main(words)
    return code, errors.getvalue().splitlines()


Attack = Callable[[Path, Path, Path, str], None]


def their_folder_with_a_link(digits: Path, disk: Path, precious: Path, name: str) -> None:
    folder = disk / f"vitpa-{os.geteuid()}" / name
    by_another("mkdir", "-p", folder)
    by_another("ln", "-s", precious, folder / "digits")


def their_folder_with_their_copy(digits: Path, disk: Path, precious: Path, name: str) -> None:
    folder = disk / f"vitpa-{os.geteuid()}" / name / "digits"
    by_another("mkdir", "-p", folder)
    for file in FILES:
        shutil.copy(digits / "digits" / file, folder / file)
        os.chown(folder / file, OTHER, OTHER)


def their_empty_folder(digits: Path, disk: Path, precious: Path, name: str) -> None:
    by_another("mkdir", "-m", "777", disk / f"vitpa-{os.geteuid()}")


def their_link(digits: Path, disk: Path, precious: Path, name: str) -> None:
    by_another("ln", "-s", precious, disk / f"vitpa-{os.geteuid()}")


def their_pipe(digits: Path, disk: Path, precious: Path, name: str) -> None:
    by_another("mkfifo", disk / f"vitpa-{os.geteuid()}")


@needs_root
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "attack_and_words",
    [
        (their_folder_with_a_link, "belongs to user nobody"),
        (their_folder_with_their_copy, "belongs to user nobody"),
        (their_empty_folder, "belongs to user nobody"),
        (their_link, "is a link (of user nobody)"),
        (their_pipe, "is no folder (of user nobody)"),
    ],
)
def test_what_another_user_made_first_is_refused_and_nothing_is_lost(
    attack_and_words: tuple[Attack, str], digits: Path, disk: Path, precious: Path, name: str
) -> None:
    attack, what = attack_and_words
    attack(digits, disk, precious, name)
    words = arguments(digits, precious.parent / "out", "train.epochs=1", f"runtime.stage_dir={disk}")
    code, (line,) = trained(words)
    assert code == 1
    ours = disk / f"vitpa-{os.geteuid()}"
    assert line.startswith(f"vitpa train: runtime.stage_dir={disk}: {ours} {what}; have it removed, by that user or an admin")
    assert f"set runtime.stage_dir=null to read from {digits}, or name a folder on another disk" in line
    assert_untouched(precious)


def test_a_folder_of_ours_in_which_others_may_write_is_refused(digits: Path, disk: Path) -> None:
    ours = disk / f"vitpa-{os.geteuid()}"
    ours.mkdir()
    for mode in (0o777, 0o1777, 0o775, 0o722):
        ours.chmod(mode)
        with pytest.raises(ConfigError, match=f"others may write to {ours} \\(mode {mode:o}\\).* remove it: rm -r {ours}"):
            stage(digits, disk)
    ours.chmod(0o755)  # others could only look
    assert_whole(digits, stage(digits, disk))
    assert ours.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_link_in_place_of_a_folder_is_not_followed(depth: int, digits: Path, disk: Path, precious: Path, name: str) -> None:
    """Not even one of ours."""
    place = [disk / f"vitpa-{os.geteuid()}", disk / f"vitpa-{os.geteuid()}" / name][: depth + 1][-1]
    if depth == 2:
        place /= "digits"
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.symlink_to(precious)
    with pytest.raises(ConfigError, match=f"{place} is a link \\(of user root\\); remove it|is a link"):
        stage(digits, disk)
    assert_untouched(precious)


def test_a_stage_dir_that_is_a_link_is_the_users_own_business(digits: Path, disk: Path) -> None:
    (disk / "real").mkdir()
    (disk / "link").symlink_to(disk / "real")
    copy = stage(digits, disk / "link")
    assert copy.is_relative_to((disk / "real").resolve())  # looked up once: whatever becomes of the link
    assert_whole(digits, copy)


def their_file(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def second_name(path: Path) -> None:
    path.with_name("second").hardlink_to(path)


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", [second_name, open_to_all, pipe, device, pytest.param(their_file, marks=needs_root)])
def test_a_file_that_is_not_ours_alone_is_made_again(
    change: Callable[[Path], None], digits: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = stage(digits, disk)
    capsys.readouterr()
    change(beton_path(copy, "digits", "train"))
    assert stage(digits, disk) == copy
    assert copied_by(capsys.readouterr().err) == 1
    (copy / "digits" / "second").unlink(missing_ok=True)
    assert_whole(digits, copy)


def test_a_folder_in_place_of_a_file_is_one_line_and_stays(digits: Path, disk: Path) -> None:
    copy = stage(digits, disk)
    path = beton_path(copy, "digits", "train")
    path.unlink()
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(ConfigError, match=f"{path} is a folder where a file should be; remove it"):
        stage(digits, disk)
    assert (path / "mine").exists()


# --- content


def other_label(path: Path) -> None:
    """Exchange the labels of two samples, which all that can be seen without the hash allows."""
    with Beton.open(path) as beton:
        first = 0
        second = int((beton.labels != beton.labels[0]).argmax())
        labels = [int(beton.labels[at]).to_bytes(8, "little") for at in (second, first)]
    with path.open("r+b") as file:
        for at, label in zip((first, second), labels, strict=True):
            file.seek(24 + 2 * 1041 + 24 * at + 16)
            file.write(label)


def one_pixel(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek((2 << 20) + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("same_times", [False, True])
@pytest.mark.parametrize("change", [other_label, one_pixel])
def test_a_copy_with_other_content_is_not_believed(
    change: Callable[[Path], None], same_times: bool, digits: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = stage(digits, disk)
    path = beton_path(copy, "digits", "train")
    before = path.stat()
    change(path)
    if same_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BetonError, match="was changed after it was checked; start again"):
        open_copy(copy, "digits", "train")
    capsys.readouterr()
    assert stage(digits, disk) == copy
    said = capsys.readouterr().err
    assert f"{path} is not what its manifest says; it is made again" in said and copied_by(said) == 1
    assert_whole(digits, copy)


def test_a_copy_without_a_stamp_is_checked_once(digits: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one is that an older vitpa made, or that was touched."""
    copy = stage(digits, disk)
    shutil.rmtree(copy / staging.STAMPS)
    os.utime(beton_path(copy, "digits", "val"))
    for checks in (2, 0):
        capsys.readouterr()
        stage(digits, disk)
        said = capsys.readouterr().err
        assert (said.count("which is there already"), copied_by(said)) == (checks, 0)
    for split in ("train", "val"):
        with open_copy(copy, "digits", split) as beton:
            assert beton.is_copy and beton.content_sha256() == beton.manifest.beton_sha256


@pytest.mark.parametrize("stamp", ["", "{}", "[" * 100_000, '{"inode": "1"}', "\0" * 100])
def test_a_damaged_stamp_is_not_believed(stamp: str, digits: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = stage(digits, disk)
    (copy / staging.STAMPS / "train.json").write_text(stamp)
    capsys.readouterr()
    stage(digits, disk)
    said = capsys.readouterr().err
    assert (said.count("which is there already"), copied_by(said)) == (1, 0)


# --- races


@pytest.mark.slow
def test_a_folder_that_is_exchanged_meanwhile_changes_nothing(digits: Path, disk: Path, precious: Path) -> None:
    """Whoever owns `stage_dir` can rename what lies in it, again and again."""
    ours, aside = disk / f"vitpa-{os.geteuid()}", disk / "aside"
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            try:
                ours.rename(aside)
                ours.symlink_to(precious)
                ours.unlink()
                aside.rename(ours)
            except OSError:
                continue

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(30):
            try:
                copy = staged(digits, "digits", str(disk), ALONE)
                for split in ("train", "val"):
                    with open_copy(copy, "digits", split) as beton:
                        assert beton.content_sha256() == beton.manifest.beton_sha256
                    beton_path(copy, "digits", split).unlink()
            except (ConfigError, BetonError, FileNotFoundError) as error:
                assert "\n" not in str(error)
            assert_untouched(precious)
    finally:
        done.set()
        thread.join()
    assert_untouched(precious)


def test_what_is_done_in_a_folder_is_done_in_it_wherever_it_is(tmp_path: Path, precious: Path) -> None:
    with PrivateFolder.open(tmp_path / "ours") as folder:
        (tmp_path / "ours").rename(tmp_path / "moved")
        (tmp_path / "ours").symlink_to(precious)
        assert folder.create("train.json", "{}") and not folder.create("train.json", "[]")
        folder.write("val.json", "[]")
        folder.rename("val.json", "val.tar")
        folder.remove("train.beton")
        assert folder.read("train.json") == b"{}"
        with folder.folder("below") as below:
            below.write("a", "b")
        assert sorted(folder.names()) == ["below", "train.json", "val.tar"]
        os.mkfifo(tmp_path / "moved" / "pipe")
        (tmp_path / "moved" / "link").symlink_to(precious / "val.json")
        for name in ("pipe", "link"):
            with pytest.raises(NotOursError, match=name):
                folder.read(name)
        folder.remove("link")
    assert_untouched(precious)


def test_a_file_is_read_while_it_still_has_its_temporary_name_too(tmp_path: Path) -> None:
    """As between the two steps of `create`, or for ever if it was killed there."""
    with PrivateFolder.open(tmp_path / "ours") as folder:
        assert folder.create("1", "me")
        (tmp_path / "ours" / ".1.4711.0123abcd").hardlink_to(tmp_path / "ours" / "1")
        assert folder.read("1") == b"me"
        (tmp_path / "elsewhere").hardlink_to(tmp_path / "ours" / "1")
        with pytest.raises(NotOursError, match="not a file of your own"):
            folder.read("1")


def test_a_file_is_read_whenever_another_thread_creates_it(tmp_path: Path) -> None:
    with PrivateFolder.open(tmp_path / "ours") as folder:
        names = [str(number) for number in range(60)]
        maker = threading.Thread(target=lambda: [folder.create(name, "me") for name in names])
        maker.start()
        for name in names:
            while (found := folder.read(name)) is None:
                pass
            assert found == b"me"
        maker.join()
