"""Data shared by tests: real .beton files, converted once per session."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytest_timeout
from hypothesis import HealthCheck, settings
from PIL import Image

from data_prep.prep import Options, prepare
from slurm.devcluster_processes import SignsOfLife
from tests.support.cluster import cluster
from tests.support.waiting import MARK, in_vain, ours, still
from vitpa.step.compiler_cache import VARIABLE, default_folder
from vitpa.terminal import logged_lines

os.environ.setdefault(VARIABLE, f"{default_folder()}_tests")  # steps are compiled once for all tests, not once for each root
os.environ[MARK] = str(os.getpid())  # what is started from here is known by it
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell script: what is started would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["cluster", "digits", "fresh_compiler", "photos", "warned"]

LOOK_EVERY_S = 20.0
SPIN = 12

# The same examples in every run of CI; `make fuzz` draws new ones, many more.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", _PATIENT, derandomize=True, database=None, max_examples=25)
settings.register_profile("long", _PATIENT, max_examples=2000, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation", "histories of sweeps on a simulated cluster (tests/simulation)")
    group.addoption("--histories", type=int, default=500, metavar="N", help="simulate the seeds 0 to N - 1 (default: 500)")
    group.addoption("--history", type=int, metavar="SEED", help="replay the history of this seed, and no other")
    group.addoption("--mutants", action="store_true", help="check that each bug put in on purpose is found: many minutes")


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """Have `timeout` count from the last sign of life of a test and its processes: on a busy machine all take their time.

    What moves without an end is given up at SPIN times `timeout`.
    """

    began_s, life = time.monotonic(), SignsOfLife(lambda: [os.getpid(), *ours()])

    def look(*_: object) -> None:
        idle_s, passed_s = life.idle_s(), time.monotonic() - began_s
        if idle_s < settings.timeout and passed_s < SPIN * settings.timeout:
            return
        moves = f"it has moved for {passed_s:.0f} s without an end"
        print(in_vain(item.nodeid, moves if idle_s < settings.timeout else still(idle_s)), file=sys.stderr)
        pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    vars(item)["cancel_timeout"] = cancel  # pytest-timeout calls it
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, *[min(LOOK_EVERY_S, settings.timeout)] * 2)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, and those on SLURM, which mostly wait, in turn with the others, which compute."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    waiting = [file for file in marks if "slurm" in marks[file]]
    computing = sorted((file for file in marks if "slurm" not in marks[file]), key=lambda file: "slow" not in marks[file])
    place = {file: (number, files is computing) for files in (waiting, computing) for number, file in enumerate(files)}
    items.sort(key=lambda item: place[item.path])


def quiet(_line: str) -> None:
    """Take what `prepare` says."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """The compiler keeps eight versions of a function, and refuses a ninth: tests start without those of others."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def turn_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `whole_gpu` runs while no other test uses a GPU, in whatever process of pytest-xdist; `gpu` ones share.

    Whoever waits for his turn stands in the door, so that those who come later cannot keep him from it.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    kind = fcntl.LOCK_EX if request.node.get_closest_marker("whole_gpu") else fcntl.LOCK_SH
    folder = Path(tempfile.gettempdir())
    with (folder / f"vitpa-gpu-{os.geteuid()}.lock").open("a") as room:
        with (folder / f"vitpa-gpu-{os.geteuid()}.door.lock").open("a") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, kind)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with scikit-learn's digits as .beton files."""
    out = tmp_path_factory.mktemp("digits")
    assert prepare(Options(dataset="digits", out=out), quiet)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with `photos`: JPEGs of different sizes in two classes, 12 to train on and 7 to validate."""
    source, out = tmp_path_factory.mktemp("photos_source"), tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = source / split / name
            folder.mkdir(parents=True)
            for index in range(count - (split == "val" and label)):
                height, width = (int(side) for side in rng.integers(40, 90, 2))
                coarse = rng.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(120 * label)
                Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    assert prepare(Options(dataset="photos", source=source, out=out, short_side_px=48, jpeg_quality=95), quiet)
    return out


@pytest.fixture
def warned(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], str]]:
    """`warned(match)`: a warning that matches has been printed since the last call; what was printed."""

    def look(match: str) -> str:
        told = capsys.readouterr().err
        assert re.search(rf"^warning: .*{match}", told, re.MULTILINE), told
        return told

    with logged_lines():
        yield look
