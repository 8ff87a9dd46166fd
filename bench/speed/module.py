"""A network of `bench.models` as an ordinary module: what the bare loop and the peers train."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import tree
from bench.models import Model
from bench.models.layers import Recorder, training
from bench.tree import Tree


class Module(torch.nn.Module):
    """The same network with parameters of its own; running statistics are buffers, which training moves.

    Args:
        model: Which network.
        params: Its weights, which are copied.
        layout: Memory format of the weights of convolutions.
    """

    def __init__(self, model: Model, params: Tree, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.model = model
        leaves: dict[str, Tensor] = {}
        for path, leaf in tree.flatten(params).items():
            own = leaf.clone(memory_format=layout) if leaf.ndim == 4 else leaf.clone()
            name = path.replace("/", "_")
            if tree.is_statistic(path):
                self.register_buffer(name, own)
                leaves[path] = own
            else:
                parameter = torch.nn.Parameter(own)
                self.register_parameter(name, parameter)
                leaves[path] = parameter
        self.params = tree.unflatten(leaves)
        self.statistics = tree.split(self.params, tree.is_statistic)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Score images: (B, C)."""
        if not self.statistics or not self.training:
            return self._score(x)
        with training(Recorder(x.new_ones(len(x)), padded=False, frozen=False)) as recorder:
            scores = self._score(x)
        following = tree.flatten(recorder.following(self.statistics))
        with torch.no_grad():
            for path, leaf in tree.flatten(self.statistics).items():
                leaf.copy_(following[path])
        return scores

    def _score(self, x: Tensor) -> Tensor:
        return self.model.logits(self.params["head"], self.model.features(self.params["body"], x))
