"""Searches on paper: what is drawn, who goes on, and that the budget is kept, with scores that a function gives."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.errors import SweepError
from jobs.report import search as search_report
from jobs.search.halving import epochs_of, share_of, trials_within
from jobs.search.ledger import Ledger, Round, Trial
from jobs.search.plan import SearchPlan
from jobs.search.space import Dimension
from jobs.standing import Standing
from jobs.sweep import Sweep, SweepDir, load_sweep, with_ledger
from tests.support.search_sweeps import SPACE, make_search
from vitpa.arguments import ConfigError
from vitpa.cli import main

Score = Callable[[Trial, int], float]


def by_rate(trial: Trial, epoch: int) -> float:
    """The nearer to 1e-3 the better, the longer the better."""
    return 1 / (1 + abs(math.log10(float(str(trial.values["optim.lr"]))) + 3)) * (1 - 0.5**epoch)


def at_random(trial: Trial, epoch: int) -> float:
    return random.Random(f"{trial.number} {epoch}").random()


def carried_out(sweep: Sweep, score: Score = by_rate, *, hours_per_epoch: float = 0.0, rounds: int = 1000) -> Ledger:
    """The ledger of a search whose trials have the scores that `score` says, and that takes so many GPU-hours."""
    assert sweep.search is not None and sweep.ledger is not None
    plan, ledger = sweep.search, sweep.ledger
    while not ledger.over and len(ledger.rounds) < rounds:
        trials = ledger.trials
        told = {trial.number: [score(trial, trial.epochs)] * plan.runs_per_trial for trial in trials if trial.in_training}
        following = plan.next_round(ledger, told, {}, hours_per_epoch * plan.epochs_trained(trials))
        ledger = replace(ledger, rounds=[*ledger.rounds, following])
    return ledger


def test_values_follow_from_the_seed_and_the_number(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, budget={"runs": 8}, trials_at_once=8)
    trials = carried_out(sweep).trials
    assert [trial.number for trial in trials] == list(range(8))
    apart = carried_out(make_search(tmp_path, budget={"runs": 8}, trials_at_once=3)).trials
    assert [trial.values for trial in trials] == [trial.values for trial in apart], "not from the rounds"
    narrower = {key: SPACE[key] for key in list(SPACE)[:2]}
    fewer = carried_out(make_search(tmp_path, budget={"runs": 8}, space=narrower)).trials
    assert [{key: trial.values[key] for key in narrower} for trial in trials] == [trial.values for trial in fewer]
    other = carried_out(make_search(tmp_path, budget={"runs": 8}, seed=1)).trials
    assert trials[0].values != other[0].values


def test_values_are_of_the_space_and_evenly_so(tmp_path: Path) -> None:
    trials = carried_out(make_search(tmp_path, budget={"runs": 600}, trials_at_once=600)).trials
    values: dict[str, list[Any]] = {key: [trial.values[key] for trial in trials] for key in SPACE}
    assert len({json.dumps(trial.values) for trial in trials}) == 600
    decades = Counter(math.floor(math.log10(rate)) for rate in values["optim.lr"])
    assert decades.keys() == {-4, -3}
    assert 240 < decades[-3] < 360
    assert set(values["model.drop_path_rate"]) == {0.0, 0.1, 0.2}
    assert set(values["augment.randaugment_magnitude"]) == set(range(10))
    assert {type(value) for value in values["augment.randaugment_magnitude"]} == {int}
    assert min(Counter(values["augment.mixup_alpha"]).values()) > 150
    assert all(float(f"{rate:.3g}") == rate for rate in values["optim.lr"])


def values_between(low: float, high: float, *, log: bool = False) -> set[Any]:
    """What is drawn from a range."""
    dimension = Dimension("train.ema_decay", (), low, high, log)
    return {dimension.at(share / 10_000) for share in range(10_000)}


@pytest.mark.parametrize("log", [False, True])
def test_a_narrow_range_has_many_values(*, log: bool) -> None:
    for low, high in ((0.99, 0.9999), (0.999, 1.001), (123_400.0, 123_500.0), (0.2, 0.25)):
        found = values_between(low, high, log=log)
        assert 100 <= len(found) <= 1001
        assert low <= min(found) < low + 0.02 * (high - low)
        assert high >= max(found) > high - 0.02 * (high - low)
        assert max(len(f"{value:.12g}") for value in found) <= 8, "no more digits than that takes"


def test_ranges_of_enough_values_keep_them() -> None:
    """What a search that has begun draws next stays the same."""
    for low, high, log in ((1e-4, 1e-3, True), (5e-3, 1e-2, False), (0.0, 0.2, False), (0.9, 0.999, False), (0.1, 0.25, True)):
        assert all(value in (low, high, float(f"{value:.3g}")) for value in values_between(low, high, log=log))


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    space = {"augment.mixup_alpha": [0.0, 0.2, 0.8]}
    for sampler in ("random", "tpe"):
        if sampler == "tpe":
            pytest.importorskip("optuna")
        found = carried_out(make_search(tmp_path, budget={"runs": 20}, space=space, sampler=sampler), lambda *_: 0.5)
        assert len(found.trials) == 3


NOT_ALL_TOGETHER: list[dict[str, Any]] = [
    {"model.embed_dim": {"low": 8, "high": 16, "step": 2}, "model.num_heads": [2, 4]},
    {"train.global_batch_size": {"low": 16, "high": 24}, "augment.mixup_alpha": [0.0, 0.2]},
    {"model.kind": ["vit", "resnet18"], "model.drop_path_rate": {"low": 0.0, "high": 0.2, "step": 0.05}},
    {"model.kind": ["vit", "resnet18"], "model.depth": [1, 2]},
    {"augment.mixup_alpha": [0.0, 0.2, 0.8], "train.ema_decay": [0.0, 0.9]},
]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("space", NOT_ALL_TOGETHER)
def test_every_trial_is_a_run_of_its_own(tmp_path: Path, space: dict[str, Any], sampler: str) -> None:
    """Of settings that no run can have together, and of those that are the same run, others are drawn."""
    if sampler == "tpe":
        pytest.importorskip("optuna")
    for seed in range(4):
        options: dict[str, Any] = {"space": space, "sampler": sampler, "seed": seed, "budget": {"runs": 6}}
        sweep = make_search(tmp_path, trials_at_once=2, **options)
        ledger = carried_out(sweep, lambda *_: 0.5)
        runs = with_ledger(sweep, ledger).runs
        assert len({run.signature for run in runs}) == len(ledger.trials) >= 3
        some = replace(ledger, rounds=ledger.rounds[:2])
        told = {trial.number: [0.5] for trial in some.trials if trial.in_training}
        assert sweep.search is not None
        assert sweep.search.next_round(some, told, {}, 0.0) == ledger.rounds[2], "whoever goes on draws the same"
        if sampler == "random":
            at_once = carried_out(make_search(tmp_path, trials_at_once=6, **options), lambda *_: 0.5)
            assert [trial.values for trial in at_once.trials] == [trial.values for trial in ledger.trials]


def test_a_network_without_attention_is_no_trial_of_positional(tmp_path: Path) -> None:
    space = {"model.kind": ["vit", "resnet18"], "optim.lr": [1e-4, 2e-4, 3e-4, 4e-4]}
    make_search(tmp_path)
    document = yaml.safe_load((tmp_path / "small.yaml").read_text())
    document |= {"attentions": ["content", "positional"], "search": {"space": space, "budget": {"runs": 20}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(document))
    sweep = load_sweep(str(tmp_path / "small.yaml"), tmp_path)
    assert {run.config.model.kind for run in sweep.runs} == {"vit"}
    assert len(sweep.runs) == 8


@pytest.mark.parametrize("score", [by_rate, at_random])
@pytest.mark.parametrize("places", [1, 4, 16, 50])
@pytest.mark.parametrize("halving", [None, {"epochs": [1, 3]}, {"epochs": [2, 4, 8], "keep": 0.5}])
def test_the_budget_is_kept_and_used(tmp_path: Path, score: Score, places: int, halving: dict[str, Any] | None) -> None:
    more: dict[str, Any] = {"halving": halving} if halving else {}
    sweep = make_search(tmp_path, seeds=2, budget={"runs": 20}, trials_at_once=places, **more)
    plan = sweep.search
    assert plan is not None
    ledger = carried_out(sweep, score)
    assert plan.epochs_trained(ledger.trials) <= 20 * 9
    assert len(ledger.trials) == plan.most_trials(0.0, 0)
    assert all(len(each.trials) <= places for each in ledger.rounds)
    finished = [trial for trial in ledger.trials if 9 in trial.scores]
    assert finished
    if halving is None:
        assert len(finished) == 10
    for rung, following in zip(plan.rungs, plan.rungs[1:], strict=False):
        arrived = [trial for trial in ledger.trials if rung in trial.scores]
        gone_on = [trial for trial in arrived if following in trial.scores]
        assert 1 <= len(gone_on) <= max(1, share_of(len(arrived), plan.keep))
        if score is by_rate and places == 50:  # all come to a rung at once: exactly the best
            best = sorted(arrived, key=lambda trial: -trial.score(rung))[: len(gone_on)]
            assert {trial.number for trial in best} == {trial.number for trial in gone_on}


def test_places_that_are_free_are_filled_with_new_trials(tmp_path: Path) -> None:
    ledger = carried_out(make_search(tmp_path, budget={"runs": 12}, trials_at_once=6, halving={"epochs": [1, 3]}))
    _, second, third, *_ = ledger.rounds
    assert [(entry.number, entry.epochs) for entry in second.trials] == [(n, 3) for n in best(ledger, range(6), 1, 2)] + [
        (number, 1) for number in range(6, 10)
    ]
    assert sum(entry.values is None for entry in third.trials) + 6 - len(third.trials) < 6


def best(ledger: Ledger, numbers: range, epoch: int, count: int) -> list[int]:
    return sorted(numbers, key=lambda number: -by_rate(ledger.trials[number], epoch))[:count]


@pytest.mark.parametrize("keep", [0.1, 1 / 3, 0.5, 0.9])
def test_how_many_trials_a_budget_pays_for(keep: float) -> None:
    rungs = [2, 5, 9]
    for epochs in range(9, 200):
        many = max(count for count in range(1, epochs) if epochs_of(count, rungs, keep) <= epochs)
        assert trials_within(epochs, rungs, keep) == many
    assert trials_within(8.9, rungs, keep) == 0


def test_a_budget_in_gpu_hours(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, seeds=2, budget={"gpu_hours": 10}, halving={"epochs": [1, 3]})
    plan = sweep.search
    assert plan is not None
    ledger = carried_out(sweep, hours_per_epoch=0.05)
    assert 7 < 0.05 * plan.epochs_trained(ledger.trials) <= 10
    assert any(9 in trial.scores for trial in ledger.trials)
    few = carried_out(sweep, hours_per_epoch=2.0)
    assert [len(each.trials) for each in few.rounds] == [4, 0], "4 x 2 runs x 2 h is more than there was"
    with pytest.raises(SweepError, match="the trials have taken none, as on a CPU"):
        carried_out(sweep)


def test_a_trial_that_is_given_up_does_not_go_on(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, budget={"runs": 2}, trials_at_once=4, halving={"epochs": [1]})
    assert sweep.search is not None and sweep.ledger is not None
    following = sweep.search.next_round(sweep.ledger, {0: [0.3], 1: [0.5], 3: [0.4]}, {2: "NaN"}, 0.0)
    ledger = replace(sweep.ledger, rounds=[*sweep.ledger.rounds, following])
    assert [entry.number for entry in following.trials if entry.values is None] == [1]
    assert ledger.trials[2].out == "NaN"


def after(sweep: Sweep, ledger: Ledger, scores: dict[int, list[float]], out: dict[int, str], hours: float = 0.0) -> Ledger:
    """The ledger with the round that follows."""
    assert sweep.search is not None
    return replace(ledger, rounds=[*ledger.rounds, sweep.search.next_round(ledger, scores, out, hours)])


def test_what_is_given_up_is_not_the_best_and_takes_no_more_than_the_budget(tmp_path: Path) -> None:
    """When the only trial that goes on is given up the next best follows, as far as the budget goes."""
    for epoch, hopes in ((3, [0]), (6, [0, 1])):  # 4 x 3 + 6 of 18 epochs, 2 x 6 + 2 x 3
        sweep = make_search(tmp_path, halving={"epochs": [epoch], "keep": 0.2}, budget={"runs": 2}, trials_at_once=4)
        assert sweep.search is not None and sweep.ledger is not None
        scores = {trial.number: [0.5 - 0.01 * trial.number] for trial in sweep.ledger.trials}
        ledger = after(sweep, sweep.ledger, scores, {})
        while not ledger.over:
            ledger = after(sweep, ledger, {}, {trial.number: "not finite" for trial in ledger.trials if trial.in_training})
        assert sweep.search.epochs_trained(ledger.trials) == 18
        assert [trial.number for trial in ledger.trials if trial.out] == hopes
        standing = Standing(sweep.search, ledger, {}, {}, {}, [], {})
        left = [trial.label for trial in ledger.trials if trial.number not in hopes]
        assert [line.split()[0] for line in search_report.best_trials(standing)] == left
        assert search_report.as_json(standing)["best"] == (left[0] if left else None)


def test_a_hope_in_gpu_hours(tmp_path: Path) -> None:
    """The first one may take more than was estimated; others, after that is given up, may not."""
    sweep = make_search(tmp_path, halving={"epochs": [3], "keep": 0.2}, budget={"gpu_hours": 2}, trials_at_once=4)
    assert sweep.ledger is not None
    ledger = after(sweep, sweep.ledger, {number: [0.5 - 0.01 * number] for number in range(4)}, {}, 1.9)
    assert [(entry.number, entry.epochs) for entry in ledger.rounds[-1].trials] == [(0, 9)]
    assert after(sweep, ledger, {}, {0: "not finite"}, 1.9).over
    assert not after(sweep, ledger, {}, {0: "not finite"}, 1.0).over


def test_a_first_round_that_is_given_up_as_a_whole_is_no_matter_of_the_cpu(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, budget={"gpu_hours": 2}, trials_at_once=4)
    assert sweep.ledger is not None
    assert after(sweep, sweep.ledger, {}, dict.fromkeys(range(4), "not finite")).over
    with pytest.raises(SweepError, match="as on a CPU"):
        after(sweep, sweep.ledger, {0: [0.5]}, dict.fromkeys(range(1, 4), "not finite"))


def test_tpe_learns_and_can_go_on_from_the_ledger(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options: dict[str, Any] = {"budget": {"runs": 40}, "trials_at_once": 5}
    sweep = make_search(tmp_path, sampler="tpe", **options)
    ledger = carried_out(sweep)
    assert ledger.rounds == carried_out(sweep).rounds, "drawn from the ledger alone"
    late = [by_rate(trial, 9) for trial in ledger.trials[20:]]
    by_chance = [by_rate(trial, 9) for trial in carried_out(make_search(tmp_path, **options)).trials[20:]]
    assert sum(late) / len(late) > sum(by_chance) / len(by_chance) + 0.1
    halved = make_search(tmp_path, sampler="tpe", halving={"epochs": [1, 3]}, budget={"runs": 12}, trials_at_once=5)
    assert any(9 in trial.scores for trial in carried_out(halved).trials)


def test_without_optuna_tpe_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SweepError, match=r"search.sampler=tpe needs optuna, which is not installed: pip install optuna"):
        make_search(tmp_path, sampler="tpe")


def test_of_two_that_decide_one_counts(tmp_path: Path) -> None:
    first = Round(trials=[], settings={"by": "one"})
    ledger = Ledger(tmp_path / "search").append(first)
    assert Ledger(tmp_path / "search").append(Round(trials=[], settings={"by": "another"})) == ledger
    assert ledger.rounds == [first]
    (tmp_path / "search" / "0003.json").write_text("{}")
    with pytest.raises(SweepError, match=r"0002.json is missing; restore it"):
        Ledger.read(tmp_path / "search")


def edit(document: Any, *keys: Any, to: Any) -> None:
    """Change one value of a document."""
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = to


VALUES = ("trials", 1, "values")
EDITED: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("0001", ("trials", 1, "number"), 5, "trial 5 in `trials`, where 1 comes next"),
    ("0001", ("trials", 1, "number"), 0, "trial 0 in `trials` is there already"),
    ("0001", ("trials", 1), {"number": 1, "epochs": 3}, "trial 1 in `trials` has no `values`"),
    ("0001", ("trials",), [], "`scores` of trial 0, which there is not before it"),
    ("0001", ("scores",), {"x": [0.5]}, "`scores` of trial x, which there is not before it"),
    ("0001", ("out",), {"0": "NaN"}, "`out` of trial 0, which there is not before it"),
    ("0002", ("scores", "x"), [0.5], "`scores` of trial x, which there is not before it"),
    ("0002", ("scores", "00"), [0.5], "`scores` of trial 00, which there is not before it"),
    ("0002", ("scores", "-1"), [0.5], "`scores` of trial -1, which there is not before it"),
    ("0002", ("scores", "0"), [], "no usable `scores` of trial 0"),
    ("0002", ("scores", "0"), [5.0], "no usable `scores` of trial 0"),
    ("0002", ("scores", "0"), 5.0, "no usable `scores`"),
    ("0002", ("out",), {"7": "NaN"}, "`out` of trial 7, which there is not before it"),
    ("0002", ("trials", 0, "number"), 9, "trial 9 in `trials` has no `values`"),
    ("0001", VALUES, {}, "the `values` of t001 are not of search.space"),
    ("0001", (*VALUES, "optim.lrr"), 1, "the `values` of t001 are not of search.space"),
    ("0001", (*VALUES, "optim.lr"), 5.0, "the `values` of t001 are not of search.space"),
    ("0001", (*VALUES, "optim.lr"), "much", "the `values` of t001 are not of search.space"),
    ("0001", (*VALUES, "augment.mixup_alpha"), 0.3, "the `values` of t001 are not of search.space"),
    ("0001", (*VALUES, "augment.randaugment_magnitude"), 2.5, "the `values` of t001 are not of search.space"),
]


@pytest.mark.parametrize("edited", EDITED)
def test_a_ledger_that_was_edited_is_one_line(
    tmp_path: Path, edited: tuple[str, tuple[Any, ...], Any, str], capsys: pytest.CaptureFixture[str]
) -> None:
    record, keys, value, message = edited
    sweep = make_search(tmp_path, halving={"epochs": [3], "keep": 0.5}, trials_at_once=2)
    assert sweep.ledger is not None
    written = Ledger(sweep.ledger.folder)
    for each in after(sweep, sweep.ledger, {0: [0.5], 1: [0.4]}, {}).rounds:
        written = written.append(each)
    SweepDir(tmp_path, "small").record(sweep)
    assert len(load_sweep("small", tmp_path).runs) == 3
    path = sweep.ledger.folder / f"{record}.json"
    document = json.loads(path.read_text())
    edit(document, *keys, to=value)
    path.write_text(json.dumps(document))
    capsys.readouterr()
    for verb, codes in (("plan", (1,)), ("status", (1, 4))):
        assert main(["sweep", verb, "small", "--root", str(tmp_path)]) in codes
        error = capsys.readouterr().err
        assert message in error
        assert "restore it" in error
        assert error.count("\n") == 1


def test_a_ledger_without_trials_is_one_line(tmp_path: Path) -> None:
    sweep = make_search(tmp_path)
    assert sweep.ledger is not None
    replace(sweep.ledger, rounds=[]).append(sweep.ledger.rounds[0].model_copy(update={"trials": []}))
    with pytest.raises(SweepError, match="search: has no trials; restore it"):
        make_search(tmp_path)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"overrides": {}}, "search chooses, so it must not look at val: add train.holdout=0.1 to the overrides"),
    ({"budget": {}}, "search.budget: expected one of runs"),
    ({"budget": {"runs": 2, "gpu_hours": 1}}, "search.budget: expected one of runs"),
    ({"seeds": 5}, "search.budget.runs=4: a trial alone takes 5, one for each attention and seed"),
    ({"space": {}}, "search.space"),
    ({"space": {"seed": [0, 1]}}, "search.space.seed: every trial has all seeds"),
    ({"space": {"train.epochs": [1, 2]}}, "search.space.train.epochs: the halving says how long trials are trained"),
    ({"space": {"runtime.workers": [1, 2]}}, "search.space.runtime.workers: it does not change the numbers"),
    ({"space": {"optim.rate": [1, 2]}}, "search.space.optim.rate: no key of the configuration"),
    ({"space": {"optim.lrr": [1, 2]}}, "search.space.optim.lrr: no key of the configuration; did you mean optim.lr?"),
    ({"space": {"optim.lr": 1}}, "search.space.optim.lr: expected a list of choices, or a range such as"),
    ({"space": {"optim.lr": [1]}}, "search.space.optim.lr: expected two choices or more, each once"),
    ({"space": {"optim.lr": [1, 1.0]}}, "search.space.optim.lr: expected two choices or more, each once"),
    (
        {"space": {"optim.lr": {"low": 0.001, "high": 0.01, "step": 0.1}}},
        "search.space.optim.lr: step=0.1 is more than from low=0.001 to high=0.01",
    ),
    ({"space": {"optim.lr": {"low": 1, "high": 0.1}}}, "search.space.optim.lr: low=1 is not below high=0.1"),
    ({"space": {"optim.lr": {"low": 0, "high": 0.1, "log": True}}}, "low=0 has no logarithm; it must be above 0"),
    ({"space": {"optim.lr": {"low": 1e-6, "high": 0.1}}}, "optim.min_lr=1e-05 is above optim.lr=1e-06"),
    ({"space": {"model.drop_path_rate": [0.1, "much"]}}, "search.space.model.drop_path_rate: model.drop_path_rate=much"),
    ({"space": {"model.depth": {"low": 1, "high": 2.5}}}, "search.space.model.depth: its values are whole numbers"),
    (
        {"space": {"train.global_batch_size": [33, 35], "augment.mixup_alpha": [0.2, 0.8]}},
        "of 100 settings of the space none can be those of a run",
    ),
    ({"halving": {"epochs": [3, 9]}}, "search.halving.epochs: 9 is not before the end, train.epochs=9"),
    ({"halving": {"epochs": [3, 3]}}, "epochs=[3, 3]: expected rising numbers from 1 on"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_errors_are_one_line(tmp_path: Path, wrong: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SweepError, ConfigError)):
        make_search(tmp_path, **wrong)
    assert main(["sweep", "plan", str(tmp_path / "small.yaml"), "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_settings_that_a_search_began_with_stay(tmp_path: Path) -> None:
    sweep = make_search(tmp_path)
    assert sweep.ledger is not None and isinstance(sweep.search, SearchPlan)
    sweep.ledger.folder.parent.mkdir(parents=True)
    replace(sweep.ledger, rounds=[]).append(sweep.ledger.rounds[0])
    make_search(tmp_path, budget={"runs": 9}, trials_at_once=2)  # these may change
    changed: list[tuple[str, dict[str, Any]]] = [
        ("search.seed", {"seed": 3}),
        ("search.space", {"space": {"optim.lr": [1e-3, 2e-3]}}),
        ("seeds", {"seeds": 2}),
        ("recipe and overrides", {"epochs": 8}),
    ]
    for name, change in changed:
        with pytest.raises(
            SweepError, match=f"not as when the search began: {name}; undo that, or give the search another name"
        ):
            make_search(tmp_path, **change)


def test_a_search_has_no_axes_and_one_recipe(tmp_path: Path) -> None:
    make_search(tmp_path)
    document = yaml.safe_load((tmp_path / "small.yaml").read_text())
    for more, message in (
        ({"axes": {"optim.lr": [1e-3]}}, "axes and search: a search has trials instead; leave one of the two out"),
        ({"recipes": ["recipe.yaml", "cifar10"]}, "recipes: a search is for one recipe; take a sweep for each"),
    ):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(document | more))
        with pytest.raises(SweepError, match=message):
            load_sweep(str(tmp_path / "more.yaml"), tmp_path)
