"""rich's console for what may hold anything: no markup is read in it, and its control characters are shown, not sent."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from vitpa.terminal import printable, terminal_stream


class PrintableConsole(Console):
    """Prints texts as they are; only rich's own orders, for colours and for moving the cursor, reach the terminal."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        stream = terminal_stream(stderr=stderr)
        super().__init__(file=stream, stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's; where text has become segments, and nothing is laid out yet."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n"), segment.style)
