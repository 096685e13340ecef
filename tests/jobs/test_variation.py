"""Sweeps made on the command line: names, values, what is found again by the same words, and errors in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from jobs.context import Context, load_context
from jobs.sweep import SweepDir, load_sweep
from tests.support.jobs_sweeps import make_sweep
from vitpa.cli import main, parser


def context_of(root: Path, line: str) -> Context:
    return load_context(parser().parse_args(["sweep", *shlex.split(line), "--root", str(root)]))


def submitted(root: Path, line: str) -> Context:
    """What `submit` works on, recorded as it records it."""
    context = context_of(root, f"submit {line}")
    SweepDir(root, context.sweep.name).record(context.sweep)
    return context


def labels(context: Context) -> list[str]:
    return [state.run.label for state in context.look()]


def test_values_of_a_key_make_a_sweep_with_that_axis(tmp_path: Path) -> None:
    context = context_of(tmp_path, "submit cifar10 optim.lr=5e-4,1e-3 seed=0,1,2")
    assert context.sweep.name == "cifar10-lr"
    assert len(context.sweep.runs) == 2 * 2 * 3
    assert context.sweep.config.seeds == [0, 1, 2]
    assert not context.sweep.config.reference
    assert {run.config.optim.lr for run in context.sweep.runs} == {5e-4, 1e-3}
    assert context.suffix == f"cifar10-lr --root {tmp_path}"
    plain = {run.signature for run in context_of(tmp_path, "plan cifar10").sweep.runs if run.seed < 3}
    assert plain < {run.signature for run in context.sweep.runs}, "the recipe's rate is 1e-3: the same runs"


def test_a_recipe_is_a_base_too(tmp_path: Path) -> None:
    context = context_of(tmp_path, "submit svhn seed=0,1 attention=positional")
    assert [run.label for run in context.sweep.runs] == ["svhn-positional-s0", "svhn-positional-s1"]
    context = context_of(tmp_path, "submit digits optim.betas=[0.9,0.95],[0.9,0.999] model.depth=1")
    assert context.sweep.name == "digits-betas-depth"
    assert [run.config.optim.betas for run in context.sweep.runs] == [(0.9, 0.95)] * 2 + [(0.9, 0.999)] * 2
    context = context_of(tmp_path, "submit paper_small train.epochs=30 dataset=svhn,cifar10 seed=0")
    assert [run.dataset for run in context.sweep.runs] == ["svhn"] * 2 + ["cifar10"] * 2


def test_the_same_words_find_it_again_in_every_verb(tmp_path: Path) -> None:
    submitted(tmp_path, "demo optim.lr=5e-4,1e-3 seed=0")
    words = "demo optim.lr=5e-4,1e-3 seed=0"
    for line in (f"submit {words}", f"status {words}", "status demo-lr", "cancel demo-lr", f"collect {words} state=missing"):
        context = context_of(tmp_path, line)
        assert context.sweep.name == "demo-lr"
        assert not context.drift.describe()
        assert len(context.look()) == 4
    some = ["digits-content-lr0.0005-s0", "digits-positional-lr0.0005-s0"]
    for line in ("status demo-lr optim.lr=5e-4", "status demo optim.lr=0.0005", "submit demo optim.lr=5e-4"):
        assert labels(context_of(tmp_path, line)) == some, "values that it has are filters"
    again = context_of(tmp_path, "plan demo-lr model.depth=1,2")
    assert again.sweep.name == "demo-lr-depth"
    assert len(again.sweep.runs) == 8


def test_what_is_held_out_is_in_the_names(tmp_path: Path) -> None:
    context = context_of(tmp_path, "plan cifar10 train.holdout=0.1 optim.lr=5e-4,1e-3 seed=0")
    assert context.sweep.name == "cifar10-holdout-lr"
    assert context.sweep.runs[0].label == "cifar10-content-holdout0.1-lr0.0005-s0"


def test_more_seeds_are_added(tmp_path: Path) -> None:
    submitted(tmp_path, "svhn seed=0")
    context = submitted(tmp_path, "svhn seed=0,1,2")
    assert context.drift.describe().startswith("since the last submission the sweep has changed: 4 new")
    assert not context.drift.gone
    assert len(context_of(tmp_path, "status svhn").look()) == 6
    assert labels(context_of(tmp_path, "submit svhn seed=1")) == ["svhn-content-s1", "svhn-positional-s1"]
    submitted(tmp_path, "demo optim.lr=5e-4 seed=0")
    assert not submitted(tmp_path, "demo optim.lr=5e-4,1e-3 seed=0,1").drift.gone


def test_other_values_are_a_change_or_another_name(tmp_path: Path) -> None:
    submitted(tmp_path, "demo optim.lr=5e-4,1e-3 seed=0")
    context = context_of(tmp_path, "plan demo optim.lr=1e-3,2e-3 seed=0")
    assert context.sweep.name == "demo-lr"
    assert "2 new" in context.drift.describe()
    assert "2 no longer in it" in context.drift.describe()
    context = submitted(tmp_path, "demo optim.lr=1e-3,2e-3 seed=0 --name coarse")
    assert (context.sweep.name, context.drift.describe()) == ("coarse", "")
    assert len(context_of(tmp_path, "status coarse").look()) == 4


@pytest.mark.parametrize(
    ("words", "references"),
    [
        ("cifar10 attention=content", {"cifar10": ["content"]}),
        ("paper_small dataset=svhn", {"svhn": ["content", "positional"]}),
        ("paper_small dataset=svhn,cifar10 attention=positional seed=0", {"cifar10": ["positional"], "svhn": ["positional"]}),
        ("cifar10 seed=0", {"cifar10": ["content", "positional"]}),
    ],
)
def test_a_part_keeps_its_references(tmp_path: Path, words: str, references: dict[str, list[str]]) -> None:
    reference = submitted(tmp_path, f"{words} --name foo").sweep.config.reference
    assert {dataset: list(attentions) for dataset, attentions in reference.items()} == references
    assert load_sweep("foo", tmp_path).config.reference == reference


def test_a_name_that_another_sweep_has_is_a_change(tmp_path: Path) -> None:
    submitted(tmp_path, "cifar10 optim.lr=5e-4,1e-3 --name foo")
    for words in ("svhn optim.lr=5e-4", "cifar10_short optim.lr=5e-4", "paper_small optim.lr=5e-4 dataset=svhn"):
        context = context_of(tmp_path, f"plan {words} --name foo")
        assert "20 no longer in it" in context.drift.describe(), words
        assert all(run.settings == {"optim.lr": "0.0005"} for run in context.sweep.runs)
    context = context_of(tmp_path, "plan cifar10 optim.lr=5e-4 --name foo")
    assert (len(context.look()), context.drift.describe()) == (10, "")
    submitted(tmp_path, "paper_small optim.lr=5e-4 dataset=svhn,cifar10")
    context = context_of(tmp_path, "plan paper_small optim.lr=5e-4 dataset=svhn")
    assert (len(context.look()), context.drift.describe()) == (10, "")


@pytest.mark.parametrize(
    "edit", [{"overrides": {"train.epochs": 30}}, {"axes": {"model.depth": [1, 2]}}, {"include": [{"model.depth": 3}]}]
)
def test_an_edit_of_the_base_counts_where_the_words_are_repeated(tmp_path: Path, edit: dict[str, object]) -> None:
    make_sweep(tmp_path, seeds=1, axes={"model.depth": [1]}, overrides={"train.epochs": 60})
    path = tmp_path / "small.yaml"
    words = f"{path} optim.lr=5e-4,1e-3"
    assert len(submitted(tmp_path, words).sweep.runs) == 4
    assert not context_of(tmp_path, f"plan {words}").drift.describe()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | edit))
    for line in (f"submit {words}", f"plan {path} optim.lr=5e-4"):
        assert "since the last submission the sweep has changed" in context_of(tmp_path, line).drift.describe()
    assert len(context_of(tmp_path, f"status {words}").look()) == 4, "as it was submitted"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("submit demo optim.lr=", "'optim.lr=': no value; write optim.lr=A,B"),
        ("submit demo optim.lr=1,1.0", "command line: axes.optim.lr: 1 is given 2 times; once is enough"),
        ("submit demo optim.lr=1e-3 optim.lr=2e-3", "optim.lr is given twice; write its values as optim.lr=A,B"),
        ("submit demo optim.lr=1e-3 seed=0,1 seed=2", "'seed=2': seed is given twice; write its values as seed=A,B"),
        ("plan digits attention=content attention=positional", "attention is given twice; write its values as attention=A,B"),
        ("submit demo model.attention=content,positional", "values of a key of the configuration; did you mean attention?"),
        ("submit demo lr=1e-3", "values of a key of the configuration; did you mean optim.lr?"),
        ("submit demo optim.lr=x", "command line: axes: optim.lr=x: Input should be a valid number"),
        ("submit paper_small optim.lr=1e-3 dataset=mnist", "there is no dataset 'mnist' in paper_small; there is cifar10"),
        ("submit demo optim.lr=1e-3 seed=a", "command line: seeds.0=a: Input should be a valid integer"),
        ("submit demo optim.lr=1e-3 sed=1", "'sed=1': expected a filter"),
        ("submit demo optim.lr=1e-3 --name a/b", "command line: name=a/b: take letters, digits, _ and -, and begin"),
        (
            "submit demo optim.lr=1e-3,,2e-3",
            "'optim.lr=1e-3,,2e-3': an empty value; write optim.lr=A,B, or leave the comma out",
        ),
        ("submit demo optim.lr=1e-3,", "'optim.lr=1e-3,': an empty value"),
        ("submit demo optim.lr=1e-3 seed=0 --name demo", "--name demo: this is the name of a shipped sweep; take another"),
        ("plan digits seed=0 --name svhn", "--name svhn: this is the name of a shipped recipe; take another with --name"),
        ("status demo optim.lr=1e-3", "sweep demo-lr was never submitted under"),
        ("status svhn", "sweep svhn was never submitted under"),
        ("submit demoo", "none of the shipped sweeps (cifar10"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *shlex.split(line), "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plan_says_what_it_would_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep", "plan", "digits", "optim.lr=5e-4,1e-3", "seed=0", "--json", "--root", str(tmp_path)])
    document = json.loads(capsys.readouterr().out)
    assert document["sweep"] == "digits-lr"
    assert [row["settings"] for row in document["runs"]] == [{"optim.lr": "0.0005"}] * 2 + [{"optim.lr": "0.001"}] * 2
