"""Features made once: every image goes through a body that is not trained, into a store that `features` reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.dataset import DataMissing, Dataset, Splits, Streamed
from bench.files.prepared import PARTS, Chunk, Plan, Store, Stored, find
from bench.files.unfinished import writing
from bench.models.weights import BadWeights
from bench.plugins.registry import label, name
from bench.preparing.encoders import Encoder, encoder
from bench.preparing.preparation import Progress
from bench.protocol.identity import identify
from bench.sweep.run import describe_plugin

CHUNK = 256
"""Images between two savings: what is lost at most when an embedding is killed."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Whose features, and by which body: in evaluation mode, without augmentation, rounded to float16."""

    dataset: Dataset
    model: str
    """Name in `bench.models.MODELS`, or of a network in timm."""
    norm: str
    """"group", "layer" or "batch", of a network of ours."""
    weights: Path | None
    """File of the body's weights; None: random ones of a network of ours, always the same; of timm's those found."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    pixels: int | None = None
    """That images are scaled to for a network of timm's; None: what it was trained with."""

    @cached_property
    def encoder(self) -> Encoder:
        """What makes features."""
        return encoder(self.dataset, self.model, self.norm, self.weights, self.pixels, self.device)

    def make(self, root: Path, progress: Progress, batch_size: int = 64) -> Store:
        """Make the store below `root`, go on with one that was begun, or open one that is complete.

        Args:
            root: The data root.
            progress: Told how far it is.
            batch_size: Images that go through the body at once, at most `CHUNK`.

        Raises:
            BadModel, BadWeights: The body cannot be made. DataMissing, DataDamaged: The images cannot be read.
            StoreUnwritable: The store cannot be written.
        """
        splits = self.dataset.load(root)
        self.encoder.load()
        if splits.held is not None:
            call = label(self.dataset)
            raise DataMissing(f"{call}: {root} holds a part of the training images only; name a --data-root with all")
        plan = self.plan(splits)
        folder = root / "prepared" / f"{name(self.dataset)}-{self.model}-{plan.listing[:8]}"
        store = find(folder)
        if store is not None and store.listing == plan.listing:
            return store
        self.dataset.verify(root)
        with writing(folder, plan, progress.say) as unfinished:
            todo = unfinished.todo()
            total, left = plan.train + plan.test, sum(map(len, todo))
            progress.begin(f"features of {label(self.dataset)}", total, total - left)
            for chunk, following in zip(todo, [*todo[1:], None], strict=True):
                if following is not None:
                    _prefetch(splits, following)
                unfinished.write(chunk, self._features(splits, chunk, batch_size).numpy())
                progress.advance(len(chunk))
            return unfinished.finish(splits.labels)

    def plan(self, splits: Splits) -> Plan:
        """Say what the store is to hold."""
        columns = {key: column for key, column in vars(splits.labels).items() if column is not None}
        made_of: dict[str, Any] = {
            "dataset": describe_plugin(self.dataset),
            "images": splits.train_x.index if isinstance(splits.train_x, Stored) else None,
            "labels": tree.digest([columns]),
            **self.encoder.described(),
        }
        return Plan(
            listing=identify(made_of),
            shape=(self.encoder.feature_size, 1, 1),
            train=len(splits.train_y),
            test=len(splits.test_y),
            dtype="float16",
            chunk=CHUNK,
            made_by={
                "dataset": label(self.dataset),
                "classes": str(self.dataset.num_classes),
                "model": self.model,
                "norm": self.norm,
                "weights": self.encoder.weights_digest,
                "torch": torch.__version__,
                "device": self.device,
            },
        )

    def _features(self, splits: Splits, chunk: Chunk, batch_size: int) -> Tensor:
        """Give (n, 1, 1, d) float16, on the CPU."""
        x = _part(splits, chunk.part)
        made = []
        for rows in torch.arange(chunk.start, chunk.stop).split(batch_size):
            with torch.inference_mode():
                made.append(self.encoder.features(x[rows]).to(torch.float16).cpu())
        features = torch.cat(made)
        wrong = ~features.isfinite().all(1)
        if wrong.any():
            row = chunk.start + int(wrong.nonzero()[0])
            what = f"the features of image {row:,} of the {chunk.part} part are not finite in float16"
            raise BadWeights(f"{what}; these weights do not suit {label(self.dataset)}, choose others")
        return features[:, None, None]


def _part(splits: Splits, part: str) -> Tensor | Streamed:
    return splits.train_x if part == PARTS[0] else splits.test_x


def _prefetch(splits: Splits, chunk: Chunk) -> None:
    x = _part(splits, chunk.part)
    if not isinstance(x, Tensor):
        x.prefetch(torch.arange(chunk.start, chunk.stop))
