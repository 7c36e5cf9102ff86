"""The page's script: the libraries that it embeds, our own beside this file, and the data, so that nothing is loaded.

Vega, for the figures, comes from vl-convert-python; DataTables, for sorting, filtering and copying tables, from
itables. Both are inside the page, which makes no request at all.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

import vl_convert

OWN = ("tables.js", "figures.js", "runs.js", "explore.js")  # one module together, in this order


@functools.cache
def style() -> str:
    """The CSS of what the script makes."""
    return _asset("explore.css")


def scripts(data: dict[str, Any] | None) -> str:
    """The end of the page's body: without `data` the tables can be sorted, with it there are figures and runs, too."""
    libraries = [_embedded("text/plain", _tables(), "tables-library")]
    if data is not None:
        libraries += [_embedded("module", _vega()), _embedded("application/json", as_json(data), "explore-data")]
    return "\n".join([*libraries, _embedded("module", "".join(map(_asset, OWN)))])


def as_json(data: dict[str, Any]) -> str:
    """Compact, and with nothing in it that could end or open an element. NaN is a ValueError."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one module, which leaves `vegaEmbed` at the window."""
    return str(vl_convert.javascript_bundle())


@functools.cache
def _tables() -> str:
    """DataTables as a module; its default export is the class."""
    return resources.files("itables").joinpath("html", "dt_bundle.js").read_text(encoding="utf-8")


@functools.cache
def _asset(name: str) -> str:
    return resources.files("analysis.page").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(kind: str, text: str, identity: str = "") -> str:
    """A script element. `<!--`, `<script` and `</script` would hide or end the rest of the page; in strings and regular
    expressions, where alone they can stand, `\\x3c` is the same.
    """
    named = f' id="{identity}"' if identity else ""
    safe = re.sub("<(?=!--|/?script)", r"\\x3c", text, flags=re.IGNORECASE)
    return f'<script type="{kind}"{named}>{safe}</script>'
