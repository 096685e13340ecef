"""What goes out: no control character of anyone's, in any encoding, and no word when nobody reads."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.report.collect import Cell, CollectedTable
from jobs.report.status import table_of
from jobs.report.tables import latex, markdown
from tests.support.private_disk import run_on_private_disk
from vitpa.cli import main
from vitpa.console import PrintableConsole
from vitpa.records import create_exclusive, write_atomic
from vitpa.statistics import Estimate
from vitpa.terminal import OUTPUT_CLOSED, PrintableStream, printable, printable_output

EVIL = "\x1b]0;T\x07\x1b[2J\x9b31m\x7f\u202e\u2028[bold]x[/bold]:smile:"
SHOWN = r"\x1b]0;T\x07\x1b[2J\x9b31m\x7f\u202e\u2028[bold]x[/bold]:smile:"
VITPA = [sys.executable, "-m", "vitpa.cli"]


def test_control_characters_are_shown() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\nb\tc\r\0é±\U0001f600") == "a\\nb\\tc\\r\\x00é±\U0001f600"
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    assert printable(printable(EVIL)) == printable(EVIL)


def test_the_streams_show_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with printable_output():
        print(EVIL)
        print(EVIL, file=sys.stderr)
    assert capsys.readouterr() == (SHOWN + "\n", SHOWN + "\n")
    assert (sys.stdout, sys.stderr) == before


def test_a_console_shows_them_and_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", PrintableStream(text))
    console = PrintableConsole(width=200)
    console.print(EVIL, style="bold")
    row = {"run": "r", "state": "failed", "step": None, "steps_total": None, "epoch": None, "epochs": 1, "val_top1": None}
    row |= {"images_per_s": None, "eta_s": None, "attempts": 1, "node": EVIL, "job": "1\n2", "reason": f"a\n{EVIL}"}
    console.print(table_of([row], EVIL))
    assert text.getvalue().replace("]0;T\\x1b", "]0;T\\x07\\x1b").count(SHOWN) == 4  # rich drops the bell by itself
    assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f]*", text.getvalue())
    assert f"r failed: a\\n{SHOWN}" in text.getvalue()


def test_an_argument_is_shown_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["sweep", "plan", EVIL], ["sweep", "plan", "demo", f"seed={EVIL}"], ["train", "digits", f"dataset={EVIL}"]):
        assert main(words) == 1
        shown = "".join(capsys.readouterr())
        assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]*", shown)
        assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LANG": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_any_encoding_will_do(environment: dict[str, str], tmp_path: Path) -> None:
    sweep = tmp_path / "ü±.yaml"
    text = f"{{name: s, recipes: [digits], attentions: [content], seeds: [0], description: '± ü \U0001f600', x: '{'é' * 9}'}}"
    sweep.write_text(text, encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    got = subprocess.run([*VITPA, "sweep", "plan", str(sweep)], env=plain | environment, capture_output=True, check=False)
    assert got.returncode == 1
    assert b"Traceback" not in got.stderr
    assert b"unknown key x" in got.stderr
    assert got.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["sweep plan demo --json", "sweep plan demo", "sweep --help", "sweep plan nowhere 2>&1"])
def test_a_reader_that_has_gone_ends_the_command_quietly(command: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m vitpa.cli {command}"
    line = f"{{ {line}; echo $? > {tmp_path}/code; }} | true"
    got = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )
    assert got.stderr == ""
    assert int((tmp_path / "code").read_text()) in (OUTPUT_CLOSED, 0, 1)


def redirected(command: str, redirection: str) -> subprocess.CompletedProcess[str]:
    line = f"{sys.executable} -m vitpa.cli {command} {redirection}"
    environment = {**os.environ, "PATH": "/nowhere"}  # no SLURM
    return subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "sweep plan demo",
        "sweep plan demo --json",
        "sweep --help",
        "doctor --profile cluster",
        "doctor --profile cluster --json",
        "devcluster status",
        "devcluster status --json",
        "devcluster stop",
        "train --help",
    ],
)
def test_a_full_disk_behind_the_output_is_one_line_that_says_so(command: str) -> None:
    """Not that there is too little space for runs, and no traceback."""
    got = redirected(command, "> /dev/full")
    assert got.returncode == 1
    assert got.stderr == "error: standard output cannot be written: No space left on device\n"


def test_what_cannot_be_said_on_stderr_ends_nothing() -> None:
    assert redirected("sweep plan demo --json", "2> /dev/full").stdout.startswith("{")
    assert redirected("sweep plan nowhere", "2> /dev/full").returncode == 1


ON_A_FULL_DISK = """
from vitpa.terminal import printable_output
sys.stderr = open(folder / "log", "w")
with printable_output():
    disk.fill()
    for number in range(2000):
        print(f"line {number}", file=sys.stderr, flush=True)
    disk.free()
    print("there is room again", file=sys.stderr, flush=True)
    found = (folder / "log").read_text().splitlines()
    assert (found[0], found[-1]) == ("line 0", "there is room again")
    assert len(found) < 2001, "the disk was not full"
    disk.fill()
    for number in range(2000):
        print(f"line {number}", file=sys.stderr, flush=True)
"""


def test_what_is_said_after_a_full_disk_has_room_is_there(tmp_path: Path) -> None:
    """And one that is full at the end changes no exit code."""
    done = run_on_private_disk(ON_A_FULL_DISK, tmp_path)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_closed_output_is_no_traceback() -> None:
    for redirection in (">&-", ">&- 2>&-"):
        got = redirected("sweep plan demo --json", redirection)
        assert "Traceback" not in got.stderr
        assert "Exception ignored" not in got.stderr
        assert got.returncode in (0, 1)


def test_a_folder_in_the_way_is_named_not_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "env.json").mkdir()
    with pytest.raises(OSError, match="directory") as raised:
        write_atomic(tmp_path / "env.json", "x")
    assert raised.value.filename == str(tmp_path / "env.json")
    assert not create_exclusive(tmp_path / "env.json", "x")
    with pytest.raises(OSError, match="directory") as raised:
        write_atomic(tmp_path / "env.json" / "no" / "x", "x")
    assert raised.value.filename == str(tmp_path / "env.json" / "no" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["env.json"]


def table(source: str, description: str = "") -> CollectedTable:
    cell = Cell(
        dataset="my_data",
        attention="content",
        network="content",
        settings={},
        wanted=2,
        val_top1=Estimate(2, 0.5, 0.1, 0.4, 0.6),
        seeds=[0, 1],
        gpu_hours=1.0,
        code_versions=["abc"],
        data_versions=[],
        reference_val_top1=0.9,
        reference_source=source,
    )
    return CollectedTable("s_1", description, "now", [], [cell], [], [], [{"run": "r", "state": "failed", "reason": "a\n\\b"}])


def test_every_line_of_latex_is_a_comment_or_of_the_table(tmp_path: Path) -> None:
    text = latex(table("A & B, 100 %\n\\input{x}\r\u2028^^M $x_1$ {~"))
    comments, begin, tabular = text.partition("\\begin{tabular}")
    assert begin
    assert all(line.startswith("% ") for line in comments.splitlines())
    assert r"my\_data & content & 50.00 $\pm$ 10.00" in tabular
    if shutil.which("pdflatex"):
        whole = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + text + "\\end{document}"
        (tmp_path / "t.tex").write_text(whole, encoding="utf-8")
        subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_a_report_has_a_line_for_each_note() -> None:
    text = markdown(table("A\nB\x1b[2J", "two\nlines"))
    assert "## s_1: two lines\n" in text
    assert "Reference my_data content: A B\\x1b[2J.\n" in text
    assert "- r: failed (a \\b)" in text
