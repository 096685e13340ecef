"""What a search does next, from its settings and its ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from pydantic import JsonValue

from jobs.errors import SweepError
from jobs.search.config import SearchConfig
from jobs.search.halving import epochs_of, last_hope, trials_within, who_goes_on
from jobs.search.ledger import RESTORE, Entry, Ledger, Round, Trial
from jobs.search.space import TRIES, Dimension, Taken, dimensions_of, random_values
from jobs.search.tpe import tpe_values
from vitpa.config import RunConfig

HOLDOUT = "search chooses, so it must not look at val: add train.holdout=0.1 to the overrides (a tenth of train replaces val)"


@dataclass(frozen=True)
class SearchPlan:
    """A search with all that its rounds follow from, but the ledger."""

    config: SearchConfig
    dimensions: Sequence[Dimension]
    rungs: Sequence[int]  # epochs, the last one those of the whole training
    runs_per_trial: int
    settings: Mapping[str, JsonValue]  # what must stay as it is from round to round
    signatures: Callable[[Mapping[str, JsonValue]], Set[str]]  # of a trial's runs with one seed; ConfigError if none can be

    @staticmethod
    def of(
        config: SearchConfig,
        overrides: Mapping[str, JsonValue],
        configure: Callable[[Mapping[str, JsonValue], str], RunConfig],
        *,
        attentions: Sequence[str],
        seeds: Sequence[int],
        where: str,
    ) -> SearchPlan:
        """The plan of a sweep's search.

        Args:
            config: As its file says it.
            overrides: Of the sweep.
            configure: A run's configuration with these settings, which come from the place of the second argument.
            attentions: Of the sweep.
            seeds: Of the sweep.
            where: Of the sweep, for error messages.

        Raises:
            SweepError: it cannot be carried out.
            ConfigError: a run cannot have a value of the space.
        """
        base = configure({}, where)
        if not base.train.holdout:
            raise SweepError(f"{where}: {HOLDOUT}")
        dimensions = dimensions_of(config, overrides, where)
        for each in dimensions:
            for value in each.extremes:
                configure({each.key: value}, f"{where}: search.space.{each.key}")
        rungs = [*(config.halving.epochs if config.halving else ()), base.train.epochs]
        if len(rungs) > 1 and rungs[-2] >= rungs[-1]:
            raise SweepError(f"{where}: search.halving.epochs: {rungs[-2]} is not before the end, train.epochs={rungs[-1]}")
        kept = config.model_dump(mode="json", include={"space", "sampler", "seed", "halving"})
        settings = {**kept, "attentions": list(attentions), "seeds": list(seeds), "recipe and overrides": base.signature}

        def signatures(values: Mapping[str, JsonValue]) -> Set[str]:
            place = f"{where}: search.space"
            return {configure({**values, "model.attention": each}, place).signature for each in attentions}

        plan = SearchPlan(config, dimensions, rungs, len(attentions) * len(seeds), settings, signatures)
        if config.budget.runs is not None and plan.most_trials(0.0, 0) < 1:
            raise SweepError(
                f"{where}: search.budget.runs={config.budget.runs}: a trial alone takes {plan.runs_per_trial}, one for each "
                "attention and seed"
            )
        return plan

    @property
    def keep(self) -> float:
        """Share of the trials that goes on from a rung."""
        return self.config.halving.keep if self.config.halving else 1.0

    @property
    def most_epochs(self) -> int:
        """Epochs of a run that is trained to its end."""
        return self.rungs[-1]

    def epochs_trained(self, trials: Sequence[Trial]) -> int:
        """Epochs that these trials have been trained, or are now, each of a trial's runs counted."""
        return self.runs_per_trial * sum(trial.epochs for trial in trials)

    def most_trials(self, gpu_hours: float, epochs: int) -> int:
        """How many trials the budget has room for.

        Args:
            gpu_hours: Taken so far.
            epochs: Trained for them, each run counted.
        """
        affordable = self._affordable(gpu_hours, epochs)
        return self.config.trials_at_once if affordable is None else trials_within(affordable, self.rungs, self.keep)

    def _affordable(self, gpu_hours: float, epochs: int) -> float | None:
        """Epochs of trials that the budget pays for; None if nobody knows yet what an epoch takes."""
        budget = self.config.budget
        if budget.runs is not None:
            return budget.runs * self.most_epochs / self.runs_per_trial
        assert budget.gpu_hours is not None
        return budget.gpu_hours / (gpu_hours / epochs) / self.runs_per_trial if epochs and gpu_hours else None

    def expected_runs(self, trials: int) -> float:
        """As much training as so many whole runs, that a search of so many trials is, at most."""
        return epochs_of(trials, self.rungs, self.keep) * self.runs_per_trial / self.most_epochs

    def check(self, ledger: Ledger, where: str) -> None:
        """Refuse to go on with other settings than the ledger was begun with, or with trials that are not of the space.

        Raises:
            SweepError: what has changed, or which trial it is.
        """
        begun = (ledger.rounds[0].settings if ledger.rounds else None) or self.settings
        for key, value in self.settings.items():
            if begun.get(key) != value:
                name = f"search.{key}" if key in SearchConfig.model_fields else key
                raise SweepError(f"{where}: not as when the search began: {name}; undo that, or give the search another name")
        if ledger.rounds and not ledger.trials:
            raise SweepError(f"{ledger.folder}: has no trials; {RESTORE}")
        keys = {each.key for each in self.dimensions}
        for trial in ledger.trials:
            if trial.values.keys() != keys or not all(each.has(trial.values[each.key]) for each in self.dimensions):
                raise SweepError(f"{ledger.folder}: the `values` of {trial.label} are not of search.space; {RESTORE}")

    def next_round(self, ledger: Ledger, scores: Mapping[int, list[float]], out: Mapping[int, str], gpu_hours: float) -> Round:
        """The round that follows when all trials of the last one have a score, or are given up.

        Args:
            ledger: Until now.
            scores: Of the trials of the last round: the accuracy of each run.
            out: Of those given up, the reason.
            gpu_hours: That all runs have taken so far.

        Raises:
            SweepError: the sampler is not installed, a budget in GPU-hours has nothing to go by, or no run can have what the
                space has.
        """
        told = Round(
            scores={str(number): values for number, values in scores.items()},
            out={str(number): reason for number, reason in out.items()},
            trials=[],
            settings=None if ledger.rounds else dict(self.settings),
        )
        trials = Ledger(ledger.folder, [*ledger.rounds, told]).trials
        epochs, budget = self.epochs_trained(trials), self.config.budget.gpu_hours
        if budget is not None and not gpu_hours and any(trial.scores for trial in trials):
            raise SweepError("search.budget.gpu_hours: the trials have taken none, as on a CPU; give budget.runs instead")
        if budget is not None and gpu_hours >= budget:
            return told
        goes_on = who_goes_on(trials, self.rungs, self.keep, self.config.trials_at_once)
        room = min(self.config.trials_at_once - len(goes_on), self.most_trials(gpu_hours, epochs) - len(trials))
        values = self._draw(trials, room) if room > 0 else []
        goes_on = goes_on if goes_on or values else self._last_hope(trials, self._affordable(gpu_hours, epochs))
        entries = [Entry(number=number, epochs=rung) for number, rung in goes_on]
        entries += [Entry(number=len(trials) + i, epochs=self.rungs[0], values=each) for i, each in enumerate(values)]
        return told.model_copy(update={"trials": entries})

    def _last_hope(self, trials: Sequence[Trial], affordable: float | None) -> list[tuple[int, int]]:
        """The last hope, if the budget pays for it; in GPU-hours, an estimate, a first one as long as there are any."""
        found = last_hope(trials, self.rungs)
        for number, rung in found:
            after = sum(trial.epochs for trial in trials) - trials[number].epochs + rung
            first = all(trial.epochs <= trials[number].epochs for trial in trials)
            if affordable is not None and after > affordable and (self.config.budget.runs is not None or not first):
                return []
        return found

    def _draw(self, trials: Sequence[Trial], count: int) -> list[dict[str, JsonValue]]:
        taken = Taken(self.signatures, [trial.values for trial in trials])
        found = []
        if self.config.sampler == "tpe":
            found = tpe_values(self.dimensions, self.config.seed, trials, count, taken)
        else:
            for number in range(len(trials), len(trials) + count):
                values = random_values(self.dimensions, self.config.seed, number, taken)
                if values is None:
                    break
                found.append(values)
        if not trials and not found:
            raise SweepError(f"{taken.problem}; of {TRIES} settings of the space none can be those of a run")
        return found
