"""The report as files: one HTML page that needs nothing besides itself, and Markdown, both from the same records."""

from __future__ import annotations

import base64
import hashlib
import itertools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jobs.report.document.content import Chart, Picture, Report, Table
from jobs.report.document.svg import style, svg
from vitpa.records import write_atomic
from vitpa.terminal import printable

TEMPLATES = Path(__file__).with_name("templates")


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.html and report.md into `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.html", folder / "report.md"]
    for path, text in zip(paths, (html(report), markdown(report)), strict=True):
        write_atomic(path, text)
    return paths


def html(report: Report) -> str:
    """The page. Its Content-Security-Policy forbids every request, and every script but our own."""
    script = (TEMPLATES / "explorer.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = _environment(autoescape=True)
    environment.filters["svg"] = _chart
    environment.filters["style"] = style
    environment.filters["spans"] = _spans
    environment.filters["data_uri"] = _data_uri
    environment.filters["in_script"] = _in_script
    css = Markup((TEMPLATES / "style.css").read_text())  # ours
    return environment.get_template("report.html.j2").render(report=report, css=css, script=Markup(script), digest=digest)


def markdown(report: Report) -> str:
    """The text; figures are tables in it."""
    environment = _environment(autoescape=False)
    environment.filters["md"] = _escaped
    environment.filters["md_table"] = _table
    return environment.get_template("report.md.j2").render(report=report)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters["printable"] = lambda text: printable(text, keep="\t")
    return environment


def _shown(value: Any) -> Any:
    """What a template prints: no control characters of logs and records."""
    return printable(value, keep="\n\t") if type(value) is str else value


def _chart(chart: Chart, identity: str) -> Markup:
    return svg(chart, identity)


def _data_uri(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _spans(table: Table) -> list[tuple[list[str], int]]:
    """The rows, each with how many from it on have the same first text; 0: it is one of those before it."""
    rows = table.rows[1:]
    if table.keys < 2:
        return [(row, 1) for row in rows]
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[0])]
    return [(row, 0 if index else len(group)) for group in groups for index, row in enumerate(group)]


def _in_script(text: str) -> Markup:
    """JSON that cannot end the element it stands in."""
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


MARKDOWN = {ord(character): f"\\{character}" for character in "\\`*_[]<>#|~!"}


def _escaped(text: str) -> str:
    """A text in Markdown: one line, no markup."""
    return printable(" ".join(text.split())).translate(MARKDOWN)


def _table(table: Table) -> str:
    rows = [[_escaped(text) for text in row] for row in table.rows]
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(table.rows[0]), *body])
