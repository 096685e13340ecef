"""What a process that was killed while compiling leaves in the compiler's cache goes before the next compilation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from vitpa.step.unfinished_builds import remove_unfinished

LIBRARY = next(Path(np.__file__).parent.rglob("*.so")).read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Inductor's cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "ab").mkdir()
    return tmp_path


@pytest.mark.parametrize("kept", [0, 1, 63, 64, len(LIBRARY) // 2, len(LIBRARY) - 1])
@pytest.mark.parametrize("name", ["cabc.main.so", "cabc.main.o"])
def test_libraries_that_were_cut_go(cache: Path, name: str, kept: int) -> None:
    path = cache / "ab" / name
    path.write_bytes(LIBRARY[:kept])
    assert remove_unfinished() == [path]
    assert not path.exists()


@pytest.mark.parametrize("name", ["cabc.py", "cabc.cpp", "cabc.best_config", "kernel.cubin", "__grp__kernel.json"])
def test_empty_files_go(cache: Path, name: str) -> None:
    path = cache / "ab" / name
    path.touch()
    assert remove_unfinished() == ([] if name.startswith("_") else [path])


def test_what_is_whole_or_of_others_stays(cache: Path, tmp_path: Path) -> None:
    (cache / "locks").mkdir()
    for name, content in {
        "ab/c.so": LIBRARY,
        "ab/c.py": b"x",
        "locks/c.lock": b"",
        "ab/.1.2.tmp": b"",
        "ab/__init__.py": b"",
    }.items():
        (cache / name).write_bytes(content)
    assert remove_unfinished() == []


def test_what_another_process_is_building_stays(cache: Path) -> None:
    (cache / "locks").mkdir()
    path = cache / "ab" / "cabc.main.so"
    path.touch()
    with FileLock(cache / "locks" / "cabc.lock"):
        assert remove_unfinished() == []
        assert path.exists()
    assert remove_unfinished() == [path]


def test_tritons_cache_elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = tmp_path / "triton-of-mine"
    (triton / "hash").mkdir(parents=True)
    (triton / "tmp.pid_1_x").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    for folder in ("hash", "tmp.pid_1_x"):
        (triton / folder / "kernel.cubin").touch()
    assert remove_unfinished() == [triton / "hash" / "kernel.cubin"]


@pytest.mark.slow
def test_a_real_compilation_goes_well_after_its_library_was_emptied(cache: Path) -> None:
    program = """
        import sys, torch
        from vitpa.step.unfinished_builds import remove_unfinished

        removed = remove_unfinished() if sys.argv[1] == "with" else []
        print(len(removed), float(torch.compile(lambda x: x.sin() + 1)(torch.ones(100))[0]))
    """

    def compiled(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(program), how]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    number, value = compiled("with").stdout.split()
    assert (number, math.isclose(float(value), math.sin(1) + 1, rel_tol=1e-6)) == ("0", True)
    libraries = list(cache.rglob("*.so"))
    assert libraries
    for library in libraries:
        os.truncate(library, 0)
    assert compiled("without").returncode != 0  # as it is without us
    assert compiled("with").stdout.split() == [str(len(libraries)), value]
