"""The README is true: its commands exist and parse, its recipes, sweeps and profiles load, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitpa.cli
from jobs.profile import load_profile
from jobs.sweep import load_sweep
from slurm.devcluster import default_root
from slurm.devcluster_config import Layout
from tests.support.repository import ROOT
from vitpa.train import command_parser, configs_of

README = (ROOT / "README.md").read_text()


def commands() -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if command:
                yield command


COMMANDS = sorted(set(commands()))


def test_there_are_commands_of_every_kind() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"make", "vitpa", "torchrun", "tensorboard", "export"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vitpa train") or "vitpa.train" in c])
def test_training_commands_load(command: str) -> None:
    words = shlex.split(command)
    options = command_parser().parse_args(words[words.index("train" if words[0] == "vitpa" else "vitpa.train") + 1 :])
    assert all(config.signature for config in configs_of(options.config, options.overrides, options.seeds))


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("vitpa (prep|sweep|devcluster)", c)])
def test_other_commands_parse_and_name_what_exists(command: str, tmp_path: Path) -> None:
    options = vitpa.cli.parser().parse_args(shlex.split(command)[1:])
    if command.startswith("vitpa sweep"):
        assert load_sweep(options.sweep, tmp_path).config
        if "--profile" in command:
            profile = options.profile.replace("my_cluster.yaml", "cluster")  # a user's copy
            assert load_profile(profile)


def test_the_devcluster_is_where_the_readme_says() -> None:
    assert f"export SLURM_CONF={Layout(default_root()).slurm_conf}" in [
        c.replace("$(id -u)", str(os.geteuid())) for c in COMMANDS
    ]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_named_files_and_sweeps_exist() -> None:
    shipped = {path.stem for path in (ROOT / "jobs/sweeps").glob("*.yaml")}
    assert all(f"`{name}`" in README for name in shipped)
    assert all(f"`{path.stem}`" in README for path in (ROOT / "slurm").glob("*.yaml"))


def test_ci_calls_the_readmes_test_command() -> None:
    assert "make test" in COMMANDS
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()
