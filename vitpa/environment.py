"""What ran: the version of the code, of the libraries, and the hardware, for env.json and result.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent


def code_version() -> str:
    """A name for the code of this package: equal names mean equal code.

    In a git checkout `g<commit>` of the last commit that changed the package, with `+dirty.<hash of the change>` for
    uncommitted changes; elsewhere `s<hash of the sources>`.
    """
    commit = _git("log", "-1", "--format=%h", "--abbrev=12", "--", "*.py")  # recipes are part of the signature instead
    changed = _git("status", "--porcelain", "--", "*.py")
    if not commit or changed is None:
        return "s" + _sources_sha256()[:12]
    return f"g{commit}" + (f"+dirty.{_sources_sha256()[:8]}" if changed else "")


def _git(*arguments: str) -> str | None:
    """git's answer about the package's folder; None without git or outside a checkout."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _sources_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of this process."""
    packages = ("torch", "torchvision", "timm", "ffcv", "numpy", "submitit", "tensorboard")
    return {
        "code_version": code_version(),
        "git_commit": _git("rev-parse", "HEAD") or None,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
