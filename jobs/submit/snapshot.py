"""A copy of the code for the jobs of a submission: what was submitted is what runs, whatever is edited in the meantime.

`<root>/code/<code version>-<hash of all files>/` holds the packages `vitpa` and `jobs` and goes first on PYTHONPATH. It is
addressed by its content: made once, found again, and put right if a file of it was lost or edited.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import SweepError
from jobs.submit.submission import WRITERS
from vitpa.code_version import CODE_VERSION_JSON, RECORDED, code_record
from vitpa.documents import JSON_BYTES, DocumentError, parse_json, read_bytes
from vitpa.installation import CODE
from vitpa.records import make_folders, sync_folder, to_json, write_atomic
from vitpa.rundir import TAKEN

PACKAGES = ("vitpa", "jobs")
KINDS = (".py", ".yaml", ".typed")
RECORD = f"vitpa/{CODE_VERSION_JSON}"


def make_snapshot(root: Path) -> Path:
    """Copy the code that runs here below `root`, unless that copy is there already.

    Several launchers may do this at once, and be killed in between: a snapshot appears whole or not at all. The disk
    holds it when this returns: no power loss takes anything of it.

    Returns:
        The folder to put first on PYTHONPATH.

    Raises:
        SweepError: the code is being edited, the disk is full or must not be written to, or a snapshot holds a stray file.
    """
    files, version = _read_code()
    digest = hashlib.sha256()
    for path, content in files.items():
        if path != RECORD:  # it names a commit of the whole repository; several may hold the same code
            digest.update(f"{path} {len(content)}\n".encode() + content)
    target = (root / "code" / f"{version}-{digest.hexdigest()[:12]}").absolute()
    if os.pathsep in str(target):
        raise SweepError(f"{target}: a snapshot of the code cannot lie below a name with '{os.pathsep}'; choose another root")
    try:
        make_folders(target.parent)
        if not target.exists():
            _create(target, files)
        _put_right(target, files)
        sync_folder(target.parent)  # also if it was there: another launcher may have made it in this moment
    except OSError as error:
        hint = "fix that, or submit with --code live"
        raise SweepError(f"{target}: the code cannot be copied there ({error.strerror}); {hint}") from error
    return target


def _read_code() -> tuple[dict[str, bytes], str]:
    """All files of the code by their path, with the record of its name, and that name."""
    for _ in range(3):
        record = code_record()
        files = {path.relative_to(CODE).as_posix(): path.read_bytes() for name in PACKAGES for path in _files_in(CODE / name)}
        if code_record() == record:
            return {**files, RECORD: to_json(record).encode()}, str(record["code_version"])
    raise SweepError(f"{CODE}: the code changes while it is copied; submit again when it is saved")


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())


def _create(target: Path, files: dict[str, bytes]) -> None:
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        _write(draft, files)
        draft.rename(target)
    except OSError as error:
        if error.errno not in TAKEN:  # another launcher was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put_right(target: Path, files: dict[str, bytes]) -> None:
    """Write again what is missing or differs; jobs that run from there can only gain by it."""
    bad = [path for path, content in files.items() if not _is_same(path, target / path, content)]
    _write(target, {path: files[path] for path in bad})
    for found in _files_in(target):
        if found.relative_to(target).as_posix() not in files:
            raise SweepError(f"{found}: is not of the code that this is a copy of; remove that file")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder, on the disk with all folders that they are in."""
    for parent in sorted({(folder / path).parent for path in files}):
        make_folders(parent)

    def write(path: str) -> None:
        write_atomic(folder / path, files[path])
        (folder / path).chmod(0o444)  # not edited by mistake

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, files))


def _is_same(path: str, there: Path, content: bytes) -> bool:
    """Whether a file of the snapshot is as it has to be; its record may name another commit of the same code."""
    if not there.is_file():
        return False
    try:
        if path != RECORD:
            return read_bytes(there, len(content)) == content
        ours, theirs = parse_json(content), parse_json(read_bytes(there, JSON_BYTES))
    except DocumentError:  # among others: it is larger
        return False
    same = ("code_version", "sources_sha256")
    return isinstance(theirs, dict) and theirs.keys() >= RECORDED and all(ours[key] == theirs[key] for key in same)
