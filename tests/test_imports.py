"""The house's rule: who may import whom. The imports are read from the sources, inside functions too."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

OURS = ("vitpa", "jobs", "data_prep", "slurm")
COMMAND_LINE = ("vitpa.arguments", "vitpa.errors", "vitpa.terminal", "vitpa.console", "vitpa.documents", "vitpa.child_process")
TORCH = {"torch", "jaxtyping", "torchvision", "timm", "tensorboard", "ffcv", "sklearn", "cv2"}
NOT_FOR_A_START = {
    *("ffcv", "numba", "sklearn", "cv2", "scipy", "matplotlib", "pandas", "datasets"),
    *("optuna", "submitit", "wandb", "mlflow", "vitpa.bench", "vitpa.export", "torch._inductor.compile_fx"),
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b if that is a module of ours, else as a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: write the whole name, not a relative import"
            for alias in node.names:
                inner = ROOT / Path(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in allowed)


def may_import(module: str) -> tuple[str, ...]:
    """What of ours a module may import."""
    if module == "vitpa.cli":
        return OURS
    for closed in ("vitpa.models", "vitpa.kernels", "vitpa.theory"):
        if within(module, (closed,)):
            return (closed,)
    if within(module, ("vitpa",)):
        return ("vitpa",)
    if within(module, ("jobs", "data_prep")):
        return (module.split(".", maxsplit=1)[0], "vitpa")  # of vitpa what needs no torch: test_a_login_node_needs_no_torch
    return ("slurm", *COMMAND_LINE)


@pytest.mark.parametrize("package", OURS)
def test_every_module_imports_only_what_it_may(package: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules(package)
        for name in imported(path)
        if within(name, OURS) and not within(name, may_import(module))
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["models", "theory"])
def test_models_and_theory_need_torch_and_timm_only(room: str) -> None:
    allowed = (
        "__future__",
        "abc",
        "typing",
        "collections",
        "dataclasses",
        "math",
        "torch",
        "timm",
        "jaxtyping",
        f"vitpa.{room}",
    )
    wrong = [
        (module, name) for module, path in modules(f"vitpa/{room}") for name in imported(path) if not within(name, allowed)
    ]
    assert not wrong


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = ("typing", "torch", "triton", "jaxtyping", "vitpa.kernels")
    wrong = [
        (module, name) for module, path in modules("vitpa/kernels") for name in imported(path) if not within(name, allowed)
    ]
    assert not wrong


def needs(module: str) -> set[str]:
    """The modules that are imported when `module` is, ours and others', inside functions too."""
    found: set[str] = set()
    todo = {module}
    while todo:
        name = todo.pop()
        found.add(name)
        path = ROOT / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if within(name, OURS):
            todo |= imported(path) - found
    return found


@pytest.mark.parametrize("package", ["jobs", "data_prep"])
def test_a_login_node_needs_no_torch(package: str) -> None:
    readers = {"cv2", "ffcv", "sklearn", "torchvision"} if package == "data_prep" else set()  # of images
    views = {"jobs.report.tensorboard": {"tensorboard"}}  # which needs no torch itself
    wrong = [
        (module, name)
        for module, path in modules(package)
        for direct in imported(path)
        for name in (needs(direct) if within(direct, ("vitpa",)) else {direct})
        if name.split(".")[0] in TORCH - readers - views.get(module, set())
    ]
    assert not wrong


@pytest.mark.slow
def test_a_training_imports_nothing_that_it_can_begin_without() -> None:
    """Importing is a quarter of a warm start. What else is imported up to the first step is torch's, timm's and ours."""
    code = "import json, sys, vitpa.cli, vitpa.train_command; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(json.loads(answer.stdout))
    assert {"torch", "timm", "vitpa.train"} <= found
    assert not found & NOT_FOR_A_START


def test_tests_import_their_helpers_from_support_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules("tests")
        for name in imported(path)
        if within(name, ("tests",)) and not within(name, ("tests.support", "tests.conftest"))
    ]
    assert not wrong


def test_datasets_is_a_table() -> None:
    assert imported(ROOT / "vitpa/datasets.py") == {"__future__", "dataclasses"}


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import os.path\nfrom vitpa import train\nfrom vitpa.config import RunConfig\ndef f():\n    import jobs.state\n"
    )
    assert imported(path) == {"os.path", "vitpa.train", "vitpa.config", "jobs.state"}


def test_no_file_is_called_by_a_word_that_says_nothing() -> None:
    names = {path.stem for package in OURS for _, path in modules(package)}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "misc", "registry", "callbacks"})
