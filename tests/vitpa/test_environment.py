"""The name of the code: equal names mean equal code, whatever else is committed beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.git import commit, git
from vitpa import code_version as module
from vitpa.code_version import CODE_VERSION_JSON, code_record, code_version
from vitpa.environment import environment


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package in a folder of its own, outside git."""
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "train.py").write_text("one = 1\n")
    monkeypatch.setattr(module, "PACKAGE", package)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    return package


@pytest.fixture
def checkout(package: Path) -> Path:
    """The same in a git repository, nothing committed."""
    git(package.parent, "init", "--quiet")
    return package.parent


def test_a_commit_names_the_code_and_one_beside_the_package_does_not(checkout: Path, package: Path) -> None:
    first = commit(checkout)
    assert code_version() == f"g{first}"
    (checkout / "README.md").write_text("more\n")
    assert code_version() == f"g{first}"
    assert commit(checkout) != first
    assert code_version() == f"g{first}"
    (package / "train.py").write_text("one = 2\n")
    second = commit(checkout)
    assert code_version() == f"g{second}" != f"g{first}"


def test_a_recipe_is_not_code(checkout: Path, package: Path) -> None:
    first = commit(checkout)
    (package / "mine.yaml").write_text("dataset: digits\n")
    assert code_version() == f"g{first}"  # the configuration is in the signature
    commit(checkout)
    assert code_version() == f"g{first}"


def test_an_uncommitted_change_is_part_of_the_name(checkout: Path, package: Path) -> None:
    first = commit(checkout)
    names = {code_version()}
    (package / "train.py").write_text("one = 2\n")
    names.add(code_version())
    assert code_version() == code_version()
    assert re.fullmatch(rf"g{first}\+dirty\.[0-9a-f]{{8}}", code_version())
    (package / "train.py").write_text("one = 3\n")
    names.add(code_version())
    git(checkout, "add", "--all")  # staged or not is no difference
    names.add(code_version())
    (package / "more.py").write_text("")
    names.add(code_version())
    assert len(names) == 4
    (package / "more.py").unlink()
    (package / "train.py").write_text("one = 1\n")
    git(checkout, "add", "--all")
    assert code_version() == f"g{first}"


def test_outside_git_the_sources_name_the_code(package: Path) -> None:
    first = code_version()
    assert re.fullmatch(r"s[0-9a-f]{12}", first)
    assert code_version() == first
    (package / "notes.txt").write_text("no code\n")
    assert code_version() == first
    (package / "train.py").write_text("one = 2\n")
    assert code_version() != first


def test_a_package_that_a_repository_does_not_track_is_named_by_its_sources(checkout: Path, package: Path) -> None:
    outside = code_version()
    (checkout / ".gitignore").write_text("package/\n")
    commit(checkout)
    assert code_version() == outside
    assert outside.startswith("s")


def test_without_git_installed_the_sources_name_the_code(
    checkout: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkout)
    monkeypatch.setenv("PATH", str(package))
    assert re.fullmatch(r"s[0-9a-f]{12}", code_version())


def test_a_copy_is_called_as_the_checkout_it_was_made_from_as_long_as_it_is_unchanged(
    checkout: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkout)
    (package / "train.py").write_text("one = 2\n")  # uncommitted
    record, name, state = code_record(), code_version(), module.git_state()
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / CODE_VERSION_JSON).write_text(json.dumps(record))
    monkeypatch.setattr(module, "PACKAGE", copy)
    assert (code_version(), module.git_state(), code_record()) == (name, state, record)
    assert state == (git(checkout, "rev-parse", "HEAD"), True)
    (copy / "train.py").write_text("one = 3\n")
    assert re.fullmatch(r"s[0-9a-f]{12}", code_version())
    assert module.git_state() == (None, False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"code_version": "g1"'])
def test_an_unusable_record_beside_the_sources_is_not_believed(package: Path, text: str) -> None:
    before = code_version()
    (package / CODE_VERSION_JSON).write_text(text)
    assert code_version() == before


def test_the_environment_of_this_process() -> None:
    found = environment(torch.device("cpu"))
    assert found["code_version"] == code_version()
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert all(found["versions"].values())
    assert (found["device"], found["gpu"], found["cuda"]) == ("cpu", None, None)
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", found["git_commit"])
