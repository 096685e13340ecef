"""Damaged records through the commands: each mutation is said, or changes no number that is shown."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.sweep import Sweep
from tests.support.jobs_sweeps import assert_no_process_left, launch, make_sweep, result_document, settle
from vitpa.cli import main as vitpa
from vitpa.metrics_file import EVALUATED, to_line
from vitpa.records import to_json, with_checksum

READERS = (
    ("status", "--json"),
    ("status",),
    ("collect", "--json"),
    ("logs",),
    ("logs", "--failed"),
    ("plan", "--json"),
    ("plan",),
    ("submit", "--dry-run"),
    ("retry", "--dry-run"),
    ("cancel", "--dry-run"),
)
LEAVES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    7,
    10**30,
    0.123,
    "",
    "x",
    "\x1b[2J\nx",
    "y" * 100_000,
    [],
    {},
    [[]],
    {"a": 1},
    "../../..",
)


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str


Answers = dict[tuple[str, ...], Said]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of eight runs: six with results of their own, one that has failed, one that has not started."""
    root = tmp_path_factory.mktemp("records") / "root"
    sweep = make_sweep(root, seeds=4, steps=2)
    failed, missing = sweep.runs[3], sweep.runs[-1]
    (root / "fail").mkdir()
    (root / "fail" / failed.signature).touch()
    launch(root, 2, "submit", "seed=0,1,2,3")
    settle(root, sweep)
    assert_no_process_left(root)  # a result comes before the last records of its attempt
    for place, run in enumerate(sweep.runs):
        if run is not failed:
            write_records(root, sweep, place)
    shutil.rmtree(missing.directory(root).path)
    shutil.rmtree(root / "trace")
    return root


def write_records(root: Path, sweep: Sweep, place: int) -> None:
    """Records as the trainer writes them, with numbers that no other run has."""
    run, directory = sweep.runs[place], sweep.runs[place].directory(root)
    values: dict[str, Any] = {"val_top1": 0.5 + place / 64, "val_top5": 0.9 + place / 128, "val_loss": 1 + place / 32}
    config_sha256 = hashlib.sha256(directory.config_yaml.read_bytes()).hexdigest()
    more = {"images_per_s": 100.0 + place, "gpu_hours": 0.25 + place / 16, "config_sha256": config_sha256}
    result = result_document(run, **values, steps=2, **more)
    directory.result_json.write_text(to_json(with_checksum(result)))
    environment = {"steps_total": 2, "code_version": "g1", "beton_sha256": result["beton_sha256"]}
    directory.env_json.write_text(to_json(with_checksum(environment)))
    rows: list[dict[str, float]] = [{"step": 1, "epoch": 1, "train/loss": 2.0}]
    rows.append({"step": 2, "epoch": 2, **{name: values[f"val_{name.removeprefix('val/')}"] for name in EVALUATED}})
    directory.metrics_jsonl.write_text("".join(map(to_line, rows)))


def say(root: Path, *words: str) -> Said:
    """Run `vitpa sweep VERB` in this process."""
    verb, *options = words
    if verb in ("plan", "submit", "retry"):
        options += ["--profile", str(root / "slots-2.yaml")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = vitpa(["sweep", verb, str(root / "small.yaml"), "--root", str(root), *options])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())


def read_all(root: Path) -> Answers:
    """What every command says that reads records."""
    return {words: say(root, *words) for words in READERS}


read_undamaged = functools.cache(read_all)

Mutation = Callable[[Path], None]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a document."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], leaf: object, *, drop: bool) -> Any:
    """`document` with something else at `path`, or nothing."""
    if not path:
        return leaf
    *above, last = path
    inside = document
    for key in above:
        inside = inside[key]
    if drop:
        del inside[last]
    else:
        inside[last] = leaf
    return document


@st.composite
def mutations(draw: st.DrawFn, files: list[Path]) -> tuple[str, Mutation]:
    """A record, named below the root, and what happens to it."""
    name = draw(st.sampled_from(files))
    kind = draw(
        st.sampled_from(["edit", "edit", "edit", "drop", "bit", "bytes", "cut", "gone", "folder", "other", "twice", "deep"])
    )
    numbers = draw(st.lists(st.integers(0, 2**32), min_size=2, max_size=2))
    leaf = draw(st.sampled_from(LEAVES))
    garbage = draw(st.binary(min_size=1, max_size=40))

    def mutate(root: Path) -> None:
        path = root / name
        data = bytearray(path.read_bytes())
        at = numbers[0] % max(1, len(data))
        if kind in ("edit", "drop"):
            text = data.decode(errors="surrogateescape")
            rows = text.splitlines() if path.suffix == ".jsonl" else [text]
            row = numbers[0] % len(rows)
            try:
                document = json.loads(rows[row])
            except ValueError:  # YAML or a log: a word becomes another one
                data[at:at] = json.dumps(leaf).encode()
            else:
                where = list(places(document))
                chosen = where[numbers[1] % len(where)]
                rows[row] = json.dumps(replaced(document, chosen, leaf, drop=kind == "drop"))
                data = bytearray("\n".join([*rows, ""]).encode(errors="surrogateescape"))
        elif kind == "bit" and data:
            data[at] ^= 1 << numbers[1] % 8
        elif kind == "bytes":
            data[at : at + len(garbage)] = garbage
        elif kind == "cut":
            del data[at:]
        elif kind == "twice":
            data = data + data
        elif kind == "deep":
            data = bytearray(b"[" * 100_000)
        elif kind == "other":
            others = sorted(each for each in root.rglob(path.name) if each != path and each.is_file())
            data = bytearray(others[numbers[1] % len(others)].read_bytes()) if others else data
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.write_bytes(data)

    return f"{kind} {numbers} {leaf!r:.30} {garbage!r}: {name}", mutate


def records_of(root: Path) -> list[Path]:
    """Every file that a command may read, below the root; not the list of files that this test or a user wrote."""
    found = [path.relative_to(root) for top in ("runs", "sweeps") for path in (root / top).rglob("*")]
    left_out = ("stand-in-checkpoint.json",)
    return sorted(
        path for path in found if (root / path).is_file() and path.name not in left_out and "by-name" not in path.parts
    )


def assert_nothing_silent(before: Answers, after: Answers) -> None:
    """Each number is as before, or its run is named with a reason."""
    for words, said in after.items():
        assert said.code in (0, 1, 4), (words, said)
        assert "Traceback" not in said.err, (words, said)
        assert "\x1b" not in said.out + said.err, (words, said)
        if said.code == 1 and before[words].code != 1:
            assert said.err.startswith("vitpa sweep: ") and said.err.count("\n") == 1, (words, said)
    assert_results_kept(before["collect", "--json"], after["collect", "--json"])
    assert_numbers_kept(before["status", "--json"], after["status", "--json"])
    assert_numbers_kept(before["plan", "--json"], after["plan", "--json"])


def assert_results_kept(before: Said, after: Said) -> None:
    """`collect` reports the results that it reported before; of others it says why they are absent."""
    if after.code == 1:
        return
    old, new = json.loads(before.out), json.loads(after.out)
    known = {result["signature"]: result for result in old["results"]}
    assert all(result == known[result["signature"]] for result in new["results"])
    gone = len(old["results"]) - len(new["results"])
    assert len(new["absent"]) == len(old["absent"]) + gone
    states = {run["run"]: run["state"] for run in old["absent"]}
    assert all(run["reason"] or run["state"] in ("missing", states.get(run["run"])) for run in new["absent"]), new["absent"]
    assert after.code == 4
    if not gone:
        for key in ("cells", "differences_content_minus_positional"):
            assert new[key] == old[key]


def assert_numbers_kept(before: Said, after: Said) -> None:
    """A finished run's numbers in `status` and `plan` are as before, or it has become another state with a reason."""
    if after.code == 1:
        return
    old, new = json.loads(before.out), json.loads(after.out)
    for one, other in zip(old["runs"], new["runs"], strict=True):
        if one["state"] == other["state"] == "done":
            assert one == other
        assert one["state"] == other["state"] or other["reason"] or other["state"] == "missing", (one, other)
    if [run["state"] for run in old["runs"]] == [run["state"] for run in new["runs"]]:
        assert {**new, "runs": []} == {**old, "runs": []}


@pytest.mark.slow
@pytest.mark.fuzz
@given(data=st.data())
def test_a_damaged_record_is_said_or_changes_no_number(root: Path, data: st.DataObject) -> None:
    before = read_undamaged(root)
    _, mutate = data.draw(mutations(records_of(root)))
    kept = root.with_name("kept")
    root.rename(kept)
    shutil.copytree(kept, root, symlinks=True)
    try:
        mutate(root)
        assert_nothing_silent(before, read_all(root))
    finally:
        shutil.rmtree(root)
        kept.rename(root)
