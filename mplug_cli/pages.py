"""Pictures as files and elements, and pages around them that need nothing from elsewhere."""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[Any]]
"""A head, then rows."""

Sections = list[tuple[str, list[tuple[str, Table]]]]
"""Headings, each with tables and their captions."""

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1250px;padding:0 1em;color:#222}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}svg{width:100%;height:auto}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #bbb}td{font-variant-numeric:tabular-nums}.legend{color:#666;font-size:.9em}"""


def png(figure: Figure) -> bytes:
    """A picture as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def svg(figure: Figure) -> str:
    """A picture as an SVG element to put into a page."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mplug"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def page(title: str, picture: str, sections: Sections) -> str:
    """A self-contained HTML page: ``picture``, an element, then the sections."""
    parts = [f"<h1>{escape(title)}</h1>", picture]
    for heading, tables in sections:
        parts.append(f"<h2>{escape(heading)}</h2>")
        for caption, table in tables:
            parts += [f"<p><b>{escape(caption)}</b></p>" if caption else "", _table(table)]
    return (
        f'<!DOCTYPE html>\n<html lang=en><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head, *rows = table
    cells = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
