"""The page's script: the libraries that it embeds, our own beside this file, and the data, so that nothing is loaded.

Vega, for the figures, comes from vl-convert-python; DataTables, for sorting, filtering and copying tables, from
itables. Both are inside the page, which makes no request at all. They and the data are compressed, which makes the page
half as large, and unpacked by the browser when they are needed.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from importlib import resources
from typing import Any

import vl_convert

OWN = ("packed.js", "tables.js", "figures.js", "runs.js", "explore.js")  # one module together, in this order


@functools.cache
def style() -> str:
    """The CSS of what the script makes."""
    return _asset("explore.css")


def scripts(data: dict[str, Any] | None) -> str:
    """The end of the page's body: without `data` the tables can be sorted, with it there are figures and runs, too."""
    parts = {"tables-library": _tables()}
    if data is not None:
        compact = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        parts |= {"figures-library": _figures(), "explore-data": _packed(compact)}
    elements = [f'<script type="text/plain" id="{name}">{text}</script>' for name, text in parts.items()]
    own = "\n".join(map(_asset, OWN))
    return "\n".join([*elements, f'<script type="module">\n{own}</script>'])


@functools.cache
def _figures() -> str:
    """Vega, Vega-Lite and vega-embed as one module, which leaves `vegaEmbed` at the window."""
    return _packed(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@functools.cache
def _tables() -> str:
    """DataTables as a module; its default export is the class."""
    return _packed(resources.files("itables").joinpath("html", "dt_bundle.js").read_text(encoding="utf-8"))


@functools.cache
def _asset(name: str) -> str:
    return resources.files("analysis.page").joinpath("assets", name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    """zlib's format in base64: nothing in it can end or open an element."""
    return base64.b64encode(zlib.compress(text.encode())).decode("ascii")
