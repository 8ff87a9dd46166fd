"""Where a number comes from: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import bench

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn")
_CHECKOUT = Path(__file__).parents[2]


@cache
def versions() -> dict[str, str]:
    """Give the versions of this package, of Python, and of the installed libraries that numbers depend on."""
    found = {"bench": bench.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def hardware(device: str) -> dict[str, str | int | None]:
    """Give the processor, its cores, and the GPU if one computes."""
    return {
        "machine": platform.machine(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


@cache
def commit() -> str | None:
    """Give the commit of the checkout this package comes from, with `-dirty` where code differs from it.

    None for an installed package, without git, and before the first commit.
    """
    if not (_CHECKOUT / ".git").exists():
        return None
    head = _git("rev-parse", "--verify", "HEAD")
    if head is None:
        return None
    changes = _git("status", "--porcelain", "--", "bench", "algorithms", "datasets")
    return f"{head}-dirty" if changes else head


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], cwd=_CHECKOUT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _processor() -> str | None:
    """Give the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
