"""How a configuration is read: defaults < YAML file < `a.b=value` overrides, all through one checked path.

An error names the file or the override, the key, and the nearest known one.
"""

from __future__ import annotations

import difflib
import functools
import json
import operator
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.documents import YAML_BYTES, DocumentError, check_document, parse_yaml, parse_yaml_value, read_bytes, to_yaml
from vitpa.installation import CODE
from vitpa.records import create_exclusive, make_folders
from vitpa.rundir import RunDir
from vitpa.terminal import printable

COMMAND_LINE = "command line"
NOTHING = object()
LONGEST_SHOWN = 200  # characters of a value in an error message
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes of a path, as Python reads them
EMPTY_VALUE = re.compile(r"(?:^|,)\s*(?:,|$)")  # among values with commas between
NO_TEXT = "bytes that are not UTF-8, which no configuration can hold; give that file or folder another name"


def record_config(config: RunConfig) -> RunDir:
    """Make the run's directory and put its resolved configuration there, or check the one that is there.

    Raises:
        ConfigError: the directory of this signature holds another experiment.
    """
    run = config.run_dir
    make_folders(run.path)
    text = to_yaml(config.model_dump(mode="json"))
    if not create_exclusive(run.config_yaml, text) and not _holds(run.config_yaml, text):
        recorded = load_model(RunConfig, run.config_yaml)
        if recorded.experiment() != config.experiment():
            raise ConfigError(
                f"{run.config_yaml}: another experiment under the signature {config.signature}; "
                "it was edited by hand: restore it, or move the run's directory away"
            )
    return run


def _holds(path: Path, text: str) -> bool:
    """Whether that is what the file holds, which is quicker to say than to read it as YAML."""
    try:
        return read_bytes(path, YAML_BYTES) == text.encode()
    except (OSError, DocumentError):
        return False


SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str | Override] = ()) -> RunConfig:
    """Read a recipe and apply overrides such as `optim.lr=3e-4`.

    `path` may also be the name of a shipped recipe, such as `cifar10` for vitpa/configs/cifar10.yaml.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest known one is named), wrong type or bad combination.
    """
    return load_model(RunConfig, _find(path, shipped_configs()), overrides)


def parse_config(document: Mapping[str, Any], where: str, overrides: Sequence[str | Override] = ()) -> RunConfig:
    """A run configuration from a document in memory; `where` names its origin in error messages."""
    return parse_model(RunConfig, apply_overrides(document, overrides) if overrides else document, where, overrides)


def load_model(model: type[SectionT], path: Path, overrides: Sequence[str | Override] = ()) -> SectionT:
    """Read any YAML file of ours into its pydantic model, with overrides, under the same checks.

    Raises:
        ConfigError: as for `load_config`.
    """
    return parse_model(model, apply_overrides(read_yaml(path), overrides), str(path), overrides)


def shipped_configs() -> dict[str, Path]:
    """The recipes that come with vitpa, by name."""
    return {path.stem: path for path in sorted((CODE / "vitpa" / "configs").glob("*.yaml"))}


def _find(path: Path, shipped: Mapping[str, Path]) -> Path:
    if path.is_file():
        return path
    if str(path) in shipped:
        return shipped[str(path)]
    raise ConfigError(f"{path}: no such file, and no shipped recipe of that name (there are {', '.join(shipped)})")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, a key given twice, or beyond the bounds of `vitpa.documents`.
    """
    try:
        document = parse_yaml(read_bytes(path, YAML_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except DocumentError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else "a list" if isinstance(document, list) else "a single value"
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    return document


@dataclass(frozen=True)
class Override:
    """A value that replaces that of a document, and where it comes from, for error messages."""

    key: str  # dotted
    value: Any
    origin: str = COMMAND_LINE

    @property
    def text(self) -> str:
        """`a.b=value`, as it may be written."""
        written = getattr(self.value, "written", "") or self.value
        return f"{self.key}={written if isinstance(written, str) else json.dumps(written)}"

    @staticmethod
    def parse(text: str, origin: str = COMMAND_LINE) -> Override:
        """The override that `a.b=value` stands for; the value is read as YAML.

        Raises:
            ConfigError: it is not of that form.
        """
        key, equals, written = text.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"override {text!r}: expected key=value, such as optim.lr=3e-4")
        if NOT_UTF8.search(text):
            raise ConfigError(f"override {text!r}: {NO_TEXT}")
        try:
            value = parse_yaml_value(written)
            if value is None and "null" not in written.lower():
                raise DocumentError("no value; write null for none (or is a variable of the shell not set?)")
            return Override(key, value, origin)
        except DocumentError as error:
            hint = f"; a text that YAML reads otherwise needs both kinds of quotes: {key}=\"'...'\"" if written.strip() else ""
            raise ConfigError(f"override {text!r}: {str(error).removeprefix('line 1: ')}{hint}") from error


def parse_values(text: str, origin: str = COMMAND_LINE) -> list[Any]:
    """The values of `a.b=value,value`, each read as YAML; none of `a.b=`.

    Raises:
        ConfigError: it is not of that form, or one of several values is empty.
    """
    key, _, written = text.partition("=")
    if written.strip() and EMPTY_VALUE.search(written):
        raise ConfigError(f"override {text!r}: an empty value; write {key}=A,B, or leave the comma out")
    values = Override.parse(f"{key}=[{written}]", origin).value
    return values if isinstance(values, list) else [values]


def preset(text: str) -> Override:
    """`a.b=value` as the program itself gives it, which a command line may give otherwise."""
    return Override.parse(text, "vitpa")


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str | Override]) -> dict[str, Any]:
    """A copy of `document` with each override set.

    Raises:
        ConfigError: an override that is not of the form `a.b=value`, or goes below something that is not a section; a key
            that the command line gives twice.
    """
    result: dict[str, Any] = _copy(document)
    typed: dict[str, Override] = {}
    for override in _parsed(overrides):
        if override.origin == COMMAND_LINE and (first := typed.setdefault(override.key, override)) is not override:
            raise ConfigError(
                f"{COMMAND_LINE}: {first.text} and {override.text}: {override.key} is given twice; say one of them"
            )
        shown = f"override {override.key!r}" if override.origin == COMMAND_LINE else f"{override.origin}: {override.key}"
        *parents, last = override.key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{shown}: {parent} is a value, not a section")
        if isinstance(override.value, dict) or isinstance(section.get(last), dict):  # it would replace the other keys
            hint = f"give its keys one by one, as {override.key}.KEY=VALUE (a text needs both kinds of quotes)"
            raise ConfigError(f"{shown}: {override.key} is a section; {hint}")
        section[last] = _copy(override.value)
    return result


def _parsed(overrides: Sequence[str | Override]) -> list[Override]:
    return [Override.parse(each) if isinstance(each, str) else each for each in overrides]


def _copy(value: Any) -> Any:
    """A copy whose sections are all its own, also where an alias of YAML has made two of them one."""
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def parse_model(
    model: type[SectionT], document: Mapping[str, Any], where: str, overrides: Sequence[str | Override] = ()
) -> SectionT:
    """Check a document in memory against any pydantic model of ours.

    `where` names its origin in error messages, save for values that came from `overrides`, which are part of it.

    Raises:
        ConfigError: as for `load_config`.
    """
    origins = {override.key: override.origin for override in _parsed(overrides)}
    for key, text in _texts(document):
        if NOT_UTF8.search(text):
            origin = origins.get(key, where)
            raise ConfigError(f"{origin}: {key}={text}: {NO_TEXT}" if key else f"{origin}: the key {text!r}: {NO_TEXT}")
    try:
        check_document(document)
        # by way of JSON: there pydantic's strict mode takes lists for tuples, and nothing else it should not
        return model.model_validate_json(json.dumps(document, allow_nan=False))
    except ValidationError as error:
        told: dict[str, list[str]] = {}
        for problem in error.errors():
            origin, text = _problem(problem, model, document, where, origins)
            told.setdefault(origin, []).append(text)
        raise ConfigError(printable("; ".join(f"{origin}: {'; '.join(texts)}" for origin, texts in told.items()))) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: a value of a type that no key takes ({error})") from error


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a document with its dotted key, and every key itself with none."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield "", str(name)
            yield from _texts(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)


def _problem(
    problem: ErrorDetails, model: type[BaseModel], document: Mapping[str, Any], where: str, origins: Mapping[str, str]
) -> tuple[str, str]:
    """For a problem: where the value comes from; its key and what is wrong with it."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of our own checks, which name their keys
        message = str(problem["msg"]).removeprefix("Value error, ")
        named = [given for given in origins if re.search(rf"(?<![\w.]){re.escape(given)}(?!\.?\w)", message)]
        if not named:
            return where, message
        others = [name for name in re.findall(r"(?<![\w.])([a-z][a-z_.]*)=", message) if name not in origins]
        told = [
            f"{name} is {'from ' + where if _value_at(document, name.split('.')) is not NOTHING else 'the default'}"
            for name in dict.fromkeys(others)
        ]
        return origins[named[0]], message + (f" ({', '.join(told)})" if told else "")
    given = (name for name in origins if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."))
    origin = origins.get(next(given, ""), where)
    return origin, _explain(problem, key, model, document, typed=origin == COMMAND_LINE)


def _value_at(document: object, key: Sequence[str | int]) -> Any:
    """The value at a key of a document; NOTHING if there is none."""
    try:
        return functools.reduce(operator.getitem, key, document)  # type: ignore[arg-type]
    except (LookupError, TypeError):
        return NOTHING


def _explain(problem: ErrorDetails, key: str, model: type[BaseModel], document: Mapping[str, Any], *, typed: bool) -> str:
    if problem["type"] == "extra_forbidden":
        known = [key for key, _ in fields_of(model)]
        if key in known:  # with a dot, in a file
            section, _, name = key.rpartition(".")
            return f"unknown key {key}; write it as a section: `{section}:`, and below it, indented, `{name}: ...`"
        own_level = [name for name in known if name.count(".") == key.count(".")]
        if isinstance(problem["input"], dict) and problem["input"] and not nearest_key(key, own_level):  # no such section
            key += f".{next(iter(problem['input']))}"
        near = nearest_key(key, known)
        hint = f"did you mean {near}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key[:LONGEST_SHOWN]}; {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    value = getattr(_value_at(document, problem["loc"]), "written", "") or problem["input"]  # a number as the user wrote it
    shown = value if isinstance(value, str) else json.dumps(value)
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
    message = str(problem["msg"])
    if problem["type"] == "string_type" and not isinstance(problem["input"], list | dict):
        quoted = f"{key}=\"'{shown}'\", with both kinds of quotes" if typed else f"{key.rpartition('.')[2]}: '{shown}'"
        message += f"; if {shown} is a name, write {quoted}"
    example = _example(dict(fields_of(model)).get(key)) if problem["type"] in ("dict_type", "list_type", "tuple_type") else ""
    if example:
        message += f"; write it as `'{key}={example}'`" if typed else f"; write it as `{key.rpartition('.')[2]}: {example}`"
    return f"{key}={shown}: {message}"


def _example(field: FieldInfo | None) -> str:
    """How a value of a field that takes several can be written; empty if nothing shows it."""
    if field is None:
        return ""
    default = list(field.default) if isinstance(field.default, list | tuple) else []
    return str(field.examples[0]) if field.examples else json.dumps(default, separators=(",", ":")) if default else ""


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that a mistyped one may have meant: of the same last part in another section, or written alike."""
    near = [name for name in known if name.split(".")[-1] == key.rsplit(".", maxsplit=1)[-1]]
    near = near or difflib.get_close_matches(key[:LONGEST_SHOWN], known, n=1, cutoff=0.5)
    return near[0] if near else None


def keys_help() -> str:
    """Every key of a run's configuration with its default and its meaning, a line each, for `--help`."""
    lines = []
    for key, field in fields_of(RunConfig):
        default = "required" if field.is_required() else json.dumps(field.default)
        literal = typing.get_origin(field.annotation) is typing.Literal
        choices = f" ({', '.join(typing.get_args(field.annotation))})" if literal else _bounds(field)
        lines.append(f"  {key:<32} {default:<16} {field.description}{choices}")
    return "\n".join(lines)


def _bounds(field: FieldInfo) -> str:
    """The bounds of a whole number, such as ` (1 to 8,192)`; empty for what has none."""
    low, high = (next((getattr(each, kind) for each in field.metadata if hasattr(each, kind)), None) for kind in ("ge", "le"))
    return f" ({low:,} to {high:,})" if isinstance(low, int) and isinstance(high, int) else ""


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a configuration in dotted form, in order (dataset, seed, model.attention, ...), with its field."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
