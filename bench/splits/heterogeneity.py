"""How different the clients of a split are, in numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import entr

from bench.splits.longtail import Rows

Numbers = npt.NDArray[np.float64]


def measure(histograms: csr_array | Rows) -> dict[str, float]:
    """Measure the skew of labels and of sizes, in time that the non-empty cells take.

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
    table = csr_array(histograms)
    table.eliminate_zeros()
    sizes = np.asarray(table.sum(1))
    present = sizes > 0
    client, label = np.arange(len(sizes)).repeat(np.diff(table.indptr)), table.indices
    overall = np.asarray(table.sum(0)) / sizes.sum()  # (C,)
    local, here = table.data / sizes[client], overall[label]  # (cells,)

    def over_clients(cells: Numbers) -> Numbers:
        return np.asarray(np.bincount(client, weights=cells, minlength=len(sizes))[present], dtype=np.float64)

    # Where a client has no image of a class, only the global share counts: all classes' part, less the cells'.
    apart = over_clients(np.abs(local - here) - here) + overall.sum()
    mixed = over_clients(entr((local + here) / 2) - entr(here / 2)) + entr(overall / 2).sum()
    divergence = (mixed - (over_clients(entr(local)) + entr(overall).sum()) / 2) / np.log(2.0)
    return {
        "classes_per_client": float(len(client) / present.sum()),
        "total_variation": float(apart.mean() / 2),
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
