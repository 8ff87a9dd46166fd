"""Import home of the `algorithms/` folder: beside this package in a checkout, inside it once installed."""

from pathlib import Path

_checkout = Path(__file__).parents[2]
if (_checkout / "pyproject.toml").is_file():
    __path__ = [str(_checkout / "algorithms")]
