"""Which vitpa this is: its version, where its code lies, and whether Python keeps packages compiled. Torch-free."""

import importlib.util
from pathlib import Path

VERSION = "0.1.0"
CODE = Path(__file__).resolve().parent.parent  # the folder of the packages that run: a checkout, a snapshot, or site-packages
NO_BYTECODE = "no .pyc files are kept of it: every process compiles its Python files again, before it does anything"
KEEP_BYTECODE = "unset PYTHONDONTWRITEBYTECODE; where its folder cannot be written to, set PYTHONPYCACHEPREFIX to one that can"


def has_bytecode(package: str) -> bool:
    """Whether there is a .pyc file of a package, where Python looks for it; True of what is not installed."""
    spec = importlib.util.find_spec(package)
    origin = spec.origin if spec is not None and spec.has_location else None
    return origin is None or Path(importlib.util.cache_from_source(origin)).exists()
