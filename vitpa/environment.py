"""What ran: the version of the code, of the libraries, and the hardware, for env.json and result.json."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from typing import Any

import torch

from vitpa.code_version import code_version, git_state


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of this process."""
    commit, dirty = git_state()
    packages = ("torch", "torchvision", "timm", "ffcv", "numpy", "submitit", "tensorboard")
    return {
        "code_version": code_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
