"""`algorithms/` and `datasets/` live beside other packages of those names: in a checkout, a wheel, a Ray worker."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).parents[1]

BOTH = """
import datasets
import importlib
assert hasattr(datasets, "load_dataset"), datasets.__path__
assert importlib.import_module("bench.datasets.digits").Digits.num_classes == 10
"""


def python(code: str, where: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=where,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_plugin_folders_are_no_packages() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not (ROOT / "algorithms" / "__init__.py").exists()


def test_hugging_faces_datasets_and_ours_import_from_the_repository_root() -> None:
    python(BOTH)


def test_hugging_faces_datasets_and_ours_import_inside_a_ray_task() -> None:
    # Ray appends the driver's working directory, here the repository root, to the path of its workers.
    python(
        f"""
        import ray
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

        @ray.remote
        def both():
            exec({BOTH!r})
            return "ok"

        assert ray.get(both.remote()) == "ok"
        ray.shutdown()
        """,
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )


def test_a_wheel_holds_one_top_level_package_with_the_plugins_inside(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bench"}
    assert {"bench/algorithms/fedloge.py", "bench/datasets/cifar10.py", "bench/parts/focal.py"} <= set(names)
    assert "bench/py.typed" in names
    assert {"bench/site/templates/index.html", "bench/site/static/site.js"} <= set(names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
        import sys
        from bench.plugins.registry import ALGORITHMS, DATASETS
        assert ALGORITHMS["fedrep"].__module__ == "bench.algorithms.fedrep"
        assert "digits" in list(DATASETS)
        print(sys.modules["bench.algorithms.fedrep"].__file__)
    """
    where = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "site/bench/algorithms/fedrep.py" in where


def test_every_dependency_has_a_lower_bound() -> None:
    needed = [line for line in requires("pfl-lt-bench") or [] if "extra ==" not in line]
    assert len(needed) >= 12
    assert all(">=" in line for line in needed)
