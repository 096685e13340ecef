"""Running kernels on the CPU: Triton's interpreter is chosen before Triton is imported, so in a process of its own.

`python -m tests.support.interpreter MODULE` runs a module so.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import subprocess
import sys
from typing import Any

from tests.support.repository import ROOT


def report_of(module: str) -> dict[str, Any]:
    """What a module prints as a program, as JSON, when Triton interprets its kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreter", module],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


class Patched:
    """What the interpreter calls at the end of a kernel: Triton's language stays as it is."""

    def restore(self) -> None:
        """Do nothing."""


def quicken() -> None:
    """Have the interpreter do once what it does at each step: what it computes stays the same.

    It replaces the functions of Triton's language at each call of a kernel and of what that calls, and makes a table of data
    types to look up that of a tensor.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[frozenset[str]] = set()
    look_up, known = interpreter._get_np_dtype, dict[str, Any]()

    def patch_once(function: Any) -> Patched:
        seen = [each for each in function.__globals__.values() if inspect.ismodule(each) and each in (tl, tl.core)]
        languages = frozenset(each.__name__ for each in seen)
        if languages not in patched:
            patched.add(languages)
            patch(function)
        return Patched()

    def dtype_of(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = dtype_of


if __name__ == "__main__":
    quicken()
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
