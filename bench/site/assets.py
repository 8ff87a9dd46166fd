"""What a page loads beside itself: libraries that draw and sort, taken from installed packages, and our own files."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import distribution, files, version
from importlib.resources import files as resources

_EXPORTS = re.compile(r"\bexport\s*\{([^{}]*)\};?")
_DEFAULT = re.compile(r"([\w$]+) as default\b")
_LICENCE = re.compile(r"LICEN[CS]E|NOTICE")


def static() -> dict[str, bytes]:
    """Give the files that all pages share, by their names in the site."""
    here = resources("bench.site") / "static"
    own = {f"static/{entry.name}": entry.read_bytes() for entry in here.iterdir() if entry.is_file()}
    libraries = {"static/vega.js": _vega(), "static/datatables.js": _datatables(), "static/licences.txt": _licences()}
    return {**own, **{name: text.encode() for name, text in libraries.items()}}


@cache
def _vega() -> str:
    """Take Vega, Vega-Lite and Vega-Embed, one script that defines `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


@cache
def _datatables() -> str:
    """Take DataTables, a module, and make it a script that defines `DataTable`.

    A page that was opened as a file may not load modules.

    Raises:
        RuntimeError: The module is not built as it was in the versions known to us.
    """
    module = (resources("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8")
    exports = _EXPORTS.findall(module)
    default = _DEFAULT.findall(exports[0]) if len(exports) == 1 else []
    if len(default) != 1:
        raise RuntimeError(
            f"itables {version('itables')} does not hold DataTables as a module with one default export; "
            "install the version in constraints.txt"
        )
    body = _EXPORTS.sub(lambda _: f"window.DataTable={default[0]};", module)
    return f"(()=>{{{body}\n}})();\n"


@cache
def _licences() -> str:
    """Say whose libraries the site carries, with the licences that their packages ship."""
    parts = [
        "This site carries Vega, Vega-Lite and Vega-Embed (BSD-3-Clause, see vega-licence.txt) as packed in",
        "vl-convert-python, and DataTables (MIT) with jQuery (MIT) as packed in itables; notices of their own stand in",
        "the files. The licences of the two packages:",
    ]
    for package in ("vl-convert-python", "itables"):
        parts += ["", f"== {distribution(package).metadata['Name']} {version(package)} ==", ""]
        known = sorted(entry for entry in files(package) or () if _LICENCE.search(entry.name))
        parts += [entry.read_text().rstrip() for entry in known]
    return "\n".join(parts) + "\n"
