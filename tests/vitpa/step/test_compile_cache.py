"""Which trainings share what was compiled, where they compile, and that nothing of it stops a training."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import codecache

from tests.support.trainings import arguments, config_of
from vitpa.config import RunConfig
from vitpa.distributed import Group
from vitpa.records import ProcessId, write_json
from vitpa.step import compile_cache as compiled
from vitpa.step.compile_cache import OWNER, VARIABLES, compile_cache, hash_compilers, kind_of_step
from vitpa.step.compiler_cache import VARIABLE, default_folder

GROUP = Group(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a training whose step is compiled, on a machine of its own where the user names no folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv(VARIABLE, str(default_folder()))  # as torch does when it is imported
    return arguments(tmp_path, tmp_path / "out", "runtime.step=compile")


def changed(words: list[str], *changes: str) -> RunConfig:
    values = {word.partition("=")[0]: word for word in (*words[1:], *changes)}
    return config_of([words[0], *values.values()])


def compile_something(config: RunConfig, text: str = "code") -> Path | None:
    """What a training does; the archive."""
    with compile_cache([config], GROUP) as cache:
        if cache is None:
            return None
        Path(os.environ[VARIABLE]).mkdir(parents=True, exist_ok=True)
        (Path(os.environ[VARIABLE]) / "graph").write_text(text)
        cache.save()
        return cache.archive


def known(config: RunConfig) -> bool:
    with compile_cache([config], GROUP) as cache:
        assert cache is not None
        return bool(cache.kept)


def test_a_later_start_has_what_was_compiled(words: list[str], tmp_path: Path) -> None:
    config, before = config_of(words), {name: os.environ.get(name) for name in VARIABLES}
    assert not known(config)
    archive = compile_something(config)
    assert archive is not None
    assert archive.parent == tmp_path / "out" / "compiled"
    with compile_cache([config], GROUP) as cache:
        assert cache is not None
        assert (Path(os.environ[VARIABLE]) / "graph").read_text() == "code"
        written = archive.stat().st_mtime_ns
        cache.save()
        assert archive.stat().st_mtime_ns == written, "nothing new"
    assert {name: os.environ.get(name) for name in VARIABLES} == before
    assert not any((tmp_path / "tmp").rglob("graph")), "its folder is removed"


def test_what_shapes_the_step_and_the_code_tell_kinds_apart(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(words)
    assert compile_something(config)
    same = ("seed=7", "optim.lr=0.5", "runtime.log_every_steps=7", "runtime.stop_after_epoch=1")
    assert known(changed(words, *same))
    for other in ("model.depth=3", "train.global_batch_size=32", "runtime.accum_steps=2", "train.epochs=5"):
        assert not known(changed(words, other)), other
    assert kind_of_step([config] * 2, GROUP)["replicas"] == 2
    monkeypatch.setattr(compiled, "code_version", lambda: "other")
    assert not known(config)


def test_it_is_left_alone_where_it_is_not_wanted(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for change in ("runtime.compile_cache=null", "runtime.step=eager", "runtime.step=auto"):
        assert compile_something(changed(words, change)) is None, change
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert compile_something(config_of(words)) is None


@pytest.mark.parametrize("damage", ["changed", "of another user"])
def test_what_cannot_be_used_is_compiled_again(words: list[str], damage: str, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(words)
    archive = compile_something(config)
    assert archive is not None
    if damage == "changed":
        archive.write_bytes(archive.read_bytes()[:-1])
    else:
        archive.chmod(0o666)
    with caplog.at_level("INFO", logger=compiled.__name__):
        assert not known(config)
    (line,) = caplog.messages
    assert line.startswith(f"what was compiled before is not used: {archive}: ")
    assert compile_something(config) == archive
    assert known(config)


def test_a_folder_that_cannot_be_written_is_said(words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config = changed(words, "runtime.compile_cache=/proc/compiled")
    with caplog.at_level("INFO", logger=compiled.__name__):
        assert compile_something(config)
    assert caplog.messages == ["what was compiled is not kept for later starts: /proc/compiled: No such file or directory"]


def test_folders_of_killed_processes_go(words: list[str], tmp_path: Path) -> None:
    parent = tmp_path / "tmp" / f"vitpa-compiled-{os.geteuid()}"
    parent.mkdir(mode=0o700)
    mine = ProcessId.mine()
    owners = {
        "dead": mine.model_copy(update={"start_ticks": 1}),
        "alive": mine,
        "elsewhere": mine.model_copy(update={"host": "x"}),
    }
    for name, owner in owners.items():
        (parent / name).mkdir()
        write_json(parent / name / OWNER, {"process": owner.model_dump()})
    compile_something(config_of(words))
    assert {path.name for path in parent.iterdir()} == {"alive", "elsewhere"}


def test_the_files_of_the_compilers_are_hashed_meanwhile() -> None:
    """The keys are those that Inductor would have found by itself."""
    if not hasattr(codecache.torch_key, "prefetch"):
        pytest.skip("this version of torch hashes them when it needs them")
    keys: tuple[Any, ...] = (codecache.torch_key, codecache.triton_key)
    for key in keys:
        expected = key()
        key.clear()
        hash_compilers()
        assert inspect.getclosurevars(key).nonlocals["_future"] is not None, "nobody is at it"
        assert key() == expected


def test_a_folder_of_another_user_is_said(words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tmp" / f"vitpa-compiled-{os.geteuid()}").mkdir()
    (tmp_path / "tmp" / f"vitpa-compiled-{os.geteuid()}").chmod(0o777)
    with caplog.at_level("INFO", logger=compiled.__name__):
        assert compile_something(config_of(words)) is None
    assert "what was compiled is neither taken over nor kept: others may write to" in caplog.text


PROCESSES = """
import os, sys
from pathlib import Path
from vitpa import distributed
from vitpa.config_file import load_config
from vitpa.step.compile_cache import compile_cache
from vitpa.step.compiler_cache import VARIABLE

group = distributed.init_process_group("cpu")
config = load_config(Path(sys.argv[1]), sys.argv[2:])
with compile_cache([config], group) as cache:
    folder = Path(os.environ[VARIABLE])
    found = sorted(path.name for path in folder.glob("*"))
    group.all_gather(None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"graph{group.rank}").write_text("code")
    cache.save()
    print(f"rank {group.rank}: {found} in {folder}", flush=True)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_processes_of_a_node_share_a_folder(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    words = arguments(tmp_path, tmp_path / "out", "runtime.step=compile")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words]
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE} | {"OMP_NUM_THREADS": "1"}
    for found in ([], ["graph0", "graph1"]):
        told = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        places = {line.rpartition(" ")[2] for line in told}
        assert sorted(told) == [f"rank {rank}: {found} in {place}" for place in places for rank in range(2)]
        assert len(places) == 1
        assert not Path(*places).exists()
