"""`vitpa theory`: files, figures, and that an experiment that was interrupted ends as if it had not been."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from vitpa.cli import main
from vitpa.theory.descent import State
from vitpa.theory_command import command
from vitpa.theory_command.command import EXPERIMENTS

SMALL = ["--seeds", "2", "--samples", "300", "--test-samples", "500", "--steps", "40"]
SMALLEST = {
    "association": SMALL,
    "gaussian": SMALL,
    "transfer": [*SMALL, "--sizes", "10,20", "--transfer-steps", "20"],
}
FIGURES = {"association": ["association", "alternatives"], "gaussian": ["gaussian", "gaussian_A"], "transfer": ["transfer"]}


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def interrupted_at(step: int) -> Callable[[object], Callable[[State], None]]:
    def at_step(state: State) -> None:
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)

    return lambda _: at_step


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_interrupted_experiment_ends_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DRAWINGS", dict.fromkeys((kind for kind, _ in EXPERIMENTS.values()), lambda *_: None))
    words = ["theory", name, *SMALLEST[name], "--out"]
    with monkeypatch.context() as patched:
        patched.setattr(command, "progress_line", interrupted_at(17))
        assert main([*words, str(tmp_path / "halves")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "vitpa theory: interrupted; the same command goes on from here\n"
    half = document(tmp_path / "halves" / f"{name}.json")
    assert not half["finished"]
    assert half["state"]["step"] == 17
    assert main([*words, str(tmp_path / "halves")]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    file, whole = tmp_path / "halves" / f"{name}.json", tmp_path / "whole" / f"{name}.json"
    assert file.read_bytes() == whole.read_bytes()
    assert document(whole)["finished"]
    assert document(whole)["settings"]["seeds"] == 2
    assert {row["seed"] for row in document(whole)["rows"]} == {0, 1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_finished_experiment_has_a_table_and_figures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["theory", name, *SMALLEST[name], "--out", str(tmp_path)]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith(f"numbers and figures: {tmp_path}\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {f"{name}.json", *(f"{figure}.{suffix}" for figure in FIGURES[name] for suffix in ("png", "svg"))}
    if name == "transfer":  # once more, and nothing is left to do; drawing the others again would only take time
        assert main([*words, "--json"]) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert json.loads(capsys.readouterr().out)["summary"] == document(tmp_path / "transfer.json")["summary"]


def test_other_settings_and_changed_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["theory", "gaussian", *SMALL, "--out", str(tmp_path)]
    assert main(words) == 0
    file = tmp_path / "gaussian.json"
    before = file.read_bytes()
    assert main([*words, "--lr", "0.2"]) == 1
    assert "has other settings (lr 0.1 instead of 0.2); choose another --out, or remove it" in capsys.readouterr().err
    assert file.read_bytes() == before
    for text, why in (
        (before.replace(b'"finished": true', b'"finished": false'), "was changed after it was written"),
        (before[:100], "gaussian.json: "),
        (b"{}", "not written by this version of `vitpa theory gaussian`"),
    ):
        file.write_bytes(text)
        assert main(words) == 1
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("association --lr 0.5 --max-lr 0.1", "--max-lr 0.1 is below --lr 0.5"),
        ("association --patches 7 --sets 3", "2 or more sets of 2 or more patches each"),
        ("transfer --sets 1", "2 or more sets of 2 or more patches each"),
        ("association --dim 2", "choose 3 or more"),
        ("gaussian --block 3", "does not divide --side 4"),
        ("gaussian --block 4", "less than --side 4"),
        ("association --samples 999999999", "choose fewer --samples or --seeds"),
        ("gaussian --steps 90 --samples 50 --test-samples 50 --lr 900 --max-lr 900", "diverged at step"),
    ],
)
def test_what_cannot_be_is_one_line(words: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", *words.split(), "--out", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert why in error
    assert error.startswith("vitpa theory: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_says_where_its_value_comes_from(name: str) -> None:
    kind = EXPERIMENTS[name][0]
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        text = get_args(hints[each.name])[1]
        assert any(mark in text for mark in ("(paper", "(code", "(read off", "(ours")), text
