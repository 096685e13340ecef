"""The name of the code of this package: equal names mean equal code. For env.json, result.json and snapshots.

A snapshot (jobs/submit/snapshot.py) is a copy without git; `CODE_VERSION.json` among its sources says what they are called,
and is believed as long as the sources are those it was written for.
"""

from __future__ import annotations

import hashlib
import subprocess
from typing import Any

from vitpa.child_process import run_program
from vitpa.documents import JSON_BYTES, DocumentError, parse_json, read_bytes
from vitpa.installation import CODE

PACKAGE = CODE / "vitpa"
CODE_VERSION_JSON = "CODE_VERSION.json"  # in the package's folder of a snapshot
RECORDED = {"code_version", "sources_sha256", "git_commit", "git_dirty"}  # in it


def code_version() -> str:
    """A name for the code of this package: equal names mean equal code.

    In a git checkout `g<commit>` of the last commit that changed the package, with `+dirty.<hash of the change>` for
    uncommitted changes; in a snapshot the name of the checkout it was made from; elsewhere, and in a snapshot that was
    changed, `s<hash of the sources>`.
    """
    record = _record()
    if record is not None:
        return str(record["code_version"])
    commit = _git("log", "-1", "--format=%h", "--abbrev=12", "--", "*.py")  # recipes are part of the signature instead
    changed = _git("status", "--porcelain", "--", "*.py")
    if not commit or changed is None:
        return "s" + _sources_sha256()[:12]
    return f"g{commit}" + (f"+dirty.{_sources_sha256()[:8]}" if changed else "")


def git_state() -> tuple[str | None, bool]:
    """The checkout's commit, None outside git, and whether any tracked file differs from it; a snapshot's are its origin's."""
    record = _record()
    if record is not None:
        return record["git_commit"], record["git_dirty"]
    return _git("rev-parse", "HEAD") or None, bool(_git("status", "--porcelain", "--untracked-files=no"))


def code_record() -> dict[str, Any]:
    """What a snapshot of the code that is here has to say in its `CODE_VERSION.json`."""
    commit, dirty = git_state()
    return {
        "code_version": code_version(),
        "sources_sha256": _sources_sha256(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _record() -> dict[str, Any] | None:
    """What `CODE_VERSION.json` says, if there is one and it belongs to the sources that are here."""
    try:
        record = parse_json(read_bytes(PACKAGE / CODE_VERSION_JSON, JSON_BYTES))
    except (OSError, DocumentError):
        return None
    whole = isinstance(record, dict) and record.keys() >= RECORDED
    return record if whole and record["sources_sha256"] == _sources_sha256() else None


def _sources_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    """git's answer about the package's folder; None without git or outside a checkout."""
    try:
        answer = run_program(["git", "-C", str(PACKAGE), *arguments], timeout_s=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
