"""How much memory a process took at its highest."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak_memory(device: str) -> None:
    """Start to measure peak memory anew, where the system allows it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if device != "cpu":
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory(device: str) -> float | None:
    """Give the largest resident memory of this process (CPU) or of its tensors on the GPU, in bytes; None on
    Apple's, where torch counts none.
    """
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    if device == "mps":
        return None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        try:
            import resource
        except ImportError:  # Windows
            return None
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
