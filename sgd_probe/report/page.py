"""What every page of ours is made of: one document, its sections, tables and figures.

A page loads nothing from a network and runs no script but its own; everything from a run is escaped.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from sgd_probe.report.figures import Figure
from sgd_probe.report.run_folder import RUN_FILE, WINDOWS_FILE
from sgd_probe.report.wording import VERDICT_STYLES
from sgd_probe.result import Verdict

#: Nothing may be fetched or sent: scripts and styles are in the page, images only as data.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
#: Zlib's best takes four times as long, at the end of the user's fit, and makes a page an eighth smaller.
_LEVEL = 1
_HEADING = re.compile(r'<section id="([a-z]+)"[^>]*><h2[^>]*>([^<]*)</h2>')


def write_page(page: str, target: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
        FileNotFoundError: there is no folder to write it to.
        ValueError: the target is a folder.
    """
    if target.is_dir():
        raise ValueError(
            f"expected a file to write the report to, found the folder {target}: add a file name"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"expected a folder for the report, found none at {target.parent}: create it or choose another"
        )
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def page(title: str, header: str, sections: Sequence[str], with_figures: bool) -> str:
    """A whole document: a header, a list of its sections, the sections, and what draws their figures.

    Args:
        title: of the window; escaped here.
        header: HTML.
        sections: HTML of each, as :func:`section` makes it; empty ones are left out.
        with_figures: some section has one.
    """
    scripts = f"{_plotly()}<script>{_asset('report.js')}</script>" if with_figures else ""
    links = "".join(
        f'<li><a href="#{name}">{title}</a></li>' for name, title in _HEADING.findall("".join(sections))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{_asset('report.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a>\n{header}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="content">\n'
        f"{''.join(sections)}</main>\n"
        f"<footer><p>Made from {RUN_FILE} and {WINDOWS_FILE}; "
        f"this page loads nothing from a network.</p></footer>\n{scripts}\n</body>\n</html>\n"
    )


@functools.cache
def _plotly() -> str:
    """Plotly's script, packed: it would be most of the page. The page's own script unpacks it."""
    from plotly.offline import get_plotlyjs

    packed = base64.b64encode(zlib.compress(get_plotlyjs().encode(), _LEVEL)).decode()
    return f'<script type="application/octet-stream" id="plotly">{packed}</script>'


def figure_section(figures: Sequence[Figure]) -> str:
    """Figures, each with how to read it."""
    script_note = "<noscript><p>The figures need JavaScript; the tables hold the same numbers.</p></noscript>"
    return section("figures", "Figures", script_note + "".join(map(_figure, figures)))


def _figure(figure: Figure) -> str:
    name = escape(figure.name)
    # In JSON "<" occurs inside strings only, where its escape means the same and cannot end the script.
    data = figure.drawing.to_json().replace("<", "\\u003c")
    return (
        f'<figure id="figure-{name}"><figcaption><h3>{escape(figure.title)}</h3>'
        f"<p><strong>How to read it.</strong> {escape(figure.how_to_read)}</p></figcaption>"
        f'<div class="plot" data-figure="{name}" role="img" '
        f'aria-label="{escape(f"{figure.title}. {figure.summary}")}"></div>'
        f'<script type="application/json" data-for="{name}">{data}</script></figure>\n'
    )


def section(name: str, title: str, body: str, css: str = "") -> str:
    """A part of the page under its heading; ``body`` is HTML already."""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" class="{css}" aria-labelledby="{name}-title">{heading}{body}</section>\n'


def table(caption: str, columns: Iterable[tuple[str, str]], body: str, name: str) -> str:
    """A table in a scrolling container that the keyboard can reach; ``body`` is HTML already."""
    head = "".join(f'<th scope="col">{title}{small(unit) if unit else ""}</th>' for title, unit in columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption">'
        f'<table class="{name}"><caption id="{name}-caption"><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def row(cells: Sequence[str]) -> str:
    """A table row under its own header; the cells are HTML already."""
    first, *rest = cells
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def verdict_mark(verdict: Verdict, count: int | None = None) -> str:
    """A verdict in colour and in words, with the number of its modes if given."""
    style = VERDICT_STYLES[verdict]
    many = "" if count is None else f' <span class="count">{count}</span>'
    swatch = f'<i style="background:{style.colour}"></i>'
    return f'<span class="verdict">{swatch}{escape(style.label)}{many}</span>'


def small(text: str) -> str:
    """A second line within a table cell."""
    return f"<small>{escape(text)}</small>"


def facts(values: Mapping[str, str]) -> str:
    """A list of named values; names and values are plain text."""
    items = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="facts-list">{items}</dl>'


def bullets(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _asset(name: str) -> str:
    return (files("sgd_probe.report") / name).read_text(encoding="utf-8")
