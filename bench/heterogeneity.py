"""How different the clients of a split are, in numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from bench.longtail import Rows


def measure(histograms: Rows) -> dict[str, float]:
    """Measure the skew of labels and of sizes.

    Args:
        histograms: (K, C) training images of each class at each client; at least one image.

    Returns:
        Means over the clients that have images:

        * classes_per_client: classes with at least one image;
        * total_variation: between the client's and the global label distribution, 0-1;
        * jensen_shannon: divergence between the same two, in bits, 0-1;

        and over all clients:

        * size_min, size_median, size_max: images of a client;
        * size_gini: Gini coefficient of the sizes, 0 (equal) to 1 - 1/K;
        * effective_clients: (Σ n_k)² / Σ n_k², which is K for equal sizes.

    Source: Jensen-Shannon divergence Lin 1991, https://doi.org/10.1109/18.61115; effective number Kish 1965,
    "Survey sampling".
    """
    sizes = histograms.sum(1)
    present = histograms[sizes > 0]
    local = present / present.sum(1, keepdims=True)  # (clients with images, C)
    overall = histograms.sum(0) / sizes.sum()
    divergence = _bits((local + overall) / 2) - (_bits(local) + _bits(overall)) / 2
    return {
        "classes_per_client": float((present > 0).sum(1).mean()),
        "total_variation": float(np.abs(local - overall).sum(1).mean() / 2),
        "jensen_shannon": float(divergence.mean()),
        "size_min": float(sizes.min()),
        "size_median": float(np.median(sizes)),
        "size_max": float(sizes.max()),
        "size_gini": gini(sizes),
        "effective_clients": float(sizes.sum() ** 2 / (sizes**2).sum()),
    }


def gini(sizes: Rows) -> float:
    """Give the Gini coefficient of (K,) sizes: half the mean difference of two clients over the mean size."""
    rank = np.arange(1, len(sizes) + 1)
    return float(((2 * rank - len(sizes) - 1) * np.sort(sizes)).sum() / (len(sizes) * sizes.sum()))


def _bits(distributions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give the entropy along the last axis."""
    return np.asarray(entr(distributions).sum(-1) / np.log(2.0))
