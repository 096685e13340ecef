r"""What goes to the terminal, or where else a command's output goes: readable in any encoding, and never its orders.

Logs, records, names of files and what other programs say may hold anything. Control characters of theirs are shown as
escapes (`\x1b`), so that no log can set a title, clear the screen, or write a line that looks like ours.
"""

from __future__ import annotations

import re

# C0 and C1 controls and DEL, the separators that end a line for some programs, and what turns the direction of text around
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with every control character as an escape, such as `\x1b` or `\n`: one line, safe to be shown.

    Args:
        text: Anything.
        keep: Control characters to be left as they are: newlines and tabs, for a text of several lines.
    """
    return CONTROLS.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
