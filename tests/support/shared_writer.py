"""One writer of .beton files for all tests of a file: FFCV's takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import data_prep.command
import data_prep.prep
from data_prep.write import Writer


class SharedWriter:
    """One real process for all conversions of this file, as importing FFCV takes 5 s; a new one after it has ended."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._writer: Writer | None = None

    def __enter__(self) -> Writer:
        if self._writer is None or self._writer._process.returncode is not None:
            self._writer = self._stack.enter_context(Writer())
        return self._writer

    def __exit__(self, *error: object) -> None:
        """Left running for the next."""

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def writer() -> Iterator[SharedWriter]:
    shared = SharedWriter()
    yield shared
    shared.close()


@pytest.fixture(autouse=True)
def _one_writer(writer: SharedWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_prep.prep, "Writer", lambda: writer)
