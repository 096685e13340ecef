"""The last section: versions, hashes of the data, the runs, and for each kind of number the command that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.report.collect import CollectedTable
from jobs.report.document.content import Block, Section, Table, Text
from jobs.report.status import first_of
from jobs.report.tables import percent
from jobs.state import RunState
from vitpa.arguments import in_shell
from vitpa.mixture import data_version
from vitpa.records import made_with

MAX_RUNS = 200  # rows


def section(table: CollectedTable, states: Sequence[RunState], root: Path, commands: Sequence[tuple[str, str]]) -> Section:
    """Where everything comes from; `commands` are what was made and how."""
    blocks: list[Block] = [
        Table("Which command made which numbers", [["numbers", "command"], *map(list, commands)]),
        Table("Code, software and hardware of the runs", [["what", "version", "runs"], *_versions(states, root)]),
        Table("Data: SHA-256 of each .beton", [["data set", "split", "SHA-256"], *_data(table)], keys=2),
    ]
    results = [state for state in states if state.result is not None]
    if results:
        header = ["run", "signature", "top-1 %", "epochs", "code", "SHA-256 of the weights", "finished (UTC)"]
        blocks.append(Table("Finished runs", [header, *map(_run, results[:MAX_RUNS])]))
    if len(results) > MAX_RUNS:
        blocks.append(Text([f"{len(results) - MAX_RUNS} more are in runs.csv, which `vitpa sweep collect` writes."]))
    config = f"{in_shell(root)}/runs/SIGNATURE/config.yaml"
    again = f"To train a run again, elsewhere: vitpa train {config} runtime.root=FOLDER (signatures: table above)"
    blocks.append(Text([again]))
    return Section("origin", "Versions, data and commands", blocks)


def _versions(states: Sequence[RunState], root: Path) -> list[list[str]]:
    """What the runs were made with, each with those that were; equal ones in one row."""
    found: dict[tuple[str, str], list[str]] = {}
    for state in states:
        if state.result is None:
            continue
        env = made_with(state.run.directory(root).env_json)
        versions = env.get("versions")
        its = {"code": state.result.code_version, "Python": env.get("python")}
        its |= versions if isinstance(versions, dict) else {}
        its |= {"CUDA": env.get("cuda"), "device": env.get("gpu") or env.get("device"), "platform": env.get("platform")}
        for name, value in its.items():
            if value:
                found.setdefault((str(name), str(value)), []).append(state.run.label)
    count = sum(state.result is not None for state in states)

    def which(labels: Sequence[str]) -> str:
        return f"all {count} finished" if len(labels) == count else f"{len(labels)}: {first_of(labels, 3)}"

    return [[name, value, which(labels)] for (name, value), labels in found.items()]


def _data(table: CollectedTable) -> list[list[str]]:
    rows: dict[tuple[str, str, str], None] = {}
    for result in table.results:
        for split in data_version(result).split():
            name, _, digest = split.partition(":")
            rows[result.dataset, name, digest] = None
    return [list(row) for row in rows]


def _run(state: RunState) -> list[str]:
    result = state.result
    assert result is not None
    return [
        state.run.label,
        result.signature,
        percent(result.top1),
        str(result.epochs),
        result.code_version,
        result.weights_sha256[:12],
        result.finished_utc,
    ]
