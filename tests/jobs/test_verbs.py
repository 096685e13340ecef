"""`vitpa sweep` as a user types it: filters, JSON, exit codes, one clear line for every error."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from jobs.command import VERBS
from jobs.rounds import begin
from jobs.search.ledger import Entry, Round
from jobs.state import RunState, fails_alike
from jobs.sweep import Run, SweepDir, shipped_sweeps
from tests.support.jobs_sweeps import STAND_IN, launch, make_sweep, settle, write_result
from tests.support.search_sweeps import make_search
from vitpa.cli import main
from vitpa.records import ProcessId, read_json, write_json


class Shell:
    """Types `vitpa sweep VERB` for the sweep `small` below `root`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys

    def __call__(self, line: str) -> tuple[int, str]:
        verb, *rest = shlex.split(line)
        code = main(["sweep", verb, str(self.root / "small.yaml"), "--root", str(self.root), *rest])
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err


@pytest.fixture
def sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """2 x 2 runs, submitted once, of which digits-content-s0 is done and digits-content-s1 is broken."""
    small = make_sweep(tmp_path, seeds=2)
    SweepDir(tmp_path, "small").record(small)
    runs = small.runs
    write_result(tmp_path, runs[0], val_top1=0.75)
    write_result(tmp_path, runs[2], val_top1=float("nan"))
    return Shell(tmp_path, capsys)


def test_plan(sweep: Shell) -> None:
    code, text = sweep(f"plan --json --data-dir {sweep.root}/data")
    document = json.loads(text)
    assert code == 0
    assert [row["state"] for row in document["runs"]] == ["done", "missing", "broken", "missing"]
    assert document["missing"] == 2
    code, text = sweep(f"plan --data-dir {sweep.root}/data")
    assert code == 0
    assert "submit would start 2 runs" in text
    assert "1 broken, not touched by submit; to run again: vitpa sweep retry" in text


def test_plan_says_what_is_in_the_way(sweep: Shell) -> None:
    code, text = sweep("plan --data-dir /nowhere")
    assert code == 1
    assert "cannot be submitted yet: /nowhere/digits/train.beton: no such file; run `vitpa prep digits` first" in text


def test_status_is_partial_when_something_is_missing(sweep: Shell) -> None:
    code, text = sweep("status")
    assert code == 4
    assert "small: 1 of 4 done, 2 missing, 1 broken" in text
    assert "75.00" in text
    code, text = sweep("status --json state=done")
    assert code == 0
    (row,) = json.loads(text)["runs"]
    assert (row["run"], row["val_top1"]) == ("digits-content-s0", 0.75)


@pytest.mark.slow
def test_runs_that_pause_go_on_by_submit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    for epoch in (1, 3):
        assert launch(tmp_path, 1, "submit", f"runtime.stop_after_epoch={epoch}").returncode == 0
        states = settle(tmp_path, sweep)
        assert [(state.state, state.reason) for state in states] == [("paused", f"after epoch {epoch}")] * 2
    assert main(["sweep", "status", "small", "--root", str(tmp_path)]) == 4
    text = capsys.readouterr().out
    assert "small: 0 of 2 done, 2 paused" in text
    assert "paused: after epoch 3" in text
    launch(tmp_path, 1)
    assert [state.state for state in settle(tmp_path, sweep)] == ["done", "done"]


@pytest.mark.parametrize("verb", ["plan", "submit --dry-run"])
def test_folders_whose_names_are_not_utf_8_are_one_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/x\xff")
    (Path(bad) / "digits").mkdir(parents=True)
    make_sweep(tmp_path, seeds=1)
    assert main(["sweep", *verb.split(), f"{tmp_path}/small.yaml", "--root", bad, "--data-dir", str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert line.startswith(
        f"vitpa sweep: --root: runtime.root={tmp_path}/x\\udcff: bytes that are not UTF-8, which no configuration"
    )
    assert line.count("\n") == 1
    assert main(["sweep", *verb.split(), f"{tmp_path}/small.yaml", "--root", str(tmp_path), "--data-dir", bad]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"vitpa sweep: --data-dir: runtime.data_dir={tmp_path}/x\\udcff: bytes that are not UTF-8")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("submit --dry-run runtime.root=x", "runtime.root=x: say it by --root"),
        ("submit --dry-run --data-dir /a runtime.data_dir=/b", "runtime.data_dir=/b, and --data-dir /a here or at the last"),
        (
            "submit --dry-run runtime.workers=1 runtime.workers=2",
            "runtime.workers=1 and runtime.workers=2: runtime.workers is given",
        ),
        ("retry --dry-run runtime.stage_dir=", "override 'runtime.stage_dir=': no value; write null for none"),
    ],
)
def test_a_setting_that_is_said_twice_is_refused(sweep: Shell, line: str, said: str) -> None:
    code, text = sweep(line)
    assert code == 1
    assert said in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("terms", "labels"),
    [
        ("seed=1", ["digits-content-s1", "digits-positional-s1"]),
        ("attention=positional seed=0", ["digits-positional-s0"]),
        ("seed=0,1 state=missing", ["digits-positional-s0", "digits-positional-s1"]),
        ("state=done state=broken", ["digits-content-s0", "digits-content-s1"]),
        ("dataset=digits state=lost", []),
    ],
)
def test_filters(sweep: Shell, terms: str, labels: list[str]) -> None:
    _, text = sweep(f"status --json {terms}")
    assert [row["run"] for row in json.loads(text)["runs"]] == labels


def test_every_axis_is_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = make_sweep(tmp_path, seeds=1, axes={"augment.permute_block_px": [0, 2, 4], "optim.lr": [1e-3, 1e-2]})
    SweepDir(tmp_path, "small").record(small)
    sweep = Shell(tmp_path, capsys)
    terms = "augment.permute_block_px=0,4 optim.lr=0.01 attention=content"
    _, text = sweep(f"status --json {terms}")
    rows = json.loads(text)["runs"]
    assert [row["run"] for row in rows] == [f"digits-content-permute_block_px{block_px}-lr0.01-s0" for block_px in (0, 4)]
    assert rows[1]["settings"] == {"augment.permute_block_px": "4", "optim.lr": "0.01"}
    code, text = sweep(f"submit --dry-run --data-dir {tmp_path}/data {terms}")
    assert code == 0
    assert "2 runs" in text
    for line, message in (
        ("status optim.lr=1", "there is no optim.lr '1'; there is 0.001, 0.01"),
        ("status optim.betas=1", "sweep small-betas was never submitted under"),
        ("status optim.lrr=1", "seed=, state=, augment.permute_block_px=, optim.lr=), a setting runtime.KEY=VALUE"),
        ("status optim.lrr=1", "values of a key of the configuration; did you mean optim.lr?"),
    ):
        code, text = sweep(line)
        assert (code, message in text) == (1, True), text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("status seed=7", "there is no seed '7'; there is 0, 1"),
        ("status state=finished", "there is no state 'finished'"),
        ("status sed=1", "expected a filter (dataset=, attention=, seed=, state=)"),
        ("submit optim.lrr=1", "to plan and submit, values of a key of the configuration; did you mean optim.lr?"),
        ("status runtime.workers=2", "runtime settings are for submit and retry"),
        ("submit runtime.worker=2 --data-dir data", "unknown key runtime.worker; did you mean runtime.workers?"),
        ("submit state=done runtime.foo=1", "unknown key runtime.foo"),
        ("submit state=done --data-dir /nope", "--data-dir /nope: no such folder"),
        ("status --root nowhere", "sweep small was never submitted under "),
        ("collect --root nowhere", "submit it, or say with --root where it is"),
        ("status --root ../small.yaml", "--root ../small.yaml: not a folder"),
        ("submit --profile nowhere", "profile 'nowhere': no such file, and none of the shipped ones (cluster, "),
        ("submit", "run `vitpa prep digits` first, or say where it is with --data-dir"),
    ],
)
def test_errors_are_one_line(sweep: Shell, line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep.root / "runs")  # where there is no folder `data`
    code, text = sweep(line)
    assert code == 1
    assert message in text
    assert text.startswith("vitpa sweep: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("line", ["status", "status x --watch --json", "logs x --lines -3"])
def test_usage_errors(line: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *line.split()])
    assert stopped.value.code == 2


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", verb, "--help"])
    assert stopped.value.code == 0
    assert f"example: vitpa sweep {verb} " in capsys.readouterr().out


def test_dry_run_writes_nothing(sweep: Shell) -> None:
    before = sorted(sweep.root.rglob("*"))
    code, text = sweep(f"submit --dry-run --data-dir {sweep.root}/data")
    assert code == 0
    assert "would start 2 runs" in text
    assert "digits-positional-s1 (missing)" in text
    code, text = sweep(f"retry --dry-run --data-dir {sweep.root}/data")
    assert "would start 1 run, " in text
    assert sweep("cancel --dry-run")[0] == 0
    assert sorted(sweep.root.rglob("*")) == before


def test_collect_at_any_time(sweep: Shell) -> None:
    code, text = sweep("collect")
    assert code == 4
    assert "1/2 incomplete" in text
    report = SweepDir(sweep.root, "small").report
    assert {path.name for path in report.iterdir()} == {"table.csv", "runs.csv", "table.md", "table.tex", "report.json"}
    code, text = sweep("collect --json seed=0 attention=content")
    assert code == 0
    assert json.loads(text)["cells"][0]["val_top1"]["mean"] == 0.75
    assert json.loads((report / "report.json").read_text())["complete"] is False, "a filtered table is not written"


def test_a_refused_collect_moves_the_older_report_out_of_the_way(sweep: Shell) -> None:
    report = SweepDir(sweep.root, "small").report
    assert sweep("collect")[0] == 4
    files = {path.name: path.read_bytes() for path in report.iterdir()}
    other = make_sweep(sweep.root, seeds=2).runs[1]
    write_result(sweep.root, other, code_version="g2")
    for _ in range(2):  # the second time there is nothing left to move
        code, text = sweep("collect")
        assert code == 1
        assert "runs of different code_version" in text
        older = report / "older-than-the-last-attempt"
        assert list(report.iterdir()) == [older]
        assert {path.name: path.read_bytes() for path in older.iterdir()} == files
        assert ("the report that was there is in" in text) == (_ == 0)
    assert sweep("collect --allow-mixed")[0] == 4
    assert {path.name for path in report.iterdir()} == set(files)


def test_a_changed_sweep_is_not_submitted_unnoticed(sweep: Shell) -> None:
    SweepDir(sweep.root, "small").record(make_sweep(sweep.root, seeds=2))
    recipe = yaml.safe_load((sweep.root / "recipe.yaml").read_text())
    (sweep.root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "train": {"epochs": 9}}))
    code, text = sweep(f"submit --dry-run --data-dir {sweep.root}/data")
    assert code == 1
    assert "4 no longer in it as configured before (digits-content-s0, digits-positional-s0, digits-content-s1 ...;" in text
    assert "--update" in text
    code, text = sweep("status")
    assert "1 of 4 done" in text, "what was submitted is still shown"
    assert "the sweep has changed" in text
    assert "would start 4 runs" in sweep(f"submit --update --dry-run --data-dir {sweep.root}/data")[1]


def test_submit_says_what_is_called_otherwise(sweep: Shell) -> None:
    none: dict[str, float] = {}
    both = {"augment.mixup_alpha": 0.8}
    before = make_sweep(sweep.root, seeds=1, axes={"mixing": {"none": none, "both": both}})
    SweepDir(sweep.root, "small").record(before)
    make_sweep(sweep.root, seeds=1, axes={"mixing": {"none": both, "both": none}})
    code, text = sweep(f"submit --dry-run --data-dir {sweep.root}/data")
    assert code == 0
    assert "4 called otherwise (digits-content-both-s0 -> digits-content-none-s0, " in text


def test_every_verb_that_shows_a_changed_sweep_as_it_was_submitted_says_so(sweep: Shell) -> None:
    folder = SweepDir(sweep.root, "small")
    assert sweep("collect")[0] == 4
    assert json.loads((folder.report / "report.json").read_text())["changed"] == ""
    assert "CHANGED" not in (folder.report / "table.md").read_text()
    recipe = yaml.safe_load((sweep.root / "recipe.yaml").read_text())
    (sweep.root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "train": {**recipe.get("train", {}), "holdout": 0.1}}))
    said = (
        "since the last submission the sweep has changed: 4 new (digits-content-s0, digits-positional-s0, digits-content-s1 "
        "...), 4 no longer in it as configured before"
    )
    for verb in ("collect", "report", "status", "tensorboard --no-serve", "frame", f"frame --out {sweep.root}/a.csv"):
        assert said in sweep(verb)[1], verb
    assert said in sweep(f"retry --dry-run --data-dir {sweep.root}/data")[1]
    for verb in ("collect --json", "status --json"):
        assert json.loads(sweep(verb)[1])["changed"].startswith(said)
    assert json.loads((folder.report / "report.json").read_text())["changed"].startswith(said)
    for name in ("table.md", "table.tex", "report.md", "report.html"):
        assert f"CHANGED: {said}" in (folder.report / name).read_text().replace("\\", ""), name
    with (sweep.root / "a.csv").open() as file:
        assert file.readline().startswith("run,")


def test_giving_up_is_for_searches(sweep: Shell) -> None:
    code, text = sweep(f"submit --give-up --data-dir {sweep.root}/data")
    assert (code, text.count("\n")) == (1, 1)
    assert "--give-up: small is no search; its other runs do not wait for those that failed" in text


def test_a_full_disk_is_one_line(sweep: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/root/table.md")

    monkeypatch.setattr("jobs.report.collect_command.write_report", full)
    code, text = sweep("collect")  # which has printed the table by then
    assert (code, text.splitlines()[-1]) == (
        1,
        "vitpa sweep: /root/table.md: No space left on device; free some space and start again",
    )


def test_interrupted_by_ctrl_c(sweep: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.report.collect_command.write_report", interrupt)
    assert sweep("collect")[0] == 130


def test_what_to_type_next_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(tmp_path / "a b", capsys)
    runs = make_sweep(shell.root, seeds=1).runs
    write_result(shell.root, runs[0])
    write_result(shell.root, runs[1], val_top1=float("nan"))
    _, text = shell(f"submit --data-dir '{shell.root}/data'")
    (retry,) = [line.partition("to run again: ")[2] for line in text.splitlines() if "to run again: " in line]
    place = ["--profile", "local", "--data-dir", f"{shell.root}/data"]
    assert shlex.split(retry)[5:] == [str(shell.root), *place, "state=broken"]
    sweep = ["vitpa", "sweep", "tensorboard", str(shell.root / "small.yaml"), "--root", str(shell.root)]
    assert shlex.split(text.splitlines()[-1]) == sweep


def test_where_a_sweep_runs_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Typed again without --profile, a sweep that was sent to a cluster must not start on this machine."""
    shell = Shell(tmp_path, capsys)
    run = make_sweep(shell.root, seeds=1).runs[1]
    (tmp_path / "two.yaml").write_text("slots: 2\nruntime: {device: cpu}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("jobs.submit.submit.training_command", lambda processes: STAND_IN)
        assert "runs on this machine (profile " in shell("submit --profile two.yaml --data-dir data --wait")[1]
    write_result(shell.root, run, val_top1=float("nan"))
    settle(shell.root, make_sweep(shell.root, seeds=1))  # a process may live a little longer than it takes to see its result
    retry = [line for line in shell("status")[1].splitlines() if "to run again: " in line]
    assert "--profile" not in retry[0], "it is remembered"
    _, text = shell("retry --dry-run")
    assert "would start 1 run, 2 at a time" in text
    intent = read_json(next(shell.root.glob("sweeps/small/submissions/*/intent.json")))
    assert intent is not None
    assert intent["place"] == {"profile": str(tmp_path / "two.yaml"), "data_dir": str(tmp_path / "data")}


def test_plan_with_a_wrong_profile_is_an_error(sweep: Shell) -> None:
    code, text = sweep("plan --profile nowhere")
    assert code == 1
    assert "cannot be submitted yet: profile 'nowhere': no such file" in text


def test_cancel_now_of_a_training_without_a_worker(sweep: Shell) -> None:
    run = make_sweep(sweep.root, seeds=2).runs[1].directory(sweep.root)
    me = {"process": ProcessId.mine().model_dump()}
    attempt = run.claim_attempt(1, me)
    assert attempt is not None
    write_json(attempt.start_json, me)
    _, text = sweep("cancel --now")
    assert "1 asked to stop" in text
    assert "killed" not in text


def test_help_names_every_shipped_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "plan", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in shipped_sweeps())


def test_nothing_to_cancel_or_retry(sweep: Shell) -> None:
    assert "0 cancelled while they waited, 0 asked to stop" in sweep("cancel")[1]
    code, text = sweep("retry state=failed")
    assert code == 0
    assert "nothing to retry" in text


def test_retry_takes_whatever_an_exit_says(tmp_path: Path) -> None:
    """Records that were edited by hand: values that are no texts are compared, too."""
    run = make_sweep(tmp_path / "root", seeds=1).runs[0]
    directory = run.directory(tmp_path / "root")
    for number in (1, 2):
        attempt = directory.claim_attempt(number, {})
        assert attempt is not None
        write_json(attempt.exit_json, {"state": [], "reason": {}})
    assert not fails_alike(RunState(run, "broken", attempt=attempt), tmp_path / "root")
    assert fails_alike(RunState(run, "failed", attempt=attempt), tmp_path / "root")


def diverge(root: Path, run: Run) -> None:
    me = {"process": ProcessId.mine().model_dump()}
    attempt = run.directory(root).claim_attempt(1, me)
    assert attempt is not None
    write_json(attempt.start_json, me)
    write_json(attempt.exit_json, {"state": "failed", "reason": "TrainError: the loss is not finite", "duration_s": 2.0})


def test_what_a_search_has_given_up_is_not_to_be_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell, sweep = Shell(tmp_path, capsys), make_search(tmp_path, budget={"runs": 2}, trials_at_once=2)
    SweepDir(tmp_path, "small").record(sweep)
    begin(sweep)
    assert sweep.ledger is not None
    first, _ = sweep.runs
    for run in sweep.runs:
        diverge(tmp_path, run)
    sweep.ledger.append(Round(out={"0": "not finite"}, trials=[Entry(number=1, epochs=9)]))
    _, text = shell("status")
    assert "search: in round 2; 2 trials: 1 given up, 1 in training" in text
    assert "1 failed, not touched by submit; to run again: vitpa sweep retry" in text
    retry = f"retry --dry-run --data-dir {tmp_path}/data"
    _, text = shell(retry)
    assert f"{first.label}: left alone, since the search has given up the trial and would not use it" in text
    assert "would start 1 run, " in text
    assert "would start 2 runs" in shell(f"{retry} --force")[1]
    shell(f"report --out {tmp_path}/report")
    problems = (tmp_path / "report" / "report.md").read_text().partition("## 2.")[0]
    assert problems.count("- next: ") == 2
    assert problems.count("- next: nothing: the search has given up the trial\n") == 1
    assert problems.count("- next: `vitpa sweep retry ") == 1


def test_a_finished_search_does_not_suggest_to_retry_what_it_has_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, sweep = Shell(tmp_path, capsys), make_search(tmp_path, budget={"runs": 1}, trials_at_once=1)
    SweepDir(tmp_path, "small").record(sweep)
    begin(sweep)
    assert sweep.ledger is not None
    diverge(tmp_path, sweep.runs[0])
    assert "to run again" in shell("status")[1]
    sweep.ledger.append(Round(out={"0": "not finite"}, trials=[]))
    code, text = shell("status")
    assert "search: over after round 1; 1 trial: 1 given up" in text
    assert "to run again" not in text
    assert code == 0
    assert "nothing to retry" in shell("retry")[1]
