"""The documents are true: commands parse, recipes, sweeps and profiles load, links lead somewhere, figures are the files'."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

import vitpa.analysis.command
import vitpa.bench.command
import vitpa.cli
import vitpa.export.command
import vitpa.theory_command.command
from jobs.profile import load_profile
from jobs.sweep import load_sweep
from slurm.devcluster import PACKAGES, default_root
from slurm.devcluster_config import Layout
from tests.support.repository import ROOT
from vitpa.bench import ablation, small
from vitpa.bench.schema import RECIPES, Case
from vitpa.config_file import load_config, shipped_configs
from vitpa.documents import parse_yaml
from vitpa.train_command import command_parser, configs_of

ROOMS = ("vitpa", "jobs", "slurm", "data_prep")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *(ROOT / ".github").glob("*.md"),
        *(p for room in ROOMS for p in (ROOT / room).rglob("*.md")),
    ]
}
README = TEXTS["README.md"]
SPEED, ACCURACY = TEXTS["vitpa/bench/results/README.md"], TEXTS["jobs/sweeps/results/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[str]:
    for language, block in FENCE.findall(text):
        for line in block.splitlines() if language == "bash" else ():
            command = line.split("#")[0].strip()
            if command:
                yield command


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})
SPANS = sorted({(name, span) for name, text in TEXTS.items() for span in code_spans(text)})


def those(pattern: str) -> list[str]:
    return [command for command in COMMANDS if re.match(pattern, command)]


def test_there_are_commands_of_every_kind() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"make", "vitpa", "torchrun", "tensorboard", "export"}
    kinds = {command.split()[1] for command in those("vitpa ")}
    assert kinds == {"prep", "train", "analyze", "bench", "export", "sweep", "doctor", "devcluster", "theory"}


@pytest.mark.parametrize("command", those("make "))
def test_make_targets_exist(command: str) -> None:
    assert is_target(command.split()[1])


def is_target(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("command", [*those("vitpa train "), *those("torchrun ")])
def test_training_commands_load(command: str) -> None:
    words = shlex.split(command)[1:]
    if command.startswith("torchrun"):
        launch = torchrun_parser().parse_args(words)
        assert (launch.module, launch.training_script) == (True, "vitpa.train")
        words = ["train", *launch.training_script_args]
    options = command_parser().parse_intermixed_args(words[1:])
    assert all(config.signature for config in configs_of([options.config, *options.others], options.overrides, options.seeds))


@pytest.mark.parametrize("command", those("vitpa bench "))
def test_benchmarks_parse_and_take_their_overrides(command: str) -> None:
    options = vitpa.bench.command.parse(shlex.split(command)[2:])
    if options.name in {"small", "ablation"}:
        assert {"small": small, "ablation": ablation}[options.name].cases(options)
    elif options.name == "start":
        assert configs_of([options.config], options.overrides, options.seeds)
    else:
        assert load_config(shipped_configs()[RECIPES[options.name]], options.overrides)


@pytest.mark.parametrize("command", those("vitpa analyze "))
def test_analyses_parse(command: str) -> None:
    options = vitpa.analysis.command.command_parser().parse_args(shlex.split(command)[2:])
    assert load_sweep(str(options.target), ROOT).config


@pytest.mark.parametrize("command", those("vitpa export "))
def test_exports_parse(command: str) -> None:
    assert vitpa.export.command.command_parser().parse_args(shlex.split(command)[2:]).out


@pytest.mark.parametrize("command", those("vitpa theory "))
def test_theory_commands_parse(command: str) -> None:
    options = vitpa.theory_command.command.command_parser().parse_args(shlex.split(command)[2:])
    assert vitpa.theory_command.command.experiment_of(options)


@pytest.mark.parametrize("command", those("vitpa (prep|sweep|doctor|devcluster)"))
def test_other_commands_parse_and_name_what_exists(command: str, tmp_path: Path) -> None:
    options = vitpa.cli.parser().parse_args(shlex.split(command)[1:])
    if command.startswith("vitpa sweep"):
        assert load_sweep(options.sweep, tmp_path).config
    if "--profile" in command:
        assert load_profile(options.profile.replace("my_cluster.yaml", "cluster"))  # a user's copy
    speeds = getattr(options, "speeds", None)
    assert speeds in (None, "imagenet.json") or (ROOT / speeds).is_file()


@pytest.mark.parametrize("command", those("tensorboard "))
def test_tensorboard_is_pointed_at_a_sweep(command: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it brings along
        from tensorboard.program import TensorBoard
    program = TensorBoard()
    program.configure(("tensorboard", *shlex.split(command)[1:]))
    assert Path(program.flags.logdir).parent == Path("outputs/sweeps")
    assert load_sweep(Path(program.flags.logdir).name, ROOT).config


@pytest.mark.parametrize(
    "command",
    [
        "vitpa sweep plan demo --spedes x",
        "vitpa doctor --profil cluster --prof",
        "vitpa bench small --replica-s 1",
        "vitpa bench nothing",
        "vitpa prep digits --varify",
        "vitpa train cifar10 --seed 3 --x",
    ],
)
def test_the_parsers_refuse_what_does_not_exist(command: str) -> None:
    first, *words = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as left:
        if first == "bench":
            vitpa.bench.command.parse(words)
        elif first == "train":
            command_parser().parse_intermixed_args(words)
        else:
            vitpa.cli.parser().parse_args([first, *words])
    assert left.value.code == 2


# --- commands and options within sentences


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The options of a parser and of its subcommands, by the words that lead to each."""
    yield path, set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*path, name))


OPTIONS = {
    **dict(parsers(vitpa.cli.parser())),
    **dict(parsers(command_parser(), ("train",))),
    **dict(parsers(vitpa.analysis.command.command_parser(), ("analyze",))),
    **dict(parsers(vitpa.bench.command.command_parser(), ("bench",))),
    **dict(parsers(vitpa.export.command.command_parser(), ("export",))),
    **dict(parsers(vitpa.theory_command.command.command_parser(), ("theory",))),
}


def meant(words: list[str]) -> list[tuple[str, ...]]:
    """The commands that a code span such as `vitpa sweep plan --json`, `retry --force` or `--json` may be about."""
    if words[0] == "vitpa":
        known = [tuple(words[1:count]) for count in range(len(words), 1, -1) if tuple(words[1:count]) in OPTIONS]
        return known[:1]
    return [path for path in OPTIONS if words[0].startswith("--") or path[-1:] == (words[0],)]


@pytest.mark.parametrize(("name", "span"), [(name, span) for name, span in SPANS if re.match(r"vitpa |--|\w+ .*--", span)])
def test_options_in_sentences_exist(name: str, span: str) -> None:
    words = span.split()
    if words[0] in ("git", "pip", "sbatch"):
        return
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "pytest":
        conftest = (ROOT / "tests" / "conftest.py").read_text()
        assert all(f'addoption("{option}"' in conftest for option in used), f"{name}: {span}"
        return
    assert any(used <= OPTIONS[path] for path in meant(words)), f"{name}: {span}"


@pytest.mark.parametrize(("name", "span"), [(name, span) for name, span in SPANS if span.startswith("make ")])
def test_targets_in_sentences_exist(name: str, span: str) -> None:
    assert is_target(span.split()[1]), f"{name}: {span}"


def test_the_devcluster_is_as_its_readme_says() -> None:
    assert f"export SLURM_CONF={Layout(default_root()).slurm_conf}" in [
        c.replace("$(id -u)", str(os.geteuid())) for c in COMMANDS
    ]
    assert f"apt-get install {PACKAGES}" in code_spans(TEXTS["slurm/README.md"])


# --- links and names


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", TEXTS[name])):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), f"{name}: {link}"
        assert not anchor or anchor in headings(path.read_text(encoding="utf-8")), f"{name}: {link}"


def test_named_files_exist() -> None:
    paths = [(name, span) for name, span in SPANS if re.fullmatch(rf"(?:{'|'.join(ROOMS)}|tests)/[\w./-]+", span)]
    assert len(paths) > 5
    assert [(name, path) for name, path in paths if not (ROOT / path).exists()] == []


def test_shipped_sweeps_and_profiles_are_named() -> None:
    shipped = {path.stem for path in (ROOT / "jobs/sweeps").glob("*.yaml")}
    assert shipped <= set(code_spans(TEXTS["jobs/README.md"]))
    assert {path.stem for path in (ROOT / "slurm").glob("*.yaml")} <= set(code_spans(TEXTS["slurm/README.md"]))


# --- the README itself


def test_it_is_short_and_shows_the_real_use_in_ten_commands() -> None:
    assert len(README.splitlines()) <= 150
    section = README.partition("\n## The real use\n")[2].partition("\n## ")[0]
    assert len(list(commands(section))) == 10


MAP = README.partition("\n## A map of the rooms\n")[2]


def test_the_map_names_every_room() -> None:
    folders = [path.parent.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert [folder for folder in folders if f"]({folder})" not in MAP and f"]({folder}/" not in MAP] == []


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("requeues", "jobs/execute/slurm.py"),
        ("learning rate", "vitpa/optim.py"),
        ("where damage is detected", "vitpa/checkpoint_file.py"),
        ("each cell in Markdown, LaTeX", "jobs/report/tables.py"),
        ("random resized crops", "vitpa/data/augment/crop_boxes.py"),
    ],
)
def test_the_map_leads_to(what: str, where: str) -> None:
    (row,) = [line for line in MAP.splitlines() if f"]({where})" in line]
    assert what in row


def test_ci_calls_the_readmes_test_command() -> None:
    assert "make test" in list(commands(README))
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()
    workflow = parse_yaml((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]


def test_git_hooks_run_what_make_lint_does() -> None:
    (local,) = parse_yaml((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("\nlint: setup\n")[2].partition("\n\n")[0]
    assert entries == [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in lint.splitlines()]


# --- figures


def read(file: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / file).read_text())
    return document


def hundreds(rate: float) -> str:
    return f"{round(rate, -2):,.0f}"


@pytest.mark.parametrize("sweep", ["cifar10", "cifar10_strong", "cifar100", "cifar100_strong", "cifar10_short"])
def test_accuracies_are_those_of_the_files(sweep: str) -> None:
    document = read(f"jobs/sweeps/results/{sweep}.json")
    top1: dict[str, dict[int, float]] = {"content": {}, "positional": {}}
    for run in document["runs"]:
        top1[run["attention"]][run["seed"]] = run.get("val_top1", run.get("val_top1_fraction"))
    for cell in document["cells"]:
        found, of_runs = cell["val_top1"], list(top1[cell["attention"]].values())
        assert (found["mean"], found["std"]) == pytest.approx((statistics.mean(of_runs), statistics.stdev(of_runs)))
        shown = f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f} %"
        assert shown in README
        assert f"{shown} | [{100 * found['ci95_low']:.2f}, {100 * found['ci95_high']:.2f}]" in ACCURACY
    differences = [top1["content"][seed] - top1["positional"][seed] for seed in top1["content"]]
    shown = f"{100 * statistics.mean(differences):+.2f} ± {100 * statistics.stdev(differences):.2f} points"
    assert shown in README
    assert shown in ACCURACY


@pytest.mark.parametrize(
    ("sweep", "axis", "base", "cells", "runs"),
    [("cifar100_ablation", "change", "none", 16, 48), ("imagenette", "recipe", "deit", 5, 15)],
)
def test_a_table_of_changes_is_that_of_the_file(sweep: str, axis: str, base: str, cells: int, runs: int) -> None:
    document = read(f"jobs/sweeps/results/{sweep}.json")
    top1: dict[tuple[str, str], dict[int, float]] = {}
    for run in document["runs"]:
        top1.setdefault((run["attention"], run["settings"][axis]), {})[run["seed"]] = 100 * run["val_top1"]
    p_values = {(its["common"]["attention"], its["second"]): its["p_holm"] for its in document["comparisons"]}
    assert (len(top1), len(document["runs"])) == (cells, runs)
    for (attention, change), own in top1.items():
        row = re.search(rf"^\| `{re.escape(change)}` \|.*$", ACCURACY, re.M)
        assert row
        assert f"| {statistics.mean(own.values()):.2f} ± {statistics.stdev(own.values()):.2f} % |" in row[0]
        if change != base:
            gains = [own[seed] - its for seed, its in top1[attention, base].items()]
            shown = f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} ({p_values[attention, change]:.2g})"
            assert f"| {shown} |" in row[0]
    assert f"{runs} runs, {sum(cell['gpu_hours'] for cell in document['cells']):.2f} GPU-hours" in ACCURACY


def test_speeds_are_those_of_the_files() -> None:
    for line in read("vitpa/bench/results/small_h200.json")["results"]:
        assert f"| {hundreds(line['images_per_s'])} ({line['times_timm']:.1f}x) |" in SPEED
    for file in ("imagenet_h100.json", "imagenet_raw_h100.json", "imagenet_gpus_h100.json"):
        for line in read(f"vitpa/bench/results/{file}")["results"]:
            shown = hundreds(line["images_per_s"])
            if line["of_synthetic"]:
                assert re.search(rf"\| {shown} \({line['of_synthetic']:.2f}( of that)?\) \|", SPEED)
            elif line["times_one_gpu"]:
                assert f"| {shown} ({line['times_one_gpu']:.2f}x) |" in SPEED
            elif Case(**line["case"]).name != "training, synthetic" or file == "imagenet_h100.json":
                assert shown in SPEED


def test_the_speeds_of_settings_in_a_step_are_those_of_the_file() -> None:
    for line in read("vitpa/bench/results/settings_h200.json")["results"]:
        factor = f" ({line['times_one_run']:.2f}x)" if line["times_one_run"] else ""
        assert f"| {hundreds(line['images_per_s'])}{factor} |" in SPEED


def test_the_seconds_of_a_search_are_those_of_the_file() -> None:
    document = read("vitpa/bench/results/search_h200.json")
    together, (first, *others) = document["in_one_step"], document["one_after_another"]
    in_one, later = max(run["wall_s"] for run in together), statistics.mean(run["wall_s"] for run in others)
    in_all = first["wall_s"] + 15 * later
    assert f"| 16 in one step | {in_one:.1f} | {16 * 3600 / in_one:.0f} |" in SPEED
    assert f"the first | {first['wall_s']:.1f} |" in SPEED
    assert f"(mean of 3) | {later:.1f} |" in SPEED
    assert f"| {in_all:.1f} | {16 * 3600 / in_all:.0f} |" in SPEED
    assert f"That is {in_all / in_one:.2f} times as many." in SPEED


def test_the_seconds_of_starts_are_those_of_the_file() -> None:
    for name, line in read("vitpa/bench/results/start_h200.json")["starts"].items():
        parts = [line[f"{part}_s"] for part in ("first_step", "imports", "data", "set_up", "restore", "compilation")]
        assert f"| {name} | {' | '.join(f'{part:.1f}' for part in parts)} |" in SPEED


def test_the_starts_with_pyc_files_are_those_of_the_runs() -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    for run in read("jobs/sweeps/results/imagenette.json")["runs"]:
        sizes = "three sizes" if run["settings"]["recipe"] == "progressive" else "one size"
        rows.setdefault(f"{'cold' if run['start']['graphs_compiled'] else 'warm'}, {sizes}", []).append(run["start"])
    assert len(rows) == 4
    for name, starts in rows.items():
        spans = []
        for part in ("first_step", "imports", "data", "set_up", "compilation"):
            least, most = (f"{extreme(start[f'{part}_s'] for start in starts):.1f}" for extreme in (min, max))
            spans.append(least if least == most else f"{least} to {most}")
        assert f"| {name} | {len(starts)} | {' | '.join(spans)} |" in SPEED


def test_the_hour_of_chaos_is_that_of_the_certificate() -> None:
    document, text = read("slurm/chaos/results/seed1.json"), TEXTS["slurm/README.md"]
    kinds = document["faults_by_kind"]
    struck, interrupted = (sum(its[key] for its in kinds.values()) for key in ("struck", "interruptions"))
    of_all = {"struck": struck, "interruptions": interrupted, "lost_s": document["lost_s"]}
    assert len(kinds) == 10
    for kind, its in {**kinds, "all": of_all}.items():
        lost = its["lost_s"]
        shown = f" {lost['p50']} | {lost['max']} |" if lost["count"] else " | |"
        assert f"| {kind} | {its['struck']} | {its['interruptions']} |{shown}" in text
    ettr, by = document["ettr"], document["recoveries"]
    assert f"ETTR {ettr['measured']:.3f}, {ettr['of_daly_bound']:.3f} of Daly's bound." in text
    assert f"Of {interrupted} recoveries {by['itself']} needed no hand, {by['submit']} were by" in text
    assert by["retry"] == 1
    assert (document["runs"]["lost"], document["runs"]["doubled"], document["runs"]["different"]) == ([], {}, {})


def test_the_readmes_speeds_are_among_them() -> None:
    sentence = README.partition("[How fast it is]")[2].partition("\n\n")[0]
    figures = re.findall(r"\d+,\d+|\d+\.\d+x", sentence)
    assert len(figures) == 6
    assert [figure for figure in figures if figure not in SPEED] == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_structure_is_that_of_the_files(name: str) -> None:
    document, text = read(f"vitpa/analysis/results/{name}.json"), TEXTS["vitpa/analysis/results/README.md"]
    last = [row for row in document["cells"] if row["layer"] is None and row["epoch"] == 300]
    pairs = [row for row in document["differences_content_minus_positional"] if row["epoch"] == 300]
    assert (len(last), len(pairs)) == (12, 6)
    for row in (*last, *pairs):
        assert f"{row['mean']:.3f} ± {row['std']:.3f} [{row['ci95_low']:.3f}, {row['ci95_high']:.3f}]" in text
    for attention in ("content", "positional"):
        top1 = [run["val_top1"] for run in document["runs"] if run["attention"] == attention]
        assert f"{attention} {100 * statistics.mean(top1):.2f} ± {100 * statistics.stdev(top1):.2f} %" in text
