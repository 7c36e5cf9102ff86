"""HTML of a report page: escaped text, tables, figures, folded parts; one file that needs
nothing else.

Every string that comes from a run folder goes through `escape` here. The page loads nothing, can be read without its
script, and wide tables scroll in their own box, so the page itself never scrolls sideways.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.figures.saving import Drawing

LONG_TABLE = 30  # rows beyond which a table scrolls in its own box on a screen (never on paper)

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --faint: #e6e9ec;
  --group: #aab2ba; --link: #0b5cad; --code: #f6f8fa; --warn: #d55e00; --warned: #fdf3ec; --answer: #eef5fb;
  --accent: #0173b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --soft: #a2abb5; --line: #3a424a;
  --faint: #2a3036; --group: #56606a; --link: #7db7f0; --code: #1d2126; --warn: #f0924e; --warned: #33241a;
  --answer: #16242f; --accent: #4aa3df; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem 1.5rem 4rem; max-width: 1108px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; max-width: 62ch; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 2px solid var(--ink); }
h2.small { font-size: 1.15rem; margin: 1rem 0 .3rem; padding: 0; border: 0; }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
p, ul, dl, figcaption { max-width: 96ch; margin: .5rem 0; }
ul { padding-left: 1.3rem; } li { margin: .3rem 0; }
.meta, figcaption, .note { color: var(--soft); font-size: .875rem; }
.eyebrow { margin: 0 0 .2rem; }
.answer { font-size: 1.15rem; line-height: 1.5; margin: 1rem 0; padding: .7rem 1.1rem; background: var(--answer);
  border-left: 4px solid var(--accent); }
.answer p { margin: .35rem 0; }
.warn { border-left: 4px solid var(--warn); padding: .4rem .9rem; background: var(--warned); }
nav { margin: 1rem 0; font-size: .92rem; } nav a { margin-right: 1.1rem; display: inline-block; padding: .2rem 0; }
a { color: var(--link); }
.box { overflow-x: auto; margin: .6rem 0 .3rem; max-width: 100%; }
.long { max-height: 44rem; overflow-y: auto; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1.5px solid var(--ink); font-weight: 600; position: sticky; top: 0; background: var(--paper);
  vertical-align: bottom; white-space: normal; }
td { border-bottom: 1px solid var(--faint); } tr.new > td { border-top: 1.5px solid var(--group); }
.number { text-align: right; } .best { font-weight: 700; }
.wrap { white-space: normal; min-width: 16rem; max-width: 44rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; height: auto; max-width: 100%; }
@media (prefers-color-scheme: dark) { figure picture { display: block; width: fit-content; max-width: 100%;
  padding: .6rem; background: #fff; border-radius: 6px; } }
code, pre { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .84rem; }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--code); border: 1px solid var(--line); line-height: 1.4;
  overflow-wrap: normal; }
p code, li code { background: var(--code); padding: .05rem .25rem; border-radius: 3px; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; max-width: 96ch; }
.open summary { font-weight: 400; }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: .1rem 0 0; }
@media (max-width: 700px) { body { padding: 1rem .9rem 3rem; } h1 { font-size: 1.5rem; } .answer { font-size: 1.05rem; }
  figure img { width: 100%; } td, th { padding: .3rem .4rem; } .wrap { min-width: 12rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --faint: #ddd;
    --group: #999; --link: #000; --code: #fff; --warn: #000; --warned: #fff; --answer: #fff; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; }
  .box, .long { overflow: visible; max-height: none; border: 0; } th { position: static; }
  th, td { white-space: normal; padding: .15rem .35rem; font-size: 8pt; } .wrap { min-width: 0; }
  figure picture { padding: 0; }
  pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""
NARROW = "(max-width: 700px)"  # screens that get the figures drawn for a phone


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, what the heading means, and one text a row."""

    heading: str
    texts: Sequence[str]
    number: bool = False
    wrap: bool = False
    anchors: Sequence[str] = ()  # where given, a cell is a link to itself under this name


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def paragraph(text: str, style: str = "") -> str:
    return f"<p{_style(style)}>{escape(text)}</p>"


def prose(text: str, style: str = "") -> str:
    """A paragraph in which `code` and **what matters** are marked as in Markdown."""
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", coded)
    return f"<p{_style(style)}>{strong}</p>"


def answer(sentences: Iterable[str]) -> str:
    """The sentences of the first screen, in a box of their own."""
    return '<div class="answer">' + "".join(map(prose, sentences)) + "</div>"


def bullets(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def heading(level: int, text: str, anchor: str = "", style: str = "") -> str:
    identity = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{identity}{_style(style)}>{escape(text)}</h{level}>"


def table(columns: Sequence[Column], best: Sequence[bool] = (), new: Sequence[bool] = ()) -> str:
    """The columns side by side in a box of their own; `best` rows are bold, `new` rows start a group."""
    length = len(columns[0].texts)
    head = "".join(f"<th{_classes(column)}>{escape(column.heading)}</th>" for column in columns)
    rows = []
    for index in range(length):
        cells = "".join(f"<td{_classes(column)}>{_cell(column, index)}</td>" for column in columns)
        marks = [name for name, flags in (("best", best), ("new", new)) if flags and flags[index]]
        rows.append(f"<tr{_style(' '.join(marks))}>{cells}</tr>")
    style = "box long" if length > LONG_TABLE else "box"
    return f'<div class="{style}"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(column: Column, index: int) -> str:
    text = escape(column.texts[index])
    if not column.anchors:
        return text
    anchor = escape(column.anchors[index])
    return f'<a id="{anchor}" href="#{anchor}">{text}</a>'


def figure(drawing: Drawing) -> str:
    """The figure, as it is drawn for a narrow screen on one."""
    text = escape(f"{drawing.title}. {drawing.caption}")
    return (
        f'<figure><picture><source media="{NARROW}" srcset="{_data(drawing.narrow)}">'
        f'<img alt="{text}" src="{_data(drawing.svg)}"></picture>'
        f"<figcaption><b>{escape(drawing.title)}.</b> {escape(drawing.caption)}</figcaption></figure>"
    )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def folded(summary: str, content: str, style: str = "") -> str:
    return f"<details{_style(style)}><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in entries) + "</dl>"


def contents(entries: Iterable[tuple[str, str]]) -> str:
    return "<nav>" + "".join(f'<a href="#{escape(anchor)}">{escape(text)}</a>' for anchor, text in entries) + "</nav>"


def document(title: str, body: Iterable[str], style: str = "", end: str = "") -> str:
    """The whole page. `body` is HTML made by the functions above, `end` the scripts, `style` the CSS of theirs."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n{end}</body>\n</html>\n"
    )


def _classes(column: Column) -> str:
    return _style(" ".join(name for name, on in (("number", column.number), ("wrap", column.wrap)) if on))


def _style(names: str) -> str:
    return f' class="{names}"' if names else ""
