"""A sweep that the command line makes of another one, or of a recipe: `vitpa sweep submit cifar10 optim.lr=5e-4,1e-3`.

It has a name and a folder of its own, so that every other verb finds it by the same words, or by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SweepError
from jobs.grid import KEYS, OWN_LISTS, short_name
from jobs.sweep import Sweep, SweepConfig, load_sweep, resolve, shipped_sweeps, sweep_of
from vitpa.config_file import parse_model, parse_values, shipped_configs

LISTS = {short_name(key): name for key, name in OWN_LISTS.items()}  # terms that narrow a list of the new sweep
WHERE = "command line"


def is_recipe(spec: str) -> bool:
    """Whether `spec` names a shipped recipe, and neither a file nor a shipped sweep."""
    return spec in shipped_configs() and spec not in shipped_sweeps() and not Path(spec).is_file()


def load_base(spec: str, root: Path) -> Sweep:
    """The sweep that `spec` names, or that of a recipe: one seed, both attentions.

    Raises:
        SweepError, ConfigError: as for `load_sweep`.
    """
    if not is_recipe(spec):
        return load_sweep(spec, root)
    document = {"name": spec, "recipes": [spec], "attentions": ["content", "positional"], "seeds": [0]}
    config = parse_model(SweepConfig, document, spec)
    return Sweep(config, resolve(config, spec))


def new_axes(base: Sweep, terms: Sequence[str]) -> list[str]:
    """The terms that add an axis to `base`: those of a key of the configuration that is not on its axes already."""
    taken = {*base.config.axes, *OWN_LISTS}
    return [term for term in terms if (key := _key(term)) in KEYS and key not in taken and not key.startswith("runtime.")]


def variation_name(base: Sweep, axes: Sequence[str]) -> str:
    """What it is called unless somebody says otherwise: `cifar10-lr`."""
    return "-".join([base.name, *(short_name(_key(term)) for term in axes)])


def check_name(name: str) -> None:
    """Refuse a name that means something else already: a sweep of it would be shown under the shipped one's description.

    Raises:
        SweepError: a shipped sweep or recipe has it.
    """
    for kind, shipped in (("sweep", shipped_sweeps()), ("recipe", shipped_configs())):
        if name in shipped:
            raise SweepError(f"--name {name}: this is the name of a shipped {kind}; take another with --name")


def variation(base: Sweep, terms: Sequence[str], name: str, root: Path) -> tuple[Sweep, list[str]]:
    """`base` below `root` with an axis for each new key, and the data sets, attentions and seeds that are named; other terms.

    Raises:
        SweepError, ConfigError: values that contradict each other, or that a run cannot have.
    """
    axes = new_axes(base, terms)
    narrowing = [term for term in terms if _key(term) in LISTS]
    document = base.config.model_dump(mode="json")
    for term in axes:
        if _key(term) in document["axes"]:
            raise SweepError(f"{term!r}: {_key(term)} is given twice; write its values as {_key(term)}=A,B")
        document["axes"][_key(term)] = values_of(term)
        document["overrides"].pop(_key(term), None)  # what is typed counts
    once: set[str] = set()
    for term in narrowing:
        if (key := _key(term)) in once:
            raise SweepError(f"{term!r}: {key} is given twice; write its values as {key}=A,B")
        once.add(key)
        document[LISTS[key]] = values_of(term)
    if any(_key(term) == "dataset" for term in narrowing):
        recipe_of = {run.dataset: run.recipe for run in base.runs}
        unknown = [each for each in document["recipes"] if each not in recipe_of]
        if unknown:
            raise SweepError(f"there is no dataset {unknown[0]!r} in {base.name}; there is {', '.join(recipe_of)}")
        document["recipes"] = [recipe_of[each] for each in document["recipes"]]
    document |= {"name": name, "reference": {} if document["axes"] else _reference(base, document)}
    config = parse_model(SweepConfig, document, WHERE)
    return sweep_of(config, WHERE, root), [term for term in terms if term not in [*axes, *narrowing]]


def _reference(base: Sweep, document: Mapping[str, Any]) -> dict[str, Any]:
    """The references of `base`, of the data sets and attentions that are left."""
    datasets = {run.dataset for run in base.runs if run.recipe in document["recipes"]}
    return {
        dataset: {attention: its for attention, its in of_attentions.items() if attention in document["attentions"]}
        for dataset, of_attentions in document["reference"].items()
        if dataset in datasets
    }


def is_part(base: Sweep, terms: Sequence[str], recorded: Sweep) -> bool:
    """Whether the terms can be filters of the recorded sweep: but for their axes it is what `base` is now.

    Seeds and attentions may be fewer or more: the words that it was made with may have named them.
    """
    now, before = base.config, recorded.config
    new = {_key(term) for term in new_axes(base, terms)}
    datasets = [value for term in terms if _key(term) == "dataset" for value in values_of(term)]
    if datasets:
        recipes = {run.recipe for run in base.runs if run.dataset in datasets} <= set(before.recipes)
    else:
        recipes = set(now.recipes) == set(before.recipes)
    return (
        recipes
        and {key: value for key, value in now.overrides.items() if key not in new} == before.overrides
        and now.axes == {key: values for key, values in before.axes.items() if key not in new}
        and (now.include, now.exclude, now.search) == (before.include, before.exclude, before.search)
    )


def values_of(term: str) -> list[Any]:
    """The values of `key=A,B`, each read as YAML.

    Raises:
        ConfigError: they cannot be read.
        SweepError: there is none.
    """
    values = parse_values(term, WHERE)
    if not values:
        raise SweepError(f"{term!r}: no value; write {_key(term)}=A,B")
    return values


def _key(term: str) -> str:
    return term.partition("=")[0]
