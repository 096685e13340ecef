"""What a search looks like: rounds, trials, the best so far with what it cost, and what to do with it at the end."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from jobs.records import Place
from jobs.search.ledger import Ledger, Trial
from jobs.search.plan import SearchPlan
from jobs.standing import Standing
from jobs.sweep import Sweep
from vitpa.arguments import in_shell
from vitpa.config_file import Override, parse_config, read_yaml, shipped_configs
from vitpa.statistics import Estimate

SHOWN = 5  # of the best trials
NOT_OF_A_RUN = "train.holdout"  # of a search: what is chosen is trained on all of train


def state_of(trial: Trial, standing: Standing) -> str:
    """How it is with a trial: in training, paused, pruned, finished, given up."""
    if trial.out:
        return "given up"
    if trial.in_training:
        return "in training"
    if trial.epochs == standing.plan.most_epochs:
        return "finished"
    return "pruned" if standing.ledger.over else "paused"


def lines(standing: Standing | None) -> list[str]:
    """Round, trials, budget, and the best so far; nothing of a sweep that is no search."""
    if standing is None:
        return []
    plan, trials = standing.plan, standing.trials
    counts = Counter(state_of(trial, standing) for trial in trials)
    parts = [f"{count} {name}" for name, count in counts.items()]
    hours = math.fsum(standing.gpu_hours.values())
    budget = plan.config.budget
    if budget.runs is not None:
        spent = f"{plan.epochs_trained(trials) / plan.most_epochs:.1f} of {budget.runs} runs, {hours:.2f} GPU-hours"
    else:
        spent = f"{hours:.2f} of {budget.gpu_hours:g} GPU-hours"
    rounds = [each for each in standing.ledger.rounds if each.trials]
    over = "over after" if standing.ledger.over else "in"
    said = [f"search: {over} round {len(rounds)}; {_count(len(trials))}: {', '.join(parts)}; budget: {spent}"]
    if plan.config.halving is not None:
        came = [f"{sum(rung in trial.scores for trial in trials)} to {rung}" for rung in plan.rungs]
        said.append(f"came to epoch: {', '.join(came)}")
    best = standing.best
    return [*said, f"best so far: {_of_trial(best, standing)}: {settings_text(best.values)}"] if best is not None else said


def _count(trials: int) -> str:
    return f"{trials} trial{'' if trials == 1 else 's'}"


def _of_trial(trial: Trial, standing: Standing) -> str:
    epoch = max(trial.scores)
    found = Estimate.of(trial.scores[epoch])
    assert found.mean is not None
    spread = f" ± {100 * found.std:.2f}" if found.std is not None else ""
    of = f"epoch {epoch} of {standing.plan.most_epochs}, {found.n} run{'s' if found.n > 1 else ''}"
    hours = standing.gpu_hours.get(trial.number, 0.0)
    return f"{trial.label} {100 * found.mean:.2f}{spread} % held-out top-1 ({of}, {hours:.2f} GPU-hours)"


def round_line(ledger: Ledger) -> str:
    """What the last round does."""
    entries, number = ledger.rounds[-1].trials, len(ledger.rounds)
    if not entries:
        return f"round {number}: nothing is left to train within the budget"
    counts = Counter((entry.values is None, entry.epochs) for entry in entries)
    parts = [
        f"{count} {'go' if count > 1 else 'goes'} on to epoch {epochs}" if goes_on else f"{count} new up to epoch {epochs}"
        for (goes_on, epochs), count in counts.items()
    ]
    return f"round {number}: {', '.join(parts)}"


def plan_line(plan: SearchPlan, ledger: Ledger) -> str:
    """What a search will be, as far as that is known."""
    budget = plan.config.budget
    rungs = " -> ".join(map(str, plan.rungs))
    most = plan.most_trials(0.0, 0) if budget.runs is not None else 0
    total = f"{_count(most)} at most, as much training as {plan.expected_runs(most):.1f} runs" if most else ""
    total = total or f"as many trials as {budget.gpu_hours:g} GPU-hours allow"
    at_once = min(plan.config.trials_at_once, most or plan.config.trials_at_once)
    return (
        f"search ({plan.config.sampler}): {total}, {at_once} at a time, x {plan.runs_per_trial} runs; epochs {rungs}; "
        f"the runs above are of round {len(ledger.rounds)}"
    )


def best_trials(standing: Standing) -> list[str]:
    """The best trials, a line each."""
    return [f"  {_of_trial(trial, standing)}: {settings_text(trial.values)}" for trial in standing.ranked[:SHOWN]]


def settings_text(values: dict[str, JsonValue]) -> str:
    """What a trial sets, as it is typed."""
    return " ".join(Override(key, value).text for key, value in values.items())


def advice(sweep: Sweep, standing: Standing, root: Path, place: Place) -> list[str]:
    """The command that trains the best trial's settings on all of train, where the search ran, and evaluates them on val."""
    best = standing.best
    if best is None:
        return []
    settings = {key: value for key, value in sweep.config.overrides.items() if key != NOT_OF_A_RUN} | best.values
    (recipe,), seeds = sweep.config.recipes, ",".join(map(str, sweep.config.seeds))
    given = [Override(key, value) for key, value in settings.items()]
    if parse_config(read_yaml(shipped_configs().get(recipe, Path(recipe))), recipe, given).train.holdout:
        given.append(Override(NOT_OF_A_RUN, 0))  # the recipe's own
    words = [shlex.quote(each.text) for each in given]
    where = "" if root == Path("outputs").resolve() else f" --root {in_shell(root)}"
    if recipe in shipped_configs():
        where += f" --profile {in_shell(place.profile)}" if place.profile != Place().profile else ""
        where += f" --data-dir {in_shell(place.data_dir)}" if place.data_dir else ""
        attentions = ",".join(sweep.config.attentions)
        words += [f"attention={attentions}", f"seed={seeds}", f"--name {sweep.name}-chosen{where}"]
        commands = [" ".join(["vitpa sweep submit", recipe, *words])]
    else:
        words += [f"runtime.root={in_shell(root)}"] if where else []
        words += [f"runtime.data_dir={in_shell(place.data_dir)}"] if place.data_dir else []
        commands = [
            " ".join(["vitpa train", in_shell(recipe), *words, f"model.attention={attention}", f"--seeds {seeds}"])
            for attention in sweep.config.attentions
        ]
    return [
        "the best setting on all of train, tested once on val (other seeds, or more: change them):",
        *map("  ".__add__, commands),
    ]


def as_json(standing: Standing) -> dict[str, Any]:
    """Plain data: accuracies are fractions, of held-out images, the mean of a trial's runs by epoch."""
    best = standing.best
    return {
        "rounds": len([each for each in standing.ledger.rounds if each.trials]),
        "over": standing.ledger.over,
        "gpu_hours": math.fsum(standing.gpu_hours.values()),
        "budget": standing.plan.config.budget.model_dump(),
        "best": best.label if best is not None else None,
        "trials": [
            {
                "trial": trial.label,
                "state": state_of(trial, standing),
                "epochs": trial.epochs,
                "val_top1": {str(epoch): trial.score(epoch) for epoch in trial.scores},
                "settings": trial.values,
                "gpu_hours": standing.gpu_hours.get(trial.number, 0.0),
            }
            for trial in standing.trials
        ],
    }
