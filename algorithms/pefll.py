"""PeFLL: a hypernetwork writes a client's model from the mean of what an embedding network makes of its examples.

Scott, Zakerinia, Lampert. PeFLL: Personalized Federated Learning by Learning to Learn. ICLR 2024.
https://arxiv.org/abs/2306.05515 (Algorithm 2)

Server keeps   embedding, hidden, output, moments, statistics
Client keeps   nothing
Down           embedding, hidden, output, statistics
Up             body, head, descriptor (1 + N // 4), gradient
Passes         E + b; before the test 1/3
Newcomers      the model that is written for their own examples, like everybody's; nothing is tuned
Departs        clients are sent the hypernetwork, and write their models themselves (paper: descriptors go up, models
               and their gradients come down, in three trips); bytes are those of the paper's trips. Clients train
               for the setting's epochs (reference: 50 steps), and rounds are fewer than 5,000, hence the larger
               `server_lr`. The output layer starts with weights of zero and the initial model as bias: the first round
               is that of all algorithms (reference: uniform). Descriptors are means (reference: sums over two, made
               standard by the first client's), and no class is masked at the test (reference: those that a client
               lacks). Running statistics are no output: they are averaged; the embedding network has group norm
Elsewhere      FL-bench makes each descriptor standard by its own mean and deviation. Authors' code takes descriptors of
               one batch in training and of all batches at the test, which agree only because the sum divided by two and
               the standardising cancel
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.models import Model, build
from bench.models.hypernetwork import hypernetwork, write
from bench.optim import Adam
from bench.ranges import Count, Strength


@register("pefll")
@dataclass(frozen=True, kw_only=True)
class PeFLL(Algorithm):
    """What clients change of the model that was written for them is the gradient of both networks."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    refuses: ClassVar[Mapping[str, str]] = {
        "aggregation": "models step the hypernetwork, and no mean is taken",
        "channel": "no model is sent of which what comes back would be an update",
    }
    paper: ClassVar[Mapping[str, object]] = {"server_lr": 2e-4}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"server_lr": (2e-4, 2e-2)}
    controls: ClassVar[Mapping[str, str]] = {
        "pfedhn": "what descriptors made of examples are worth beside vectors that are learnt for each client",
    }

    descriptor_size: Count | None = None
    """Length of a descriptor; None: 1 + N // 4 (reference)."""
    hidden_size: Count = 100
    """Units of a hidden layer (reference: 100)."""
    hidden_layers: Annotated[int, Interval(ge=1, le=100)] = 3
    """Hidden layers that follow the first (reference: 3)."""
    server_lr: Strength = 2e-3
    """Learning rate of both networks, by Adam (reference: 2e-4)."""

    def network(self, task: Task) -> Model:
        """Give the embedding network: that of the clients for images with a plane for each class, and l outputs."""
        channels, *others = task.model.shape
        size = self.descriptor_size or 1 + task.num_clients // 4
        return build(task.model.name, size, (channels + task.num_classes, *others))

    def init_server(self, task: Task) -> Tree:
        """Draw both networks."""
        network, statistics = self.network(task), tree.split(task.init(), tree.is_statistic)[0]
        model, key = tree.parameters(task.init()), task.server_key("hypernetwork")
        writer = hypernetwork(key, network.num_classes, self.hidden_size, self.hidden_layers, model)
        both = {"embedding": network.init(task.server_key("embedding")), **writer}
        return {**both, "moments": Adam(self.server_lr).start(both), "statistics": statistics}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send both networks, and running statistics."""
        return {key: part for key, part in server.items() if key != "moments"}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Write a model by a batch of examples, train it, and pull back what changed to the embedding network."""
        batches = list(data.batches(steps=1, salt="describe"))
        descriptor, to_embedding = torch.func.vjp(lambda e: self.described(task, e, batches), shared["embedding"])[:2]
        model, to_descriptor = torch.func.vjp(lambda v: tree.pick(write(shared, v[None]), 0), descriptor)[:2]
        trained = task.sgd(task.loss, tree.merge(model, shared["statistics"]), data.batches(task.epochs))
        gradient = to_embedding(to_descriptor(tree.sub(model, trained))[0])[0]
        return {**trained, "descriptor": descriptor, "gradient": gradient}, private

    def described(self, task: Task, embedding: Tree, batches: Iterable[Batch]) -> Tensor:
        """Average the embedding network's outputs over examples with labels: (l,); zeros without any."""
        network = self.network(task)
        total = task.key.new_zeros(network.num_classes, dtype=torch.float32)
        number = total[0]
        for batch in batches:
            label = losses.one_hot(batch.y, task.num_classes)
            planes = label.reshape(*label.shape, *[1] * (batch.x.ndim - 2)).expand(-1, -1, *batch.x.shape[2:])
            z = network.features(embedding["body"], torch.cat([batch.x, planes], 1))
            total = total + batch.weight @ network.logits(embedding["head"], z)
            number = number + batch.weight.sum()
        return total / number.clamp(min=1)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Pull what the clients changed back through the hypernetwork, and step both networks by the mean gradient."""
        both = {part: server[part] for part in ("embedding", "hidden", "output")}
        models, alike = {part: uploads[part] for part in ("body", "head")}, torch.ones_like(uploads.weights)
        writer = {part: server[part] for part in ("hidden", "output")}
        written, pull_back = torch.func.vjp(lambda w: write(w, uploads.tensor("descriptor")), writer)[:2]
        changed = tree.map(lambda a, b: (a - b) / len(uploads), written, models)
        gradient = {"embedding": uploads.mean("gradient", alike), **pull_back(changed)[0]}
        both, moments = Adam(self.server_lr).step(both, tree.shortened(gradient, 50.0), server["moments"])
        statistics = tree.split({part: uploads.mean(part) for part in models}, tree.is_statistic)[0]
        return {**both, "moments": moments, "statistics": statistics}

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count a model and the gradient of a descriptor in the place of the hypernetwork."""
        if "output" not in payload:
            return tree.nbytes(payload)
        sent = {key: part for key, part in payload.items() if key not in ("hidden", "output")}
        descriptor = payload["hidden"]["0"]["weight"][0]
        return tree.nbytes({**sent, "model": payload["output"]["bias"], "descriptor": descriptor})

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give the trained model besides."""
        upload, private = self.local_update(task, shared, private, data)
        return {**shared, "body": upload["body"], "head": upload["head"]}, private

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Write a model by all examples; right after its local work a client has a trained one."""
        if "body" in shared:
            return {"body": shared["body"], "head": shared["head"]}
        descriptor = self.described(task, shared["embedding"], data.plain_batches())
        return tree.merge(tree.pick(write(shared, descriptor[None]), 0), shared["statistics"])

    def newcomer_adaptation(self, task: Task) -> None:
        """Take no step: a model is written for a client that never trained as for all others."""
        return None
