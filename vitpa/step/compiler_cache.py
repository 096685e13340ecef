"""The folder in which torch's compiler keeps what it has compiled, and from which it runs it again."""

from __future__ import annotations

import getpass
import os
import re
import stat
import tempfile
from pathlib import Path

from vitpa.arguments import ConfigError
from vitpa.data.private_folder import user_name

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def default_folder() -> Path:
    """Torch's folder where nobody names one (torch/_inductor/runtime/cache_dir_utils.py, default_cache_dir)."""
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser()))


def is_named() -> bool:
    """Whether the user has named another one; torch itself sets the variable to its own, when it is imported."""
    return os.environ.get(VARIABLE, "") not in ("", os.path.abspath(default_folder()))  # noqa: PTH100 - as torch does it


def check_compiler_cache() -> None:
    """Refuse torch's folder in /tmp if another user has made it, or may write to it: what lies there is executed.

    One that the user names, by the variable, is the user's choice.

    Raises:
        ConfigError: another user could have written there.
    """
    if is_named():
        return
    folder = default_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name another folder for the compiler, by {VARIABLE}") from error
    if stat.S_ISLNK(status.st_mode):
        what = f"is a link (of {user_name(status.st_uid)})"
    elif status.st_uid != os.geteuid():
        what = f"belongs to {user_name(status.st_uid)}"
    elif status.st_mode & stat.S_IWOTH:
        what = "can be written to by anybody"
    else:
        return
    raise ConfigError(f"{folder} {what}, and the compiler would run what lies there; name another folder by {VARIABLE}")
