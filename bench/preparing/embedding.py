"""Features made once: every image goes through a body that is not trained, into a store that `features` reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import keys, tree
from bench.data import Images
from bench.dataset import DataMissing, Dataset, Splits, Streamed
from bench.files.prepared import PARTS, Chunk, Plan, Store, Stored, find
from bench.files.unfinished import writing
from bench.models import BUILT_IN, Model, build, weights
from bench.plugins.registry import label, name
from bench.preparing.preparation import Progress
from bench.protocol.identity import identify
from bench.sweep.config import describe_model, describe_plugin
from bench.tree import Tree

CHUNK = 256
"""Images between two savings: what is lost at most when an embedding is killed."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Whose features, and by which body: in evaluation mode, without augmentation, rounded to float16."""

    dataset: Dataset
    model: str
    """Name in `bench.models.MODELS`."""
    norm: str
    """"group" or "batch"."""
    weights: Path | None
    """File of the body's weights; None: random ones, always the same."""
    device: str = "cpu"
    """"cpu" or "cuda"."""

    @cached_property
    def network(self) -> Model:
        """The model whose body is used.

        Raises:
            BadModel: There is none of that name, or images are too small for it.
        """
        return build(self.model, self.dataset.num_classes, self.dataset.image_shape, self.norm)

    @cached_property
    def body(self) -> Tree:
        """The body's weights.

        Raises:
            BadWeights: They cannot be read, or do not fit.
        """
        body: Tree = (
            self.network.init(keys.key(0))["body"] if self.weights is None else weights.read(self.weights, self.network)
        )
        return tree.to(body, self.device)

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
        splits, _ = self.dataset.load(root), self.body
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
        source = "random" if self.weights is None else weights.digest(self.weights)
        columns = {key: column for key, column in vars(splits.labels).items() if column is not None}
        made_of: dict[str, Any] = {
            "dataset": describe_plugin(self.dataset),
            "images": splits.train_x.index if isinstance(splits.train_x, Stored) else None,
            "labels": tree.digest([columns]),
            "body": [self.model, self.norm, source],
        }
        if self.model not in BUILT_IN:
            made_of["model"] = describe_model(self.model)
        return Plan(
            listing=identify(made_of),
            shape=(self.network.feature_size, 1, 1),
            train=len(splits.train_y),
            test=len(splits.test_y),
            dtype="float16",
            chunk=CHUNK,
            made_by={
                "dataset": label(self.dataset),
                "classes": str(self.dataset.num_classes),
                "model": self.model,
                "norm": self.norm,
                "weights": source,
                "torch": torch.__version__,
                "device": self.device,
            },
        )

    def _features(self, splits: Splits, chunk: Chunk, batch_size: int) -> Tensor:
        """Give (n, 1, 1, d) float16, on the CPU."""
        x, y = _part(splits, chunk.part)
        made = []
        for rows in torch.arange(chunk.start, chunk.stop).split(batch_size):
            look = self.dataset.mean, self.dataset.std, "none", self.dataset.scale
            images = Images(x[rows].to(self.device), y[rows].to(self.device), *look)
            with torch.inference_mode():
                z = self.network.features(self.body, images.plain(torch.arange(len(rows), device=self.device)))
            made.append(z.to(torch.float16).cpu())
        features = torch.cat(made)
        wrong = ~features.isfinite().all(1)
        if wrong.any():
            row = chunk.start + int(wrong.nonzero()[0])
            what = f"the features of image {row:,} of the {chunk.part} part are not finite in float16"
            raise weights.BadWeights(f"{what}; these weights do not suit {label(self.dataset)}, choose others")
        return features[:, None, None]


def _part(splits: Splits, part: str) -> tuple[Tensor | Streamed, Tensor]:
    return (splits.train_x, splits.train_y) if part == PARTS[0] else (splits.test_x, splits.test_y)


def _prefetch(splits: Splits, chunk: Chunk) -> None:
    x, _ = _part(splits, chunk.part)
    if not isinstance(x, Tensor):
        x.prefetch(torch.arange(chunk.start, chunk.stop))
