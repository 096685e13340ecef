"""How paths and numbers are read: one meaning on the command line and in files."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vitpa.arguments import (
    ConfigError,
    expand_path,
    in_shell,
    literal_path,
    name_or_path,
    number,
    parse_float,
    parse_integer,
    whole_number,
    whole_numbers,
)
from vitpa.cli import main
from vitpa.cli import parser as commands
from vitpa.config_file import load_config


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("VITPA_DISK", "/disk")
    monkeypatch.setenv("VITPA_EMPTY", "")
    monkeypatch.setenv("VITPA_TILDE", "~")
    monkeypatch.delenv("VITPA_UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/someone"),
        ("~/out", "/home/someone/out"),
        ("~root/out", "/root/out"),
        ("$VITPA_DISK/out", "/disk/out"),
        ("${VITPA_DISK}2", "/disk2"),
        ("~/$$VITPA_DISK", "/home/someone/$VITPA_DISK"),
        ("a$", "a$"),
        ("a~/$(b)", "a~/$(b)"),
        ("$VITPA_TILDE/x", "~/x"),  # as in a shell: what a variable holds is not read again
        ("outputs", "outputs"),
    ],
)
def test_a_path_is_expanded_as_in_a_shell(text: str, path: str) -> None:
    assert expand_path(text) == Path(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("$VITPA_UNSET/out", "$VITPA_UNSET is not set here"),
        ("x/${VITPA_UNSET}", "${VITPA_UNSET} is not set here"),
        ("$VITPA_EMPTY/out", "$VITPA_EMPTY is empty here"),
        ("${VITPA_DISK:-x}", "${VITPA_DISK:-x} is not set here"),
        ("~nobody-has-this-name/x", "there is no user nobody-has-this-name; write ./~nobody-has-this-name"),
        ("", "an empty path"),
        ("a\0b", "a path cannot hold the character"),
        ("a\ud800", "a character of it cannot be in a path"),
    ],
)
def test_what_is_no_path_is_one_line_that_names_the_key(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"runtime.root={text}: {why}")) as raised:
        expand_path(text, "runtime.root")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["/a $x/${y}$$/~z", "~x/y", "~", "-x", "$HOME", "a b/'c\"", "outputs"])
def test_a_path_comes_back_as_it_was(path: str) -> None:
    assert expand_path(literal_path(Path(path))) == Path(path)
    (word,) = shlex.split(in_shell(path))
    assert (expand_path(word), word.startswith("-")) == (Path(path), False)


def test_the_configuration_keeps_what_was_written_and_expands_what_is_used() -> None:
    config = load_config(Path("digits"), ["runtime.root=~/out", "runtime.data_dir=$VITPA_DISK/data"])
    assert config.runtime.root == "~/out"
    assert config.run_dir.path.parent == Path("/home/someone/out/runs")
    assert config.runtime.data_path == Path("/disk/data")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            "sweep plan ~/s.yaml --root ~/r --data-dir=$VITPA_DISK --profile=~/p.yaml --speeds=~/f",
            "sweep root data_dir profile",
        ),
        ("sweep collect demo --root=$VITPA_DISK", "root"),
        ("doctor --root=~/r --data-dir=~/d --profile=$VITPA_DISK/p.yaml", "root data_dir profile"),
        ("prep digits --source=~/s --out=$VITPA_DISK/o", "source out"),
        ("devcluster start --dir=~/d", "dir"),
    ],
)
def test_every_option_that_is_a_path_is_expanded(arguments: str, found: str) -> None:
    options = vars(commands().parse_args(arguments.split()))
    for name in found.split():
        assert str(options[name]).startswith(("/home/someone", "/disk")), name


@pytest.mark.parametrize(
    "arguments",
    [
        "sweep plan demo --root=$VITPA_UNSET/x",
        "sweep plan $VITPA_UNSET.yaml",
        "doctor --profile $VITPA_UNSET",
        "prep digits --out $VITPA_UNSET",
        "devcluster status --dir $VITPA_UNSET",
        "train $VITPA_UNSET",
    ],
)
def test_an_unset_variable_is_a_line_and_no_folder(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert re.search(r"error: .*\$VITPA_UNSET is not set here", capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("010", 10), ("+7", 7), ("-0", 0), ("0o17", 15), ("0x1F", 31), ("007", 7)],
)
def test_a_whole_number_is_that_of_yaml_1_2(text: str, value: int) -> None:
    assert parse_integer(text) == value


@pytest.mark.parametrize(
    "text", ["", "1_0", " 3", "3 ", "3\n", "٣", "²", "1:30", "0b1", "0o8", "-0x1", "1.0", "1e3", "0x", "on", "9" * 101]
)
def test_what_is_no_whole_number(text: str) -> None:
    assert parse_integer(text) is None
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a whole number from 0 up"):
        whole_number(0)(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected whole numbers from 0 up with commas between"):
        whole_numbers(0)(f"1,{text}")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("010", 10.0), ("-1.5E+2", -150.0), ("0x10", 16.0)]
)
def test_a_number_is_that_of_yaml_1_2(text: str, value: float) -> None:
    assert parse_float(text) == value


@pytest.mark.parametrize("text", ["", "1_0.0", "nan", "inf", "Infinity", " 1", "1:30", "1,5", "٣.٣", "1e", "1e999", "0", "-1"])
def test_what_is_no_number_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number above 0"):
        number(0, above=True)(text)


def test_bounds_are_named() -> None:
    assert whole_number(1, 100)("100") == 100
    with pytest.raises(argparse.ArgumentTypeError, match=r"'101' is not a whole number from 1 to 100"):
        whole_number(1, 100)("101")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'1\.5' is not a number from 0 to 1"):
        number(0, 1)("1.5")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'61' is not a number above 0, up to 60"):
        number(0, 60, above=True)("61")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'1,5': expected whole numbers from 1 to 4 with commas between"):
        whole_numbers(1, 4)("1,5")
    assert whole_numbers(0)("0,010,2") == [0, 10, 2]
    assert name_or_path("./demo") == "./demo"


HUGE = "1" + "0" * 20


@pytest.mark.parametrize(
    "arguments",
    [
        f"devcluster start --nodes {HUGE}",
        f"devcluster start --gpus {HUGE}",
        f"doctor --wait-s {HUGE}",
        f"sweep logs demo --lines {HUGE}",
        f"sweep plan demo --gpu-hour-price {HUGE}",
        f"prep digits --workers {HUGE}",
        f"prep digits --short-side-px {HUGE}",
        f"bench imagenet --batch-size {HUGE}",
        f"bench imagenet --gpus 1,{HUGE}",
        f"bench imagenet --window-s {HUGE}",
        f"bench small --replicas {HUGE}",
    ],
)
def test_every_number_of_a_command_line_has_an_upper_bound(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert re.search(rf"error: .*{HUGE}': expected .* to |{HUGE}' is not a .*number .*to ", capsys.readouterr().err)
