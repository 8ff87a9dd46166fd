"""A validation part of the clients' own training images: what hyper-parameters may be chosen on.

Each client sets some of its training images aside. Models are trained on the rest and tested on these, and the official
test part is not there at all: it can neither be trained on nor be selected by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.dataset import Labels, Splits, Streamed
from bench.protocol.settings import BadConfig, Setting
from bench.splits.dealing import PartitionFailed, reseed
from bench.splits.longtail import Rows, by_class
from bench.splits.split import Split, make_split


def without_test(labels: Labels) -> Labels:
    """Take the official test part out of labels."""
    return replace(labels, test=labels.test[:0], test_users=None)


def set_aside(labels: Labels, num_classes: int, setting: Setting, seed: int, share: float) -> Split:
    """Split the clients of a run into what is trained on and what models are chosen on.

    The clients are those of `make_split`, without those held out of training. Each orders its images by class, at
    random within a class, and every 1/`share`-th is set aside, from a random start on: of a class with n images
    ⌊n · share⌋ or ⌈n · share⌉. An image that is the only one of its class at its client is never set aside, as no test
    image of a client is of a class that it has not trained on. Clients with too few images train on all of them, and
    are not tested. Of a class that nobody set an image aside of, one is taken at the client that has most of them:
    otherwise what is chosen would not be chosen for the tail.

    Args:
        labels: Of the official training part; the test part is not looked at.
        num_classes: C.
        setting: As of `make_split`; its `unseen` clients take no part.
        seed: Of the run; what is set aside follows the setting's `split_seed`, as the partition does.
        share: In (0, 0.5].

    Returns:
        `clients` are the rows trained on, `tests` those set aside, both of the official *training* part, and
        `class_counts` are of what is trained on.

    Raises:
        BadConfig: The share is out of range.
        PartitionFailed: As of `make_split`, or no client has two images of one class.
    """
    if not 0 < share <= 0.5:
        raise BadConfig(f"--validation {share:g}: a share of the training images in (0, 0.5] is wanted, such as 0.2")
    dealt = make_split(without_test(labels), num_classes, replace(setting, client_test="matched"), seed)
    truth = labels.train.numpy()
    seed = setting.seed_of_split(seed)
    random = np.random.RandomState(0)
    parts = dealt.clients[: setting.training_clients(len(dealt.clients))]
    drawn = []
    for k, rows in enumerate(parts):
        reseed(random, seed, "validation", k)
        drawn.append(_every_so_often(truth[rows.numpy()], share, random))
    owners, taken = np.arange(len(parts)).repeat([len(rows) for rows in parts]), np.concatenate(drawn)
    for each, places in enumerate(by_class(truth[torch.cat(parts).numpy()], num_classes)):
        held = np.bincount(owners[places], minlength=1)
        if held.max() > 1 and not taken[places].any():
            reseed(random, seed, "validation of class", each)
            taken[random.choice(places[owners[places] == held.argmax()])] = True
    if not taken.any():
        raise PartitionFailed(
            f"--validation {share:g}: no client can set an image aside, as none has two of one class; use fewer clients"
        )
    aside = torch.from_numpy(taken).split([len(rows) for rows in parts])
    clients = tuple(rows[~mine] for rows, mine in zip(parts, aside, strict=True))
    tests = tuple(rows[mine] for rows, mine in zip(parts, aside, strict=True))
    kept = np.bincount(truth[torch.cat(clients).numpy()], minlength=num_classes)
    return Split(torch.from_numpy(kept), clients, tests, dealt.fingerprint)


def without_validation(labels: Labels, split: Split) -> list[int]:
    """Give the classes that are trained on and of which no image is set aside, as no client has two.

    Args:
        labels: As of `set_aside`.
        split: Of `set_aside`.
    """
    seen = torch.bincount(labels.train[torch.cat(split.tests)], minlength=len(split.class_counts))
    return torch.nonzero((split.class_counts > 0) & (seen == 0)).flatten().tolist()


def _every_so_often(truth: Rows, share: float, random: np.random.RandomState) -> npt.NDArray[np.bool_]:
    """Choose images of one client, given its labels: (n,) bool."""
    shuffled = random.permutation(len(truth))
    order = shuffled[np.argsort(truth[shuffled], kind="stable")]
    ticks = np.floor(random.uniform() + share * np.arange(len(truth) + 1))
    taken = np.zeros(len(truth), dtype=bool)
    taken[order] = np.diff(ticks) > 0
    _, group, sizes = np.unique(truth, return_inverse=True, return_counts=True)
    return taken & (sizes[group] > 1)


def view(splits: Splits, split: Split) -> tuple[Splits, Split]:
    """Put the images set aside in the place of the official test part.

    Args:
        splits: The official images; only the training part is used.
        split: Of `set_aside`.

    Returns:
        Images whose test part is what was set aside, and the split with `tests` numbered within it.
    """
    rows = torch.cat(split.tests)
    places = rows if splits.held is None else torch.searchsorted(splits.held, rows)
    whole = splits.train_x
    chosen = whole[places] if isinstance(whole, Tensor) else _Rows(whole, places)
    ends = np.cumsum([len(test) for test in split.tests])
    tests = tuple(torch.arange(end - len(test), end) for end, test in zip(ends.tolist(), split.tests, strict=True))
    seen = Splits(whole, splits.train_y, chosen, splits.train_y[rows], splits.users, held=splits.held)
    return seen, replace(split, tests=tests)


@dataclass(frozen=True)
class _Rows:
    """Some images of a file, as if they were all."""

    whole: Streamed
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.whole.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.whole[self.rows[rows.cpu()]]

    def prefetch(self, rows: Tensor) -> None:
        self.whole.prefetch(self.rows[rows.cpu()])
