"""Who may import whom: imports only go down, heavy libraries have one home each, no global randomness."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    # what needs nothing of ours
    0: "system plugins tree keys bits sparse ranges dataset",
    # one batch, one client, one model: what an algorithm's author reads
    1: "data losses models federated_features optim attacks task part algorithm",
    # from files to labels; what a comparison holds equal; from labels to clients
    2: "files protocol splits",
    # one run
    3: "training contract",
    # many runs, and what they leave
    4: "results sweep preparing tuning validation tracking speed",
    # what people type and see
    5: "site face command",
}
"""A file or folder of `bench/` imports from floors below; on its own floor only what stands before it in the line."""

ORDER = [module for line in FLOORS.values() for module in line.split()]
PLUGINS = {"algorithms": ROOT / "algorithms", "datasets": ROOT / "datasets", "parts": ROOT / "bench" / "parts"}
"""Folders of plug-ins, each imported as `bench.NAME`."""
HOMES = {
    "ray": "sweep tuning",
    "mlflow": "tracking",
    "optuna": "tuning",
    "click": "command",
    "rich": "face command results",
    "matplotlib": "face command",
    "scikit_posthocs": "face results",
    "PIL": "files",
    "jinja2": "site",
    "markdown_it": "site",
    "vl_convert": "site",
    "timm": "preparing",
}
"""Third parties with one home each."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every file of `bench/` and its place: the module's name, or its package's."""
    for file in sorted((ROOT / "bench").rglob("*.py")):
        place = file.relative_to(ROOT / "bench").parts[0].removesuffix(".py")
        if place not in ("__init__", "__main__", *PLUGINS):
            yield place, file


def imports(file: Path) -> set[str]:
    """Dotted names a file imports when it runs, inside functions too; those for type checkers only are left out."""
    tree = ast.parse(file.read_text())
    ignored = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("bench.")} & set(ORDER)


def test_every_file_has_a_place() -> None:
    assert sorted({place for place, _ in modules()}) == sorted(ORDER)


@pytest.mark.parametrize("file", [file for _, file in modules()], ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_go_down(file: Path) -> None:
    place = next(place for place, known in modules() if known == file)
    above = {used for used in ours(imports(file)) if ORDER.index(used) > ORDER.index(place)}
    assert not above, f"{place} imports {', '.join(sorted(above))}, which stand above it"


def test_heavy_libraries_have_one_home() -> None:
    for place, file in modules():
        for name in imports(file):
            home = HOMES.get(name.split(".")[0])
            assert home is None or place in home.split(), f"{file.name} imports {name}"


def test_bench_never_names_a_plugin() -> None:
    plugins = {file.stem for folder in PLUGINS.values() for file in folder.glob("*.py")}
    for _, file in modules():
        for name in imports(file):
            assert not re.match(r"bench\.(algorithms|datasets|parts)\.", name), f"{file.name} imports {name}"
    core = [file for place, file in modules() if ORDER.index(place) <= ORDER.index("training")]
    for file in core:
        strings = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        # also settings, partitions, whose prior, and plain words
        allowed = {"fedloge", "creff", "gbme", "redgrape", "airbench", "arrays", "features", "folder", "local"}
        assert not (strings & plugins) - allowed, f"{file.name} names {strings & plugins}"


@pytest.mark.parametrize("folder", PLUGINS)
def test_plugins_never_import_each_other(folder: str) -> None:
    for file in PLUGINS[folder].glob("*.py"):
        for name in imports(file):
            assert not re.match(r"bench\.(algorithms|datasets|parts)\b", name), f"{file.name} imports {name}"
            place = name.split(".")[1] if name.startswith("bench.") else ""
            assert place not in ORDER or ORDER.index(place) <= ORDER.index("files"), f"{file.name} imports {name}"


def test_nothing_draws_from_a_global_generator() -> None:
    forbidden = re.compile(r"torch\.manual_seed|np\.random\.(?!RandomState|Generator|default_rng)\w+\(|random\.seed\(")
    for folder in ("bench", "algorithms", "datasets"):
        for file in (ROOT / folder).rglob("*.py"):
            found = forbidden.search(file.read_text())
            assert found is None, f"{file.name}: {found and found[0]}"


def test_the_help_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys; sys.argv = ['bench', '--help']\nfrom bench.command.main import main\ntry: main()\nfinally: " + (
        "print([m for m in ('torch', 'ray', 'mlflow', 'pandas', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]", done.stderr


def test_reading_stored_results_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys, bench.command.main as m\ntry: m.main(['table', 'results'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
