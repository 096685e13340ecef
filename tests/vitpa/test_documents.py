"""YAML and JSON that we read: one meaning, within bounds, one line for whatever cannot be read."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vitpa.arguments import ConfigError
from vitpa.config_file import load_config, read_yaml
from vitpa.documents import JSON_BYTES, MAX_DEPTH, DocumentError, parse_json, parse_yaml, read_bytes, to_yaml
from vitpa.installation import CODE
from vitpa.records import RunError, read_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-007", -7),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("1_0.0", "1_0.0"),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("n", "n"),
        ("TRUE", True),
        ("null", None),
        ("nUll", "nUll"),
        ("2024-11-28", "2024-11-28"),
        ("2024-11-28 10:00:00", "2024-11-28 10:00:00"),
        ("0b1", "0b1"),
        ("٣", "٣"),
        ("=", "="),
        ("!!str 010", "010"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("%YAML 1.1\n---\n010", 10),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("{010: a, on: b, null: c, 1e3: d}", {"010": "a", "on": "b", "null": "c", "1e3": "d"}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        ("a: &a {x: 1}\nc: {<<: [{x: 8}, *a]}", {"a": {"x": 1}, "c": {"x": 8}}),
    ],
)
def test_yaml_means_what_version_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "line 1: nested deeper than 64"),
        ("{a: " * 50_000, "line 1: nested deeper than 64"),
        ("- " * 100_000, "line 1: nested deeper than 64"),
        ("\n".join(" " * depth + "a:" for depth in range(200)), "line 64: nested deeper than 64"),
        ("a0: &a0 [x]\n" + "\n".join(f"a{n + 1}: &a{n + 1} [*a{n}]" for n in range(3000)), "nested deeper than 64 by its al"),
        (
            "a0: &a0 " + "x" * 256 + "".join(f"\na{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)),
            "aliases",
        ),
        ("x" * 300_000, "larger than 262,144 bytes"),
        ("a: &a {b: *a}", "an alias of what it is in"),
        ("{a: 1, a: 2}", "line 1: the key 'a' is given 2 times"),
        ("? [a]\n: b", "line 1: a key must be a name"),
        ("a: {<<: 3}", "line 1: << merges sections only"),
        ("a:", "line 1: no value; write null for none"),
        ("a: 1\nb:  # nothing\n", "line 2: no value; write null for none"),
        ("[1, ~]", "line 1: ~ by itself is null in YAML; ~/ is the home directory; write null for none"),
        ("{a: ~}", "line 1: ~ by itself is null in YAML"),
        ("{a}", "line 1: no value"),
        (".inf", "line 1: .inf is not a finite number"),
        ("a: .nan", "line 1: .nan is not a finite number"),
        ("1e999", "line 1: 1e999 is not a finite number that float64 can hold"),
        ("-1e-400", "line 1: -1e-400 is not a finite number that float64 can hold"),
        ("0.0001e-999", "is not a finite number that float64 can hold"),
        ("9" * 5000, "line 1: a number of 5,000 digits"),
        ("!!int 1_0", "line 1: '1_0' is not of the type !!int"),
        ("!!bool yes", "line 1: 'yes' is not of the type !!bool"),
        ("!!bool maybe", "line 1: 'maybe' is not of the type !!bool"),
        ("!!python/object/apply:os.system [x]", "line 1: the tag !!python/object/apply:os.system is not for our files"),
        ("!!binary aGk=", "the tag !!binary is not"),
        ("!!set {a}", "the tag !!set is not"),
        ("!!map abc", "the tag !!map is not"),
        ("!!seq abc", "the tag !!seq is not"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a:\n\tb: 1", "not valid YAML"),
        ("a: \0", r"not valid YAML: the character '\x00' at position 3"),
        ('"\\ud800"', "half of a character"),
        (b"a: \xe9", "not a text in UTF-8"),
        ("a: 1".encode("utf-16"), "not a text in UTF-8"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line_soon(text: str | bytes, why: str) -> None:
    begin = time.process_time()
    with pytest.raises(DocumentError) as raised:
        parse_yaml(text)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ("[" * 70 + "]" * 70, "nested deeper than 64"),
        ("1" * 1_000_000, "a number of 1,000,000 digits"),
        ("NaN", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1e999]", "'1e999' is no number that float64 can hold"),
        ("[1e-400]", "'1e-400' is no number that float64 can hold"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ('"\\ud800"', "half of a character"),
        ('{"\\ud800": 1}', "half of a character"),
        ("[1", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        (b"\xff", "not a JSON text"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_cannot_be_read_is_one_line_soon(text: str | bytes, why: str) -> None:
    begin = time.process_time()
    with pytest.raises(DocumentError) as raised:
        parse_json(text)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.process_time() - begin < 10


def test_what_is_no_regular_file_or_too_large_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", JSON_BYTES + 1)
    for name, why in {
        "pipe": "not a regular file",
        "loop": "Too many levels of symbolic links",
        "folder": "Is a directory",
        "huge": "larger than",
    }.items():
        with pytest.raises(RunError, match=why):
            read_json(tmp_path / name)
        with pytest.raises(ConfigError, match=why):
            read_yaml(tmp_path / name)
    with pytest.raises(DocumentError, match="larger than 3 bytes"):
        (tmp_path / "small").write_bytes(b"1234")
        read_bytes(tmp_path / "small", 3)


@pytest.mark.parametrize(
    "text", ["010", "on", "1e3", "0o10", "1:30", "~", "", "<<", "=", "1_0", ".inf", "\x1b", "\udcff", "a\nb"]
)
def test_what_we_write_reads_back_by_both_versions_of_yaml(text: str) -> None:
    document = {"value": text, text: 1, "list": [text, 1e-05, 10**20, True, None]}
    assert parse_yaml(to_yaml(document)) == document == yaml.safe_load(to_yaml(document))


JSONS: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.fuzz
@given(st.dictionaries(st.text(), JSONS, max_size=4))
def test_any_document_reads_back_as_it_was(document: dict[str, Any]) -> None:
    assert parse_yaml(to_yaml(document)) == document
    assert parse_json(json.dumps(document)) == document


@pytest.mark.fuzz
@given(st.text(alphabet="[]{}&*!?|>-:,#%@`'\"\\ \n\t\r0x1e9_.~<=anu\x00\x1b\x85\ufeff\ud800٣", max_size=60))
def test_any_text_is_a_document_or_one_line(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(text)
        except DocumentError as error:
            assert len(str(error).splitlines()) <= 1


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("seed=010", 10),
        ("seed=0x10", 16),
        ("seed=1:30", "command line: seed=1:30: Input should be a valid integer"),
        ("seed=1_0", "command line: seed=1_0: Input should be a valid integer"),
        ("seed=٣", "command line: seed=٣: Input should be a valid integer"),
        ("train.epochs=1e2", "command line: train.epochs=1e2: Input should be a valid integer"),
        ("optim.lr=1_0.0", "command line: optim.lr=1_0.0: Input should be a valid number"),
        ("optim.lr='1_0.0'", "command line: optim.lr=1_0.0: Input should be a valid number"),
        ("dataset=on", "on"),
        ("dataset=2024_11", "2024_11"),
        ("dataset=2024-11-28", "2024-11-28"),
        ("dataset='007'", "007"),
        ("dataset=007", "dataset=007: .*write dataset=\"'007'\", with both kinds of quotes"),
        ("dataset=1e3", "dataset=1e3: .*write dataset=\"'1e3'\""),
        ("dataset=null", "dataset=null: .*write dataset=\"'null'\""),
        ("dataset=true", "dataset=true: .*write dataset=\"'true'\""),
    ],
)
def test_an_override_is_what_it_says_or_one_line(override: str, found: object) -> None:
    key = override.partition("=")[0]
    if isinstance(found, str) and "=" in found:
        with pytest.raises(ConfigError, match=found):
            load_config(Path("digits"), [override])
    else:
        assert getattr(load_config(Path("digits"), [override]), key) == found


def test_a_name_in_a_file_that_is_a_number_says_how_to_quote_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: 007\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: dataset=007: .*if 007 is a name, write dataset: '007'"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optim.warmup_epochs=50"], r"^command line: optim\.warmup_epochs=50\.0 .*\(train\.epochs is from .*digits\.yaml\)$"),
        (
            ["train.epochs=1"],
            r"^command line: optim\.warmup_epochs=.* is longer than train\.epochs=1 \(optim\.warmup_epochs is",
        ),
        (["model.depth=1", "augment.crop_scale=[0.5, 0.2]"], r"^command line: augment\.crop_scale="),
        (["runtime.accum_steps=7"], r"^command line: train\.global_batch_size=.*\(train\.global_batch_size is from "),
        (["seed=-1", "dataset=A"], r"^command line: dataset=A: .*; seed=-1: "),
    ],
)
def test_a_bad_combination_names_where_each_value_came_from(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        load_config(Path("digits"), overrides)


OF_OURSELVES = {  # words and pipes of our own processes, not files that others may have written
    "data_prep/write.py",
    "jobs/doctor/probe.py",
    "jobs/submit/launch.py",
    "slurm/chaos/experiment.py",  # the shipped profile
    "slurm/devcluster.py",
    "slurm/devcluster_supervisor.py",
    "vitpa/bench/imagenet.py",
    "vitpa/documents.py",  # which sets the bounds
    "vitpa/export/card.py",  # in the Python that it prints
    "vitpa/step/compile_archive.py",  # Triton's, from an archive whose checksum and owner were checked
    "vitpa/step/compile_cache.py",
}


def test_nothing_else_reads_json_or_yaml_without_bounds() -> None:
    sources = [path for room in ("vitpa", "jobs", "data_prep", "slurm") for path in (CODE / room).rglob("*.py")]
    reading = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_)?load\(")
    assert {path.relative_to(CODE).as_posix() for path in sources if reading.search(path.read_text())} == OF_OURSELVES


@pytest.mark.parametrize("innermost", ["", "1", '"a"', "[]", '{"a": 1}'])
@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a": ', "}")])
def test_depth_is_counted_alike_in_ascii_and_beyond(opens: str, closes: str, depth: int, innermost: str) -> None:
    """Plain ASCII takes the shorter way, a text with an umlaut the longer one; few brackets are not counted at all."""
    inner = innermost or ("1" if opens != "[" else "")
    ends = []
    for word in ("a", "\u00e4"):
        text = f'["{word}", {"[], " * MAX_DEPTH}{opens * depth}{inner}{closes * depth}]'
        try:
            parse_json(text)
            ends.append("read")
        except DocumentError as error:
            ends.append(str(error))
    assert ends[0] == ends[1]
    assert (ends[0] == "read") == (depth + 1 + bool(inner) + (inner[:1] == "{") <= MAX_DEPTH)
