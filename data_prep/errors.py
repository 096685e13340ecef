"""What `vitpa prep` tells its user: the one error to act on, and names as they can be shown."""

import os
import re

from vitpa.errors import UserError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class PrepError(UserError):
    """A conversion that cannot be done: what, where and how to fix it; lists follow on lines of their own."""

    keep = "\n"


def shown(path: str) -> str:
    """A name in one line: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
