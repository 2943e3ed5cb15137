"""One HTML file that needs nothing else: no script, no font, no picture from anywhere; light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.viz.svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { --paper: #fff; --ink: #1f2328; --faint: #59636e; --grid: #d1d9e0; --card: #f6f8fa; --line: #d1d9e0;
  --accent: #0969da; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --grid: #3d444d;
  --card: #151b23; --line: #3d444d; --accent: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; }
.lead { color: var(--faint); margin: 0 0 1.5rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: .35rem solid var(--accent);
  border-radius: .5rem; padding: 1rem 1.25rem; margin: 1.25rem 0; }
.verdict strong { font-size: 1.2rem; display: block; }
.verdict p { margin: .4rem 0 0; }
.warning { border-left-color: #bf8700; }
figure { margin: 1.75rem 0 2.25rem; }
figure h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
figure svg { width: 100%; height: auto; display: block; fill: var(--ink); }
figcaption { color: var(--faint); font-size: .93rem; margin-top: .4rem; max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .4rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.3; }
td small { display: block; color: var(--faint); }
.facts td { white-space: normal; text-align: left; }
.facts td:first-child { color: var(--faint); padding-right: 1.5rem; white-space: nowrap; vertical-align: top; }
.tag { font-size: .75rem; font-weight: 600; border: 1px solid var(--line); border-radius: 1rem; color: var(--faint);
  padding: .05rem .55rem; margin-left: .5rem; vertical-align: middle; white-space: nowrap; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; max-width: 48rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
  overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
code { font-size: .9em; }
"""


class Shown(NamedTuple):
    """A figure on the page.

    source: what its numbers are: measured, modelled; caption: what to see in it
    """

    name: str
    title: str
    source: str
    caption: str
    figure: Figure


def page(title: str, body: Sequence[str]) -> str:
    """The whole file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def shown(each: Shown) -> str:
    """A figure with its title, where its numbers are from, and its caption."""
    label = escape(f"{each.title}. {each.caption}", quote=True)
    return (
        f'<figure role="group" aria-label="{label}" id="{each.name}">'
        f'<h3>{escape(each.title)}<span class="tag">{escape(each.source)}</span></h3>'
        f"{inline_svg(each.figure, each.name)}<figcaption>{escape(each.caption)}</figcaption></figure>"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns."""
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already."""
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def verdict(strong: str, paragraphs: Sequence[str], warning: bool = False) -> str:
    """A box."""
    text = "".join(f"<p>{escape(each)}</p>" for each in paragraphs)
    return (
        f'<div class="verdict{" warning" if warning else ""}"><strong>{escape(strong)}</strong>{text}</div>'
    )


def items(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
