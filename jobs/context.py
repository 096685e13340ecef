"""What a verb of `vitpa sweep` works on: the sweep, the runs that the filters select, the overrides, where it runs."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from jobs.drift import Drift
from jobs.errors import SweepError
from jobs.grid import KEYS, short_name
from jobs.membership import runs_that_left
from jobs.notify.outbox import Teller
from jobs.records import Place
from jobs.report import status
from jobs.scheduler.client import Scheduler
from jobs.standing import trial_number
from jobs.state import LIVE, STATES, RunState, StateReader
from jobs.sweep import Run, Sweep, SweepDir, load_sweep, recorded_sweep, value_text
from jobs.variation import check_name, is_part, is_recipe, load_base, new_axes, values_of, variation, variation_name
from vitpa.arguments import ConfigError, in_shell, literal_path
from vitpa.config_file import Override, parse_config
from vitpa.console import PrintableConsole

LOGGER = logging.getLogger(__name__)
FILTERS: dict[str, Callable[[RunState], str]] = {
    "dataset": lambda state: state.run.dataset,
    "attention": lambda state: state.run.attention,
    "seed": lambda state: str(state.run.seed),
    "state": lambda state: state.state,
}


@dataclass(frozen=True)
class Context:
    """What a verb works on."""

    options: argparse.Namespace
    root: Path
    sweep: Sweep  # as it was recorded at the last submission; for plan and submit, as its file says now
    drift: Drift
    filters: Mapping[str, set[str]]
    overrides: list[Override]  # of the section runtime
    console: Console
    scheduler: Scheduler
    tell: Teller  # of what the profile's `notify` wants to have told
    place: Place  # where it runs: as the command line says, otherwise as at the last submission
    left: list[Run] = field(default_factory=list)  # unfinished runs that were started for the sweep and have left it
    unanswered: list[str] = field(default_factory=list)  # questions to SLURM; states are then as far as the files tell

    @property
    def suffix(self) -> str:
        """What follows `vitpa sweep VERB` to mean this sweep again."""
        return self.suffix_of(self.options.sweep)

    def suffix_of(self, sweep: str) -> str:
        """The same for another sweep below the same root."""
        root = "" if self.options.root == "outputs" else f" --root {in_shell(self.options.root)}"
        return in_shell(sweep) + root

    @property
    def start_suffix(self) -> str:
        """The same for the verbs that start something, with the place unless it will be remembered."""
        if self.place == Place.of_last_submission(SweepDir(self.root, self.sweep.name).submissions):
            return self.suffix
        data_dir = f" --data-dir {in_shell(self.place.data_dir)}" if self.place.data_dir else ""
        return f"{self.suffix} --profile {in_shell(self.place.profile)}{data_dir}"

    @property
    def given_up(self) -> set[str]:
        """Signatures of the runs of trials that a search has given up: it would not use what they may still reach."""
        trials = self.sweep.ledger.trials if self.sweep.ledger is not None else []
        out = {trial.number for trial in trials if trial.out}
        return {run.signature for run in self.sweep.runs if trial_number(run) in out} if out else set()

    def look(self) -> list[RunState]:
        """The states of the runs that the filters select."""
        return select(self.states_of(self.sweep.runs), self.filters)

    def look_around(self) -> tuple[list[RunState], list[RunState]]:
        """The states of the runs that the filters select: of the sweep's, and of those in progress that have left it."""
        states = self.states_of([*self.sweep.runs, *self.left])
        count = len(self.sweep.runs)
        left = [state for state in states[count:] if state.state in LIVE]
        return select(states[:count], self.filters), select(left, self.filters)

    def states_of(self, runs: list[Run]) -> list[RunState]:
        """The states of these runs; a warning on stderr if SLURM had to be asked and did not answer."""
        reader = StateReader(self.root, self.scheduler)
        states = reader.states(runs)
        if reader.scheduler_error:
            LOGGER.warning(f"{reader.scheduler_error}; states are as far as the files tell")
            self.unanswered.append(reader.scheduler_error)
        else:
            for line in [] if getattr(self.options, "dry_run", False) else self.tell(states):
                LOGGER.warning(line)
        for line in status.in_other_clusters(states):
            if line not in self.unanswered:
                LOGGER.warning(line)
                self.unanswered.append(line)
        return states

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_changed(self) -> None:
        """Print how the sweep's file differs from what was submitted, if it does."""
        if self.drift.describe():
            self.say(self.drift.describe())

    def say_json(self, document: object) -> None:
        """Print JSON and nothing else."""
        print(json.dumps(document, indent=2, allow_nan=False))


def load_context(options: argparse.Namespace) -> Context:
    """What a command line means.

    Raises:
        SweepError, ConfigError: a sweep, a filter, a setting or a folder that cannot be used.
    """
    root = Path(os.path.realpath(options.root))  # Path.resolve raises RuntimeError at a loop of links
    if root.exists() and not root.is_dir():
        raise SweepError(f"--root {options.root}: not a folder; name the folder of runs/ and sweeps/")
    sweep = _load(options, root)
    recorded = SweepDir(root, sweep.name).recorded(sweep.runs)
    drift = Drift.between(sweep, recorded)
    if options.verb not in ("plan", "submit"):
        if recorded is not None:
            if not getattr(options, "gone", False):  # what an edited file leaves out is gone, too
                sweep = replace(sweep, runs=recorded)
        elif options.verb != "retry" or not any(run.directory(root).path.is_dir() for run in sweep.runs):
            raise SweepError(f"sweep {sweep.name} was never submitted under {root}; submit it, or say with --root where it is")
    left = runs_that_left(root, sweep.name, sweep.runs) if options.verb not in ("retry", "collect", "report") else []
    filters, overrides = parse_terms(options.terms, [*sweep.runs, *left])
    if overrides and options.verb not in ("submit", "retry"):
        raise SweepError(f"{overrides[0].key}: runtime settings are for submit and retry")
    place = Place.of_last_submission(SweepDir(root, sweep.name).submissions).changed(
        getattr(options, "profile", None), getattr(options, "data_dir", None)
    )
    if place.data_dir is not None:
        for override in overrides:
            if override.key == "runtime.data_dir":
                what = f"{override.text}, and --data-dir {place.data_dir} here or at the last submission"
                raise SweepError(f"{what}: say it by --data-dir alone")
        overrides.append(Override("runtime.data_dir", literal_path(Path(place.data_dir)), "--data-dir"))
    if options.verb in ("submit", "retry"):
        _check_settings(options, sweep.runs[0], overrides)
    tell = Teller(root, sweep.name, sweep.runs)
    return Context(options, root, sweep, drift, filters, overrides, _console(), Scheduler(), tell, place, left)


def _load(options: argparse.Namespace, root: Path) -> Sweep:
    """The sweep that SWEEP and the terms mean; of the terms those are left that are filters or settings of it."""
    starts = options.verb in ("plan", "submit")
    base = _or_as_recorded(load_base, options.sweep, root, starts=starts)
    axes, name = new_axes(base, options.terms), getattr(options, "name", None)
    own = not axes and name is None  # it is called as it is
    if own and not is_recipe(options.sweep):
        return base
    if name is not None:
        check_name(name)
    name = name or variation_name(base, axes)
    if SweepDir(root, name).sweep_yaml.is_file():
        before = _or_as_recorded(load_sweep, name, root, starts=starts)
        if not starts or ((own or is_part(base, options.terms, before)) and _select_runs(options.terms, before)):
            options.sweep = name
            return before
    if not starts:
        raise SweepError(f"sweep {name} was never submitted under {root}; submit it, or say with --root where it is")
    sweep, options.terms = variation(base, options.terms, name, root)
    options.sweep = name
    return sweep


def _select_runs(terms: Sequence[str], sweep: Sweep) -> bool:
    """Whether the terms are filters and settings of the sweep as it is."""
    try:
        parse_terms(terms, sweep.runs)
    except SweepError:
        return False
    return True


def _or_as_recorded(load: Callable[[str, Path], Sweep], name: str, root: Path, *, starts: bool) -> Sweep:
    """The sweep that is named; without its recipes, as it was recorded, unless it is to be planned or submitted."""
    try:
        return load(name, root)
    except (SweepError, ConfigError) as error:
        recorded = None if starts else recorded_sweep(name, root)
        if recorded is None:
            raise
        LOGGER.warning(f"{error}; this is the sweep as it was submitted last")
        return recorded


def _check_settings(options: argparse.Namespace, run: Run, overrides: list[Override]) -> None:
    """Refuse what is wrong on the command line also if nothing is to be started."""
    parse_config(run.config.model_dump(mode="json"), run.label, overrides)
    if options.data_dir and not Path(options.data_dir).is_dir():
        raise SweepError(f"--data-dir {options.data_dir}: no such folder; `vitpa prep` makes data sets in its --out folder")


def _console() -> Console:
    console = PrintableConsole()
    return console if console.is_terminal else PrintableConsole(width=160)  # a file or a pipe has no width to fit


def parse_terms(terms: Sequence[str], runs: Sequence[Run]) -> tuple[dict[str, set[str]], list[Override]]:
    """Filters and runtime settings from `key=value` terms. Values of one key are alternatives.

    Raises:
        SweepError: a key that is neither, or a value that no run of the sweep has.
    """
    known = {key: {value_of(RunState(run, "")) for run in runs} for key, value_of in FILTERS.items()} | {"state": set(STATES)}
    for run in runs:
        for key, value in run.settings.items():
            known.setdefault(key, set()).add(value)
    filters: dict[str, set[str]] = {}
    overrides = []
    for term in terms:
        key, equals, _ = term.partition("=")
        if equals and key == "runtime.root":
            raise SweepError(f"{term}: say it by --root")
        if equals and key.startswith("runtime."):
            overrides.append(Override.parse(term))
            continue
        if not equals or key not in known:
            near = [
                name for name in [*known, *KEYS] if short_name(name) == short_name(key)
            ]  # lr= for optim.lr, model.attention=
            near = near or difflib.get_close_matches(key, [*known, *KEYS], n=1)
            raise SweepError(
                f"{term!r}: expected a filter ({', '.join(f'{name}=' for name in known)}), a setting runtime.KEY=VALUE, or, "
                f"to plan and submit, values of a key of the configuration{f'; did you mean {near[0]}?' if near else ''}"
            )
        for value in _values(term, known[key]):
            if value not in known[key]:
                raise SweepError(f"{term!r}: there is no {key} {value!r}; there is {', '.join(sorted(known[key]))}")
            filters.setdefault(key, set()).add(value)
    return filters, overrides


def _values(term: str, known: Set[str]) -> list[str]:
    """The values that a filter names, as runs have them: 5e-4 is 0.0005."""
    key, _, text = term.partition("=")
    raw = text.split(",")
    return raw if key not in KEYS or known >= set(raw) else [value_text(value) for value in values_of(term)]


def select(states: list[RunState], filters: Mapping[str, set[str]]) -> list[RunState]:
    """The states that every filter accepts."""

    def value(state: RunState, key: str) -> str | None:
        return FILTERS[key](state) if key in FILTERS else state.run.settings.get(key)

    return [state for state in states if all(value(state, key) in values for key, values in filters.items())]
