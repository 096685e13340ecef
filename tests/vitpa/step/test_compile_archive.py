"""Archives of what was compiled: whole or refused, ours or refused, bounded; Triton finds its kernels in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitpa.step import compile_archive
from vitpa.step.compile_archive import ArchiveError, files_in, read_archive, write_archive


def folder_of(path: Path, **files: str) -> Path:
    for name, text in files.items():
        file = path / "inductor" / "ab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in files_in(folder)}


def archive_in(folder: Path, tmp_path: Path) -> Path:
    path = folder / "kind.zip"
    write_archive(path, folder_of(tmp_path / "built", kernel="code", other="more"))
    return path


def test_what_was_packed_comes_out(tmp_path: Path) -> None:
    built = folder_of(tmp_path / "built", **{"kernel": "code", "kernel.lock": "", "x.tmp": "half"})
    folder_of(built / "locks", lock="")
    path, into = tmp_path / "compiled" / "kind.zip", tmp_path / "into"
    assert not read_archive(path, into), "there is none"
    write_archive(path, built)
    assert read_archive(path, into)
    assert texts(into) == {"kernel": "code"}


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of something else"])
def test_a_damaged_one_is_refused_and_replaced(tmp_path: Path, damage: str) -> None:
    path = archive_in(tmp_path / "compiled", tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"cut": content[:-7], "changed": content, "empty": bytearray(), "of something else": bytearray(b"PK\x03\x04\n")}
    path.write_bytes(changed[damage])
    with pytest.raises(ArchiveError, match=f"^{path}: is damaged$"):
        read_archive(path, tmp_path / "into")
    archive_in(tmp_path / "compiled", tmp_path)
    assert read_archive(path, tmp_path / "into")


def test_one_that_the_group_could_have_written_is_refused(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        path = archive_in(tmp_path / "compiled", tmp_path)
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o775)
    assert read_archive(path, tmp_path / "into")
    path.chmod(0o660)
    with pytest.raises(ArchiveError, match=f"^{path}: can be written to by its group, .* executed"):
        read_archive(path, tmp_path / "into")


def test_one_that_anybody_could_have_written_is_refused(tmp_path: Path) -> None:
    path = archive_in(tmp_path / "compiled", tmp_path)
    for place in (path, path.parent):
        mode = place.stat().st_mode
        place.chmod(0o777)
        with pytest.raises(ArchiveError, match=f"^{place}: can be written to by anybody, .* executed"):
            read_archive(path, tmp_path / "into")
        place.chmod(mode)
    path.parent.chmod(0o777)
    with pytest.raises(ArchiveError, match="can be written to by anybody"):
        write_archive(path, tmp_path / "built")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_one_of_another_user_is_refused(tmp_path: Path) -> None:
    path = archive_in(tmp_path / "compiled", tmp_path)
    os.chown(path, 65534, 65534)
    with pytest.raises(ArchiveError, match=f"^{path}: belongs to user nobody"):
        read_archive(path, tmp_path / "into")


def test_the_oldest_go_where_all_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, built = tmp_path / "compiled", folder_of(tmp_path / "built", kernel=os.urandom(500).hex())
    paths = [folder / f"{number}.zip" for number in range(4)]
    for age, path in enumerate(paths[:3]):
        write_archive(path, built)
        os.utime(path, (age, age))
    assert read_archive(paths[0], tmp_path / "into"), "it is used, so it is not the oldest any more"
    (folder / ".9.zip.7.beef").write_bytes(bytes(2000))  # of a writer that was killed
    os.utime(folder / ".9.zip.7.beef", (0, 0))
    monkeypatch.setattr(compile_archive, "MAX_BYTES", 2 * paths[0].stat().st_size)
    write_archive(paths[3], built)
    assert sorted(folder.iterdir()) == [paths[0], paths[3]]
    monkeypatch.setattr(compile_archive, "MAX_BYTES", 1)
    write_archive(paths[1], built)
    assert list(folder.iterdir()) == [paths[1]], "the newest stays"


WRITER = """
import sys
from pathlib import Path
from vitpa.step.compile_archive import write_archive
for _ in range(30):
    write_archive(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_several_write_one_and_it_can_be_read_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "compiled" / "kind.zip"
    built = [folder_of(tmp_path / name, kernel=name * 20_000) for name in "ab"]
    write_archive(path, built[0])
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(folder)]) for folder in built]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        into = tmp_path / "into"
        assert read_archive(path, into)
        seen.add(texts(into)["kernel"][:1])
        shutil.rmtree(into)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == {"a", "b"}
    assert list(path.parent.iterdir()) == [path]


KERNEL = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def add_one(x, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

source = ASTSource(fn=add_one, signature={"x": "*fp32", "n": "i32", "B": "constexpr"}, constexprs={"B": 64})
triton.compile(source, target=GPUTarget("cuda", 80, 32))  # which needs no GPU
"""


def test_triton_finds_a_kernel_in_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)

    def compile_into(folder: Path) -> dict[Path, int]:
        subprocess.run([sys.executable, script], env={**os.environ, "TRITON_CACHE_DIR": str(folder)}, check=True)
        return {path: path.stat().st_mtime_ns for path in files_in(folder)}

    first = compile_into(tmp_path / "first" / "triton")
    assert any(path.suffix == ".cubin" for path in first)
    write_archive(tmp_path / "compiled" / "kind.zip", tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    second = tmp_path / "second"
    assert read_archive(tmp_path / "compiled" / "kind.zip", second)
    before = {path: path.stat().st_mtime_ns for path in files_in(second)}
    assert len(before) == len(first)
    assert compile_into(second / "triton") == before, "nothing was compiled"
