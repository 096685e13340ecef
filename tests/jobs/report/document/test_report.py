"""`vitpa sweep report`: order and numbers of its sections, a page that is well-formed and asks for nothing, odd sweeps."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from jobs.report.collect import collect
from jobs.report.compare import Scores, comparisons
from jobs.report.document import curves, render
from jobs.report.document.content import Charts
from jobs.report.document.curves import mean_line
from jobs.report.document.svg import ticks
from jobs.report.document.verdict import Compared
from jobs.report.tables import texts
from jobs.state import StateReader
from jobs.sweep import Run, Sweep, SweepDir, load_sweep
from tests.support.jobs_sweeps import make_sweep, write_result
from tests.support.report_sweeps import (
    CONTENT,
    POSITIONAL,
    explorer_data,
    finish,
    finished_sweep,
    write_analysis,
    write_curve,
)
from tests.support.search_sweeps import make_search
from vitpa.cli import main as vitpa
from vitpa.records import ProcessId, write_json
from vitpa.statistics import Estimate, bootstrap_interval, probability_of_superiority

ORDER = ["problems", "verdict", "table", "curves", "structure", "explorer", "costs", "origin"]
VOID = {"meta", "link", "img", "input", "br", "path", "circle"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page; a tag that closes another one than the last that was opened is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:  # Chromium closes them
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(root: Path, sweep: Sweep, *words: str, code: int = 0) -> tuple[str, str]:
    """The HTML and the Markdown that the command writes for a sweep, recorded as submitted."""
    SweepDir(root, sweep.name).record(sweep)
    assert vitpa(["sweep", "report", sweep.name, "--root", str(root), *words]) == code
    folder = SweepDir(root, sweep.name).report
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def fail(root: Path, run: Run, log: str) -> None:
    number = len(run.directory(root).attempts()) + 1
    attempt = run.directory(root).claim_attempt(number, {"process": ProcessId.mine().model_dump()})
    assert attempt is not None
    write_json(attempt.start_json, {"process": ProcessId.mine().model_dump()})
    attempt.log.write_text(log)
    write_json(attempt.exit_json, {"state": "failed", "reason": log.splitlines()[-1], "duration_s": 2.0})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep, str, str]:
    """A finished and analysed sweep with its report."""
    root = tmp_path_factory.mktemp("report")
    sweep = finished_sweep(root)
    for run in sweep.runs:
        write_analysis(root, run)
    return root, sweep, *report(root, sweep)


def test_sections_stand_in_their_order(whole: tuple[Path, Sweep, str, str]) -> None:
    _, _, page, text = whole
    assert [attributes["id"] for attributes in Page(page).all("section")] == ORDER
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [html.unescape(title) for title in titles] == re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_the_page_is_well_formed_and_accessible(whole: tuple[Path, Sweep, str, str]) -> None:
    page = Page(whole[2])
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    assert all(attributes["alt"] for attributes in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes[key] for _, attributes in page.elements for key in ("aria-labelledby", "for") if key in attributes]
    assert {word for names in named for word in (names or "").split()} <= set(ids)
    assert len(page.all("svg")) == 4 + 6


def luminance(colour: str) -> float:
    """Relative luminance of rrggbb or rgb, as WCAG 2.1 defines it."""
    channels = [
        int(each, 16) / 255 for each in re.findall("..", colour if len(colour) == 6 else re.sub("(.)", r"\1\1", colour))
    ]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_have_the_contrast_that_wcag_asks_for() -> None:
    """4.5 for texts and 3 for lines, in light, dark and print; axe leaves texts within an SVG undecided."""
    css = (render.TEMPLATES / "style.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): #(\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)]
    assert len(schemes) == 3
    texts_on = [(text, under, 4.5) for text in ("text", "soft", "link", "bad") for under in ("page", "raised")]
    lines_on = [(line, "page", 3) for line in (*(f"c{index}" for index in range(6)), "chance")]
    for colours in schemes:
        for name, under, least in texts_on + lines_on:
            dark, light = sorted((luminance(colours[name]), luminance(colours[under])))
            assert (light + 0.05) / (dark + 0.05) >= least, (name, under)


def test_the_page_asks_for_nothing(whole: tuple[Path, Sweep, str, str]) -> None:
    page = Page(whole[2])
    loads = [value for _, each in page.elements for key, value in each.items() if key in ("src", "href", "srcset", "data")]
    assert all(value is None or value.startswith(("#", "data:")) for value in loads)
    assert not re.search(r"https?://|@import|url\(", whole[2])
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_numbers_are_those_of_collect(whole: tuple[Path, Sweep, str, str]) -> None:
    root, sweep, page, text = whole
    table = collect(sweep, StateReader(root).states(sweep.runs), root)
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", page)
    assert {cell for rows in texts(table) for row in rows for cell in row} <= set(map(html.unescape, cells))
    for line in ("| digits | content | 92.00 ± 2.00 |", "| digits | positional | 89.33 ± 1.53 |"):
        assert line in text


def test_the_verdict_is_that_of_a_calculation_by_hand(whole: tuple[Path, Sweep, str, str]) -> None:
    # differences 0.02, 0.01, 0.05: mean 0.0267, std 0.0208, t = 2.219 with 2 degrees of freedom, p = 0.157
    line = next(line for line in whole[3].splitlines() if line.startswith("digits: the seeds"))
    assert "the seeds do not tell content and positional apart; content is 2.67 points above" in line
    assert "paired over 3 seeds" in line
    assert "p = 0.16" in line
    assert r"(content - positional: 95 % t interval \[-2.50, +7.84\] points" in line
    assert r"bootstrap over seeds \[+1.00, +5.00\]" in line  # 1 of 27 draws has the smallest three times, 1 the largest
    assert "with probability 89 %" in line  # 8 of 9 pairs
    assert "| digits | content - positional | +2.67 ± 2.08 |" in whole[3]


def test_equal_means_are_compared_as_in_the_table(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=3)
    for run in sweep.runs:  # content - positional: +0.03, -0.01, -0.02, whose mean is not 0 but -1e-17
        finish(tmp_path, run, 0.5 if run.attention == "positional" else (0.53, 0.49, 0.48)[run.seed])
    _, text = report(tmp_path, sweep)
    line = next(line for line in text.splitlines() if line.startswith("digits: the seeds"))
    (row,) = (row for row in text.splitlines() if row.startswith("| digits | content - positional | +0.00 ± 2.65 | "))
    interval = row.split(" | ")[3]
    assert f"their means are equal (content - positional: 95 % t interval {interval} points" in line
    assert "A run of content is more accurate than one of positional with probability 33 %" in line


def test_costs_say_what_is_in_no_row(tmp_path: Path) -> None:
    sweep = finished_sweep(tmp_path)
    shutil.rmtree(sweep.runs[2].directory(tmp_path).path)
    fail(tmp_path, sweep.runs[2], "KeyError: 'a'")
    for run in sweep.runs[:2] + sweep.runs[3:]:
        write_result(tmp_path, run, gpu_hours=0.001)
    _, text = report(tmp_path, sweep, code=4)
    costs = text[text.index("## 7") : text.index("## 8")]
    assert "Not in the table: 1 attempt of runs that are not finished: digits-content-s1, which took 2 s" in costs
    assert "Energy: not known" in costs
    assert "Goodput: not known" in costs
    assert "| 0.002 |" in costs, "2 finished runs of content"
    assert "| all 5 finished |" in text[text.index("## 8") :]


def test_curves_end_with_the_results_and_mean_the_seeds(whole: tuple[Path, Sweep, str, str]) -> None:
    assert "| content | 23.00 ± 0.50 | 46.00 ± 1.00 | 69.00 ± 1.50 | 92.00 ± 2.00 |" in whole[3]
    curves = [{1.0: 1.0, 2.0: 3.0}, {1.0: 2.0, 2.0: 5.0, 3.0: 6.0}]
    assert [(epoch, found.mean) for epoch, found in mean_line(curves)] == [(1.0, 1.5), (2.0, 4.0)]
    long = {float(epoch): 0.0 for epoch in range(1000)}
    assert len(mean_line([long])) <= 100
    assert mean_line([long])[-1][0] == 999


def test_single_lines_are_explained_where_there_are_some(whole: tuple[Path, Sweep, str, str], tmp_path: Path) -> None:
    """Also positional's own line is dashed: nobody is to take it for a run that is not finished."""
    note = "Thin dotted lines: single runs that are not finished."
    assert note not in whole[3]
    sweep = finished_sweep(tmp_path)
    sweep.runs[0].directory(tmp_path).result_json.unlink()
    assert note in report(tmp_path, sweep, code=4)[1]


def test_structure_stands_beside_initialisation_and_chance(whole: tuple[Path, Sweep, str, str]) -> None:
    found = Estimate.of([0.1 * (4 + seed) for seed in range(3)])
    assert f"| content | 0.100 ± 0.100 | 0.200 ± 0.100 | {found.mean:.3f} ± {found.std:.3f} |" in whole[3]
    assert r"| neighbour recall of similarity (share) | chance | 0.300 | 0.300 | 0.300 |" in whole[3]
    assert "| 95 % of chance | 0.200 to 0.400 | 0.200 to 0.400 | 0.200 to 0.400 |" in whole[3]
    assert "Images are grids of 2 x 2 patches" in whole[3]
    assert "mean attention distance: how far a patch is from those" in whole[3]


def test_chance_is_that_of_each_cell(tmp_path: Path) -> None:
    sweep = finished_sweep(tmp_path)
    for run in sweep.runs:
        write_analysis(tmp_path, run)
        path = run.directory(tmp_path).path / "analysis" / "structure.json"
        document = json.loads(path.read_text())
        for finding in document["findings"]:
            finding["chance_high"] = 0.6 if run.attention == "content" else 0.45
        path.write_text(json.dumps(document))
    page, text = report(tmp_path, sweep)
    assert "| mean attention distance (patches) | chance | 0.300 | 0.300 | 0.300 |" in text
    for attention, high in (("content", "0.600"), ("positional", "0.450")):
        assert f"| 95 % of chance, {attention} | 0.200 to {high} |" in text
    svg = page[page.index("mean attention distance, in patches") :]
    top = re.search(r'class="band chance" d="M44 ([0-9.]+)L', svg[: svg.index("</svg>")])
    assert top is not None
    assert float(top[1]) == min(float(y) for y in re.findall(r"[ML][0-9.]+ ([0-9.]+)", top[0])), "up to 0.6"


def test_maps_of_the_explorer_are_those_of_analyze(whole: tuple[Path, Sweep, str, str]) -> None:
    root, sweep, page, _ = whole
    runs = explorer_data(page)["runs"]
    assert len(runs) == 6
    for run in sweep.runs:
        maps = write_analysis(root, run)  # the same again
        (its,) = (each for each in runs if (each["attention"], each["seed"]) == (run.attention, run.seed))
        assert (its["epochs"], its["side"], its["layers"], its["heads"]) == ([0, 1, 4], 2, 1, 2)
        assert maps.attention is not None
        similarity, layers, heads = json.loads(json.dumps([its["similarity"], its["of_layers"], its["of_heads"]]))
        for index in range(3):
            found = np.frombuffer(base64.b64decode(similarity[str(index)]), np.uint8).reshape(4, 4) / 127.5 - 1
            assert np.abs(found - maps.similarity[index]).max() <= 0.004
            means = maps.attention[index].astype(float).mean(1, keepdims=True)
            for (packed, largest), wanted in ((layers[str(index)], means), (heads[str(index)], maps.attention[index])):
                values = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(1, -1, 4, 4) / 255
                scale = np.array(largest).reshape(1, -1, 1, 1)
                assert (np.abs(values * scale - wanted) <= scale / 500).all()


def test_a_budget_leaves_out_what_matters_least_and_says_so(whole: tuple[Path, Sweep, str, str], tmp_path: Path) -> None:
    root, sweep, _, _ = whole
    similarities = 18 * (24 + 16)  # characters of all 18 maps of 16 bytes
    layers, heads = 24 + 16, 44 + 32
    budget = (similarities + 6 * layers + 2 * heads + 10) / 2**20
    words = ["--out", str(tmp_path)]
    assert vitpa(["sweep", "report", sweep.name, "--root", str(root), *words, "--maps-mib", f"{budget:.9f}"]) == 0
    page = (tmp_path / "report.html").read_text()
    runs = explorer_data(page)["runs"]
    assert [len(json.loads(json.dumps(each["similarity"]))) for each in runs] == [3] * 6
    kept = [[sorted(json.loads(json.dumps(each[kind]))) for kind in ("of_layers", "of_heads")] for each in runs]
    assert kept == [[["0", "1", "2"], ["2"]], [[], []], [[], []]] * 2, "of the first seeds"
    assert "12 of 18 sets of attention maps of layers" in page
    assert "16 of 18 sets of attention maps of all heads" in page
    assert vitpa(["sweep", "report", sweep.name, "--root", str(root), *words, "--maps-mib", "0"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert 'x-data">' not in page
    assert "18 of 18 similarity maps" in page
    assert len(Page(page).all("img")) == 4, "pictures of each cell stay"


def test_what_failed_comes_first_and_is_harmless(tmp_path: Path) -> None:
    sweep = finished_sweep(tmp_path)
    failed, missing = sweep.runs[2], sweep.runs[3]
    for run in (failed, missing):
        shutil.rmtree(run.directory(tmp_path).path)
    hostile = "<script>alert(1)</script>\x1b[2J| `x` ![a](http://b)"
    fail(tmp_path, failed, f'Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: "{hostile}"')
    page, text = report(tmp_path, sweep, code=4)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J" in page
    first = page[page.index('id="problems"') : page.index('id="verdict"')]
    assert "1 failed: digits-content-s1" in first
    assert "other; to fix it: fix what the last lines of the log say, then retry" in first
    assert f"vitpa sweep retry small --root {tmp_path} state=failed" in first
    assert "1 missing: digits-positional-s1" in first
    assert f"vitpa sweep submit small --root {tmp_path} state=missing" in first
    assert first.index("failed: ") < first.index("missing: ")
    assert "\x1b" not in text
    assert r"\!\[a\](http://b)" in text, "no picture from elsewhere"
    assert "        KeyError" in text, "a log is code in Markdown"
    Page(page)


def test_a_retry_names_the_runs_that_it_is_for(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    for _ in range(2):
        fail(tmp_path, sweep.runs[0], "KeyError: 'a'")
    fail(tmp_path, sweep.runs[3], "vitpa train: out: No space left on device")
    page, _ = report(tmp_path, sweep, code=4)
    assert "state=failed attention=content seed=0 --force<" in page, "it failed twice in the same way"
    assert "state=failed attention=positional seed=1<" in page
    assert "disk full; to fix it: " in page


def test_nothing_is_finished(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    write_curve(tmp_path, sweep.runs[0], 0.5, 2)
    page, text = report(tmp_path, sweep, code=4)
    assert [attributes["id"] for attributes in Page(page).all("section")] == ORDER
    assert "no seed has a result in both" in text
    assert "No run is finished yet; then: vitpa analyze small" in text
    assert "digits-content-s0 (missing)" in page, "the curve that is there"


@pytest.mark.parametrize(
    "kind", ["one seed", "axes", "resnet", "permuted", "search", "held out", "other weights", "other images"]
)
def test_any_sweep_has_a_report(tmp_path: Path, kind: str) -> None:
    if kind == "search":
        sweep, expected = make_search(tmp_path), "search: "
    elif kind == "resnet":
        make_sweep(tmp_path, seeds=2)
        path = tmp_path / "small.yaml"
        document = {**yaml.safe_load(path.read_text()), "attentions": ["content"], "overrides": {"model.kind": "resnet18"}}
        path.write_text(yaml.safe_dump(document))
        sweep, expected = load_sweep(str(path), tmp_path), "a network without positional encodings"
    else:
        axes = {"optim.lr": [0.001, 0.002]} if kind == "axes" else None
        settings = {"permuted": ("augment.permute_block_px", 4), "held out": ("train.holdout", 0.1)}
        overrides = dict([settings[kind]]) if kind in settings else None
        sweep = make_sweep(tmp_path, seeds=1 if kind == "one seed" else 2, axes=axes, overrides=overrides)
        expected = {
            "one seed": "one seed is no test",
            "axes": "difference of",
            "permuted": "the permutation undone",
            "held out": "HELD OUT: digits was evaluated on",
            "other weights": "analysed with other weights",
            "other images": "analysed with other images",
        }[kind]
    for run in sweep.runs:
        finish(tmp_path, run, 0.5 + 0.1 * run.seed + (0.05 if run.attention == "content" else 0))
        if run.config.model.kind == "vit":
            write_analysis(tmp_path, run)
        if kind == "other weights":
            write_result(tmp_path, run, val_top1=0.5, weights_sha256="1" * 64)
        if kind == "other images" and run.attention == "content":
            path = run.directory(tmp_path).path / "analysis" / "structure.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "images": 4, "images_sha256": "2" * 64}))
    page, text = report(tmp_path, sweep)
    if kind == "other images":  # not in the explorer either
        assert {each["attention"] for each in explorer_data(page)["runs"]} == {"positional"}
    assert [attributes["id"] for attributes in Page(page).all("section")] == ORDER
    assert expected in text.replace("\\", "")
    assert ("nothing to compare" in text) == (kind == "resnet")


def test_one_seed_of_one_attention_along_an_axis(tmp_path: Path) -> None:
    make_sweep(tmp_path, seeds=1, axes={"optim.lr": [0.001, 0.002]})
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "attentions": ["content"]}))
    sweep = load_sweep(str(path), tmp_path)
    for run, top1 in zip(sweep.runs, (0.5, 0.6), strict=True):
        finish(tmp_path, run, top1)
    _, text = report(tmp_path, sweep)
    verdict = text[text.index("## 2") : text.index("## 3")]
    assert "digits: content lr=0.002 has the highest accuracy of 2 cells with a result, 60.00 %; a test takes" in verdict
    assert "nothing to compare" not in verdict
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "seeds": [0, 1]}))
    sweep.runs[0].directory(tmp_path).result_json.unlink()
    finish(tmp_path, load_sweep(str(path), tmp_path).runs[2], 0.5)
    _, text = report(tmp_path, load_sweep(str(path), tmp_path), code=4)
    assert "2 cells with a result, 60.00 %, of different seeds; a test takes" in text


def test_some_of_the_runs_need_a_place_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = finished_sweep(tmp_path)
    SweepDir(tmp_path, sweep.name).record(sweep)
    words = ["sweep", "report", sweep.name, "--root", str(tmp_path), "attention=content"]
    assert vitpa(words) == 1
    assert "say with --out where to write it" in capsys.readouterr().err
    assert vitpa([*words, "--out", str(tmp_path / "some")]) == 0
    assert "There is nothing to compare" in (tmp_path / "some" / "report.md").read_text()


def test_thirty_runs_are_below_a_megabyte_without_maps(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=5, steps=120, axes={"model.patch_size": [1, 2, 4]})
    for run in sweep.runs:
        finish(tmp_path, run, 0.6 + 0.01 * run.seed)
        write_analysis(tmp_path, run, side=8, layers=7, heads=2, epochs=(0, 1, 10, 30, 100, 120))
    page, text = report(tmp_path, sweep, "--maps-mib", "0")
    assert len(page.encode()) < 1_000_000
    assert len(text.encode()) < 100_000


def test_differences_of_two_seeds_that_are_the_same_tell_nothing() -> None:
    of_seeds = {"content": {0: 0.5, 1: 0.6}, "positional": {0: 0.505, 1: 0.605}}
    cells = [Scores("digits", {"attention": name}, top1) for name, top1 in of_seeds.items()]
    (its,) = comparisons(cells, "attention")
    found = Compared(its, None, 0.5)
    assert not found.certain
    assert found.text.startswith("digits: the seeds do not tell positional and content apart; positional is 0.50 points above")
    assert "p = 0.5, paired over 2 seeds" in found.text


def test_loss_and_accuracy_are_of_the_same_weights(tmp_path: Path) -> None:
    """Of the average where a run keeps one; others of the same chart keep none."""
    make_sweep(tmp_path, seeds=1, axes={"train.ema_decay": [0.0, 0.99]})
    sweep = load_sweep(str(tmp_path / "small.yaml"), tmp_path)
    for run in sweep.runs:
        average = {"ema_val_top1": 0.9, "ema_val_top5": 1.0, "ema_val_loss": 0.25} if run.config.train.ema_decay else {}
        write_result(tmp_path, run, val_top1=0.3, val_loss=3.0, **average)
    (charts,) = (
        each
        for each in curves.section(StateReader(tmp_path).states(sweep.runs), tmp_path, "").blocks
        if isinstance(each, Charts)
    )
    said = {chart.title: chart.description for chart in charts.charts}
    for title, plain, averaged in (("top-1 accuracy", "30.00", "90.00"), ("loss", "3.00", "0.25")):
        assert f"content ema_decay=0 {plain} after epoch 4" in said[f"digits: {title} on val"]
        assert f"content ema_decay=0.99 {averaged} after epoch 4" in said[f"digits: {title} on val"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_difference_that_is_certain_has_a_winner(sign: int) -> None:
    """It rounds to 0.00 points; equal means it is not."""
    content = {seed: 0.5 + 0.01 * seed for seed in range(10)}
    positional = {seed: value + sign * (2e-5 if seed % 2 else 4e-5) for seed, value in content.items()}
    cells = [Scores("digits", {"attention": name}, top1) for name, top1 in (("content", content), ("positional", positional))]
    (its,) = comparisons(cells, "attention")
    found = Compared(its, (its.val_top1.mean or 0, its.val_top1.mean or 0), 0.5)
    winner, loser = ("positional", "content")[::sign]
    assert found.text.startswith(
        f"digits: {winner} is better than {loser} by 0.0030 points ({winner} - {loser}: 95 % t interval "
    )
    assert "[+0.0022, +0.0038] points, bootstrap over seeds [+0.0030, +0.0030], p = " in found.text
    assert found.row[2:4] == [f"{'-+'[sign > 0]}0.0030 ± 0.0011", "[+0.0022, +0.0038]" if sign > 0 else "[-0.0038, -0.0022]"]


def test_statistics_of_the_verdict() -> None:
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2))
    assert bootstrap_interval([0.02, 0.01, 0.05]) == pytest.approx((0.01, 0.05))
    assert probability_of_superiority(CONTENT, POSITIONAL) == pytest.approx(8 / 9)
    assert probability_of_superiority([1.0], [1.0]) == 0.5
    assert probability_of_superiority([], [1.0]) is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.3), (-2.0, 97.0), (1e-6, 2e-6), (5.0, 5.0), (0.0, 0.0)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 8
    assert len({f"{each:g}" for each in found}) == len(found)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium), which shows what the script does")
def test_the_explorer_works_in_a_browser(whole: tuple[Path, Sweep, str, str], tmp_path: Path) -> None:
    root, sweep, _, _ = whole
    path = SweepDir(root, sweep.name).report / "report.html"
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    dom = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    page = Page(dom)
    (explorer,) = (each for each in page.all("div") if each.get("id") == "x-explorer")
    assert "hidden" not in explorer
    maps = write_analysis(root, sweep.runs[0])
    similar = maps.similarity[-1, 3].astype(float)
    nearest = int(np.argsort(np.where(np.arange(4) == 3, -2, similar))[-1])
    assert f"Patch in row 2, column 2. Most alike: row {nearest // 2 + 1} column {nearest % 2 + 1} (" in page.text
