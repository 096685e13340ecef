"""Which runs may be replicas of one step, and what differs between them; torch-free.

Replicas share a graph. A setting that is a number in it may differ between them, as the seed does; what shapes the graph, and
the section `runtime`, may not.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from typing import Any

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.config_file import Override, fields_of, parse_values

MAX_REPLICAS = 1024  # of one step; more are a slip, and a GPU is busy with far fewer

# Of each section the keys that may differ between replicas.
PER_REPLICA: dict[str, set[str]] = {
    "model": {"drop_path_rate", "pos_embed_std"},
    "augment": {
        "randaugment_magnitude",
        "randaugment_magnitude_std",
        "erase_prob",
        "erase_scale",
        "erase_ratio",
        "cutout_px",
        "mixup_alpha",
        "cutmix_alpha",
        "mixup_switch_prob",
    },
    "optim": {
        "lr",
        "min_lr",
        "warmup_epochs",
        "weight_decay",
        "betas",
        "eps",
        "label_smoothing",
        "grad_clip_norm",
    },
}

FIELDS = dict(fields_of(RunConfig))


def may_differ(key: str) -> bool:
    """Whether a dotted key may have other values in other replicas of a step."""
    section, _, name = key.rpartition(".")
    return key == "seed" or name in PER_REPLICA.get(section, ())


def keys_that_may_differ() -> list[str]:
    """The dotted keys that may differ, in the order of the configuration."""
    return [key for key, _ in fields_of(RunConfig) if may_differ(key)]


def alternatives(text: str) -> list[str | Override]:
    """The overrides that `a.b=value`, or `a.b=value,value` of a key that may differ between replicas, stands for.

    Raises:
        ConfigError: it is not of that form, or has several values of another key.
    """
    key, _, written = text.partition("=")
    annotation = FIELDS[key].annotation if key in FIELDS else str
    if "," not in written or str in (annotation, *typing.get_args(annotation)):  # a text may have commas
        return [text]
    values = parse_values(text)
    if len(values) < 2 or (typing.get_origin(annotation) is tuple and not all(isinstance(each, list) for each in values)):
        return [text]
    if may_differ(key):
        return [Override(key, value) for value in values]
    hint = "name one of them"
    if not key.startswith("runtime.") and key != "train.holdout":  # a sweep's runs are compared, so they have the same images
        term = text.removeprefix("model.") if key == "model.attention" else text
        hint = f"to train several values: vitpa sweep submit RECIPE {term}"
    raise ConfigError(f"{text}: {key} must be the same for all runs of one step; {hint}")


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def step_shape(config: RunConfig) -> str:
    """The same text for runs that may train together: their document without what may differ between replicas."""
    return config.model_dump_json(exclude={"seed": True, **PER_REPLICA})


def differing(configs: Sequence[RunConfig]) -> list[str]:
    """The dotted keys that do not have one value in all these runs; the seed comes last."""
    keys = [key for key, _ in fields_of(RunConfig) if len({value_of(config, key) for config in configs}) > 1]
    return sorted(keys, key=lambda key: key == "seed")


def check_together(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that cannot be replicas of one step.

    Raises:
        ConfigError: they differ in what shapes the step, or one of them comes up twice.
    """
    for key in differing(configs):
        if not may_differ(key):
            first, second, *_ = _values(configs, key)
            if key.startswith("runtime."):
                raise ConfigError(
                    f"{key}={first} and {key}={second} cannot be trained together: they share a process; say {key}=VALUE on "
                    "the command line, for all"
                )
            raise ConfigError(
                f"{key}={first} and {key}={second} cannot be trained together: it shapes the step, which all replicas share; "
                "train them apart (a sweep does that by itself)"
            )
    names: dict[str, str] = {}
    for config, name in zip(configs, replica_names(configs), strict=True):
        if config.signature in names:
            raise ConfigError(f"the run with {name} is to be trained twice; name each run, and each value of a setting, once")
        names[config.signature] = name


def replica_names(configs: Sequence[RunConfig]) -> list[str]:
    """Each run by what tells it from the others, such as `seed 0`, or `optim.lr 0.001, seed 0`."""
    keys = differing(configs) or ["seed"]
    return [", ".join(f"{key} {_text(value_of(config, key))}" for key in keys) for config in configs]


def group_name(configs: Sequence[RunConfig]) -> str:
    """Runs that train together, such as `cifar10-content-s0,1`, or `cifar10-content (16 runs by optim.lr, seed)`."""
    name, keys = f"{configs[0].dataset}-{configs[0].network_name}", differing(configs)
    if keys in ([], ["seed"]):
        return f"{name}-s{','.join(str(config.seed) for config in configs)}"
    return f"{name} ({len(configs)} runs by {', '.join(keys)})"


def settings_apart(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Of each run the settings that not all have, without the seed."""
    keys = [key for key in differing(configs) if key != "seed"]
    return [{key: value_of(config, key) for key in keys} for config in configs]


def _values(configs: Sequence[RunConfig], key: str) -> list[str]:
    return list(dict.fromkeys(_text(value_of(config, key)) for config in configs))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
