"""What library code says goes through `logging`: commands print it, a program that imports vitpa decides for itself."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainings import arguments
from vitpa.terminal import LINES, logged_lines

# Trains one seed with all messages shown, then another one with those of vitpa silenced.
PROGRAM = """
import logging, sys, torch
from vitpa.config_file import load_config, record_config, shipped_configs
from vitpa.distributed import Group
from vitpa.train import train
for seed, silence in ((1, False), (2, True)):
    logging.basicConfig(level=logging.INFO, format="%(name)s|%(message)s")
    logging.getLogger("vitpa").setLevel(logging.CRITICAL if silence else logging.NOTSET)
    config = load_config(shipped_configs()["digits"], [*sys.argv[1:], f"seed={seed}"])
    checkpoints = record_config(config).checkpoints
    checkpoints.mkdir()
    (checkpoints / "step_x.pt").touch()
    assert train([config], Group(0, 1, 0, 1, torch.device("cpu")))
    print("trained", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_program_that_trains_can_silence_vitpa(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1", "runtime.step=eager", f"runtime.stage_dir={tmp_path / 'disk'}")
    command = [sys.executable, "-c", PROGRAM, *words[1:]]
    got = subprocess.run(command, capture_output=True, text=True, check=True)
    said, silenced = got.stderr.split("trained\n")[:2]
    assert (got.stdout, silenced) == ("", "")
    assert re.search(r"^vitpa\.data\.staging\|digits: copying ", said, re.MULTILINE)
    assert re.search(r"^vitpa\.training\|digits-content-s1: starts at step 0 of 22 on cpu", said, re.MULTILINE)
    assert re.search(r"^vitpa\.checkpoint\|.*/step_x\.pt: .*; it is passed over$", said, re.MULTILINE)


def test_a_command_prints_each_message_once_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger, root = logging.getLogger("vitpa.anything"), logging.StreamHandler(sys.stderr)
    logging.root.addHandler(root)  # as a library may
    try:
        with logged_lines():
            logger.debug("too much")
            logger.info("100 % of /data/[old]")
            logger.warning("two\nlines \x1b[2J")
    finally:
        logging.root.removeHandler(root)
    assert capsys.readouterr() == ("", "100 % of /data/[old]\nwarning: two\\nlines \\x1b[2J\n")
    assert LINES not in logging.getLogger("vitpa").handlers


def test_a_command_leaves_a_level_that_was_set(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("vitpa")
    logger.setLevel(logging.ERROR)
    try:
        with logged_lines():
            logger.warning("silenced")
        assert (capsys.readouterr().err, logger.level) == ("", logging.ERROR)
    finally:
        logger.setLevel(logging.NOTSET)
