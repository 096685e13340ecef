"""JSON and YAML documents: read within bounds, with one meaning of numbers and names; YAML that reads back as it was.

A scalar of YAML means what the core schema of YAML 1.2 says (https://yaml.org/spec/1.2.2/, section 10.3): 010 is ten, `on`
and 1:30 are strings, and so is a date. PyYAML by itself reads YAML 1.1. Keys are always names, merge keys (`<<`) are merged.
Null is written out: `~` and an empty value also mean null in YAML, but are refused: the author may have meant more.
Whatever a file holds, reading it ends soon, in a document or in one line: size, depth, aliases and numbers are limited.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import yaml

from vitpa.arguments import FLOAT, INTEGER, parse_float, parse_integer

MAX_DEPTH = 64
TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
SMALL_BYTES = 64 << 10
TAIL_BYTES = 100_000  # of a log, to find its last lines
JSON_BYTES = 64 << 20  # a sweep of 25,000 runs has a runs.json of this size
YAML_BYTES = 256 << 10  # PyYAML reads some 50,000 bytes a second; a list of 10,000 seeds has a quarter of this
EXPANDED = 4 * YAML_BYTES  # what it may stand for once its aliases are filled in, characters
INTEGER_DIGITS = 30  # beyond any count of ours, and small enough for a float
SURROGATE = re.compile(
    "[\ud800-\udbff\ude00-\udfff]|[\udc00-\udc7f\udd00-\udfff]"
)  # save those that stand for bytes of a path


class DocumentError(ValueError):
    """A text that is not the JSON or YAML it should be: what is wrong, and where in the text; one line."""


def open_regular(path: Path, folder: int | None = None) -> BinaryIO:
    """A regular file, opened for reading; a pipe in its place is not waited at.

    With `folder`, the descriptor of its folder, it is looked for there, by its name, and is no link.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return os.fdopen(regular_descriptor(path, os.O_RDONLY, folder), "rb")


def append_regular(path: Path) -> BinaryIO:
    """A regular file, made if it is not there, opened to write to its end; a pipe in its place is not waited at.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return os.fdopen(regular_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def regular_descriptor(path: Path, flags: int, folder: int | None = None) -> int:
    """A descriptor of a regular file, opened with `flags`; `folder` and errors as for `open_regular`."""
    irregular = OSError(errno.EINVAL, "not a regular file", str(path))
    flags |= os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if folder is None:
            handle = os.open(path, flags, 0o666)
        else:
            handle = os.open(path.name, flags | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ENXIO or (error.errno == errno.ELOOP and folder is not None):  # a pipe, a socket; a link
            raise irregular from None
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise irregular
    except OSError:
        os.close(handle)
        raise
    return handle


def read_bytes(path: Path, limit: int) -> bytes:
    """What a regular file of at most `limit` bytes holds; does not wait at a pipe.

    Raises:
        OSError: it cannot be read, or is no regular file.
        DocumentError: it is larger.
    """
    with open_regular(path) as file:
        size = max(os.fstat(file.fileno()).st_size, SMALL_BYTES)  # memory is set aside for all that is asked for
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise DocumentError(f"larger than {limit:,} bytes")
    return data


def read_end(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a regular file, or all that it has.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
        return file.read()


def lines_at_end(path: Path) -> list[str]:
    """The last lines of a text with anything in them, without blanks around it; raises as `read_end`."""
    return [line.strip() for line in read_end(path, TAIL_BYTES).decode(errors="replace").splitlines() if line.strip()]


def parse_json(text: str | bytes) -> Any:
    """The document that a JSON text holds.

    Raises:
        DocumentError: not JSON; NaN or another number that is not finite; a key given twice; too large or too deep.
    """
    if len(text) > JSON_BYTES:
        raise DocumentError(f"larger than {JSON_BYTES:,} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        document = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise DocumentError(f"not a JSON text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DocumentError(f"not valid JSON ({error.msg} at line {error.lineno}); it was cut or edited") from None
    except RecursionError:
        raise DocumentError(TOO_DEEP) from None
    if "\\u" in text or not text.isascii():
        _walk(document)
    elif not _is_plain(text):
        _check_depth(document)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DocumentError(f"the key {_short(twice)} is given twice")
    return document


def _json_integer(text: str) -> int:
    if len(text) > INTEGER_DIGITS:
        raise DocumentError(f"a number of {len(text):,} digits")
    return int(text)


def _json_float(text: str) -> float:
    found = float(text)  # JSON's numbers are Python's
    if found and math.isfinite(found):
        return found
    number = parse_float(text, digits=JSON_BYTES)
    if number is None:
        raise DocumentError(f"{_short(text)} is no number that float64 can hold")
    return number


def _json_constant(text: str) -> NoReturn:
    raise DocumentError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_json_integer, parse_float=_json_float, parse_constant=_json_constant
)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def check_document(document: object) -> None:
    """Refuse a document in memory that is too deep, or holds half a character.

    Raises:
        DocumentError: it is or does.
    """
    try:
        text = json.dumps(document)
    except (RecursionError, TypeError, ValueError):  # too deep, or nothing that JSON has
        text = ""
    if not (text and _is_plain(text)):
        _walk(document)


def _is_plain(text: str) -> bool:
    """Whether a JSON text in ASCII can only be of a document that `_walk` accepts: seen in a twentieth of the time."""
    return text.count("[") + text.count("{") <= MAX_DEPTH and "\\u" not in text


def _check_depth(document: object) -> None:
    """The depth alone, of a document without half a character: in a third of the time."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_DEPTH - 1):
        level = [
            value
            for each in level
            for value in (each.values() if isinstance(each, dict) else each)
            if isinstance(value, dict | list)
        ]
    if any(level):
        raise DocumentError(TOO_DEEP)


def _walk(document: object) -> None:
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
                raise DocumentError(f"{ascii(value)[:60]}: half of a character (a lone surrogate)")
        if not below:
            return
        level = below
    raise DocumentError(TOO_DEEP)


# --- YAML


class WrittenInt(int):
    """A whole number that remembers how it was written, such as 007."""

    written: str = ""


class WrittenFloat(float):
    """A number that remembers how it was written, such as 1e3."""

    written: str = ""


def parse_yaml(text: str | bytes) -> Any:
    """The document that a YAML text holds: mappings with names as keys, lists, strings, numbers, booleans and null.

    Raises:
        DocumentError: not YAML, several documents, a key given twice, a tag, too large, too deep or too many aliases.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if len(text) > YAML_BYTES:
            raise DocumentError(f"larger than {YAML_BYTES:,} bytes")
        document = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise DocumentError(f"not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.reader.ReaderError as error:
        what = error.character if isinstance(error.character, str) else chr(error.character)
        raise DocumentError(f"not valid YAML: the character {what!a} at position {error.position}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise DocumentError(f"not valid YAML: {reason}") from None
    check_document(document)
    return document


def parse_yaml_value(text: str) -> Any:
    """The value that all of `text` is in YAML, as an override has it.

    Raises:
        DocumentError: as for `parse_yaml`, or YAML would leave a part of the text out, such as ` # a comment`.
    """
    value, node = parse_yaml(text), yaml.compose(text, Loader=_Loader)
    if node is None:  # no value
        return value
    plain = isinstance(node, yaml.ScalarNode) and node.style is None and not text.startswith("!!")
    if node.start_mark.index or node.end_mark.index < len(text) or (plain and node.value != text):
        read = node.value if isinstance(node, yaml.ScalarNode) else text[node.start_mark.index : node.end_mark.index]
        raise DocumentError(f"YAML reads only {read!r} of it")
    return value


CORE_SCHEMA = (  # tag, pattern, first characters; in this order
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", re.compile(rf"{FLOAT.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"), list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, with YAML 1.2's meaning of scalars, and limits."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._measured: dict[int, tuple[int, int]] = {}  # of each node: depth, and characters with all aliases filled in

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in PyYAML, within the limits."""
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._measured:
                raise DocumentError(f"line {line}: an alias of what it is in")
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise DocumentError(f"line {line}: nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._measured[id(node)] = depth, size = self._measure(node)
            if depth > MAX_DEPTH:
                raise DocumentError(f"line {line}: nested deeper than {MAX_DEPTH} by its aliases")
            if size > EXPANDED:
                raise DocumentError(f"line {line}: more than {EXPANDED:,} characters once its aliases are filled in")
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1 + len(node.value)
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        measured = [self._measured[id(each)] for each in inner]
        return 1 + max((depth for depth, _ in measured), default=0), 1 + sum(size for _, size in measured)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping; its keys are the texts of their scalars, whatever those mean as values."""
        if not isinstance(node, yaml.MappingNode):
            self.refuse_tag(node)
        own: dict[Hashable, yaml.Node] = {}
        merged: dict[Hashable, Any] = {}
        for key, value in node.value:
            where = f"line {key.start_mark.line + 1}"
            if isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None:
                for section in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(section, yaml.MappingNode):
                        raise DocumentError(f"{where}: << merges sections only")
                    merged = self.construct_mapping(section, deep=True) | merged  # of several, the first one counts
            elif not isinstance(key, yaml.ScalarNode):
                raise DocumentError(f"{where}: a key must be a name, not a list or a section")
            elif key.value in own:
                times = sum(other.value == key.value for other, _ in node.value)
                raise DocumentError(f"{where}: the key {_short(key.value)} is given {times} times")
            else:
                own[str(key.value)] = value
        return merged | {key: self.construct_object(value, deep=True) for key, value in own.items()}

    def construct_document(self, node: yaml.Node) -> Any:
        """The value of the root; nothing is left for later, so that values are whole when they are looked at."""
        return self.construct_object(node, deep=True)

    def refuse_tag(self, node: yaml.Node) -> NoReturn:
        """For all tags that are not of the core schema."""
        tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
        raise DocumentError(f"line {node.start_mark.line + 1}: the tag {_short(tag)[1:-1]} is not for our files; leave it out")

    def scalar(self, node: yaml.Node) -> Any:
        """The value of a scalar whose tag is one of the core schema's, given or found."""
        kind, text = str(node.tag).rpartition(":")[2], node.value
        where = f"line {node.start_mark.line + 1}"
        pattern = next(pattern for name, pattern, _ in CORE_SCHEMA if name == kind)
        if not isinstance(text, str) or not pattern.fullmatch(text):
            raise DocumentError(f"{where}: {_short(str(text))} is not of the type !!{kind}")
        if kind == "null":
            if not text.strip("~"):  # mostly left there by a shell, or in a line that is half written
                what = "~ by itself is null in YAML; ~/ is the home directory" if text else "no value"
                raise DocumentError(f"{where}: {what}; write null for none")
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            whole = parse_integer(text)
            if whole is None or len(str(whole)) > INTEGER_DIGITS:
                raise DocumentError(f"{where}: a number of {len(text):,} digits")
            found: WrittenInt | WrittenFloat = WrittenInt(whole)
            found.written = text
            return found
        number = parse_float(text)
        if number is None:
            raise DocumentError(f"{where}: {_short(text)[1:-1]} is not a finite number that float64 can hold; no key takes it")
        found = WrittenFloat(number)
        found.written = text
        return found


def _constructed_text(loader: _Loader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        loader.refuse_tag(node)
    text = str(node.value)
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # JSON's escapes come in two halves


def _constructed_list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        loader.refuse_tag(node)
    return loader.construct_sequence(node, deep=True)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.scalar)
_Loader.add_constructor("tag:yaml.org,2002:str", _constructed_text)
_Loader.add_constructor("tag:yaml.org,2002:seq", _constructed_list)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor(None, _Loader.refuse_tag)


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.1 or of 1.2 would take for something else than a string."""


class _FastDumper(yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper):  # type: ignore[misc]
    """The same by libyaml: 0.6 ms for a configuration, not 2.2."""


for _tag, _pattern, _first in CORE_SCHEMA:
    for _dumper in (_Dumper, _FastDumper):
        _dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)


def to_yaml(document: Mapping[str, Any]) -> str:
    """`document` as YAML in the order of its keys; `parse_yaml` makes the same of it again."""
    try:
        return str(yaml.dump(dict(document), Dumper=_FastDumper, sort_keys=False, allow_unicode=True))
    except UnicodeEncodeError:  # a path with bytes that are no UTF-8, which libyaml does not take
        return str(yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
