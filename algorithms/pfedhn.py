"""pFedHN: a hypernetwork at the server writes each client's model from a vector that stands for the client.

Shamsian, Navon, Fetaya, Chechik. Personalized Federated Learning using Hypernetworks. ICML 2021.
https://arxiv.org/abs/2103.04628 (Algorithm 1)

Server keeps   embeddings, hidden, output, momentum, statistics
Client keeps   nothing
Down           body, head
Up             body, head
Newcomers      never drawn, what the hypernetwork writes for its own embedding, which is as it was drawn; held out, for
               the mean embedding, with five epochs of the head (paper: for one tuned on its data)
Departs        a step of the hypernetwork follows the mean over a round's clients (paper: a client a step, 5,000 steps),
               hence the larger `server_lr`; clients train for the setting's epochs (reference: 50 steps). The output
               layer starts with weights of zero and the initial model as bias: the first round is that of all
               algorithms (reference: uniform). Clients send the model, and the server, which knows what it wrote, takes
               the difference (paper: clients do). Running statistics are no output: they are averaged
Elsewhere      FL-bench lets a round's clients act on the hypernetwork one after the other, and embeds in int((1 + N) /
               4) dimensions (authors: int(1 + N / 4)). In every step authors' weight decay also shrinks embeddings of
               clients that are not drawn
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval

from bench import Algorithm, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.models.hypernetwork import hypernetwork, write
from bench.optim import Sgd
from bench.ranges import Count, Momentum, Strength


@register("pfedhn")
@dataclass(frozen=True, kw_only=True)
class PFedHN(Algorithm):
    """Clients train what was written for them; what they change is the hypernetwork's gradient."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {"aggregation": "models step the hypernetwork, and no mean is taken"}
    paper: ClassVar[Mapping[str, object]] = {"server_lr": 0.01}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "server_lr": (0.01, 1.0),
        "server_decay": (1e-5, 1e-2),
    }

    embedding_size: Count | None = None
    """Length of a client's vector; None: 1 + N // 4 (reference)."""
    hidden_size: Count = 100
    """Units of a hidden layer (reference: 100)."""
    hidden_layers: Annotated[int, Interval(ge=1, le=100)] = 3
    """Hidden layers that follow the first (reference: 3)."""
    server_lr: Strength = 0.1
    """Learning rate of hypernetwork and embeddings (reference: 0.01)."""
    server_momentum: Momentum = 0.9
    """Their momentum (reference: 0.9)."""
    server_decay: Strength = 1e-3
    """Their weight decay (reference: 1e-3)."""

    @property
    def rule(self) -> Sgd:
        """Give the step of the hypernetwork, clipped at 50 as in the reference."""
        return Sgd(self.server_lr, self.server_momentum, self.server_decay, clip=50.0)

    def init_server(self, task: Task) -> Tree:
        """Draw an embedding for each client, (N, e), and the layers: of the output's, leaves (hidden_size, ...)."""
        key, size = task.server_key("hypernetwork"), self.embedding_size or 1 + task.num_clients // 4
        statistics, model = tree.split(task.init(), tree.is_statistic)
        embeddings = keys.normal(keys.fold(key, "embeddings"), task.num_clients, size)
        writer = hypernetwork(key, size, self.hidden_size, self.hidden_layers, model)
        writer = {"embeddings": embeddings, **writer}
        return {**writer, "momentum": self.rule.start(writer), "statistics": statistics}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Write a client's model; of the mean embedding for one held out of training."""
        embeddings = server["embeddings"]
        embedding = embeddings.mean(0) if client is None else embeddings[client]
        return tree.merge(tree.pick(write(server, embedding[None]), 0), server["statistics"])

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Pull what the clients changed back through the hypernetwork, and step: J^T (written - trained)."""
        writer: Tree = {part: server[part] for part in ("embeddings", "hidden", "output")}
        written, pull_back = torch.func.vjp(lambda w: write(w, w["embeddings"][uploads.clients]), writer)[:2]
        changed = tree.map(lambda a, b: (a - b) / len(uploads), written, tree.stack(uploads.trees))
        writer, momentum = self.rule.step(writer, pull_back(changed)[0], server["momentum"])
        statistics = tree.split(uploads.mean(), tree.is_statistic)[0]
        return {**writer, "momentum": momentum, "statistics": tree.merge(server["statistics"], statistics)}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None
