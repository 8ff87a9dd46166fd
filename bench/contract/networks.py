"""What every network promises, alone and on the toy problem, whose pictures are made as large as it needs."""

from __future__ import annotations

import inspect
import math
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.contract import toy
from bench.contract.promises import Finding, findings, require
from bench.models import BUILT_IN, Network, block_of, is_norm, usual_norm
from bench.models.layers import Recorder, is_norm_statistic, training
from bench.plugins.registry import MODELS
from bench.training import engine as engines
from bench.training.rounds import Run
from bench.tree import Tree

_CLASSES = 5
_SIZES = (18, 5, 1, 0)
"""Training examples of the toy's clients: networks are slow."""


def check(network: type[Network]) -> Iterator[Finding]:
    """Run every check of a network's contract, one after the other."""
    return findings(network, PROMISES)


def name_is_file_name(network: type[Network]) -> None:
    """The registered name is the name of the file; built-in ones share files."""
    names = [name for name in MODELS if MODELS.entered().get(name) is network]
    stem = Path(inspect.getfile(network)).stem
    built_in = len(names) == 1 and names[0] in BUILT_IN
    require(built_in or names == [stem], f"registered as {names}, but the file is {stem}.py")


def is_a_value(network: type[Network]) -> None:
    """Built twice it is equal, its repr evaluates back, and it pickles by reference, without weights."""
    model = _model(network)
    require(model == _model(network), "built twice, it is not equal to itself; it is to hold its four fields only")
    again = eval(repr(model), {network.__qualname__: network})
    require(again == model, f"eval(repr()) gives {again!r}, not {model!r}")
    packed = pickle.dumps(model)
    require(pickle.loads(packed) == model, "does not survive pickling")
    require(len(packed) < 2000, f"pickled, it takes {len(packed)} bytes: weights are no part of it")


def shapes_fit(network: type[Network]) -> None:
    """Of images of one and three channels, square and not: features (B, d), logits (B, C), float32, finite."""
    least = max(network.smallest, 8)
    for channels, height, width in ((1, least, least), (3, least + 4, least), (3, max(32, least), max(32, least))):
        model = network(_name(network), _CLASSES, (channels, height, width), usual_norm(_name(network)))
        params = model.init(keys.key(1))
        of = f"of images {channels}×{height}×{width}"
        for count in (1, 3):
            z = model.features(params["body"], keys.normal(keys.key(2), count, *model.shape))
            require(tuple(z.shape) == (count, model.feature_size), f"features {of} are {tuple(z.shape)}")
            logits = model.logits(params["head"], z)
            require(tuple(logits.shape) == (count, _CLASSES), f"logits {of} are {tuple(logits.shape)}")
            dtypes = {leaf.dtype for leaf in (z, logits, *tree.flatten(params).values())}
            require(dtypes == {torch.float32}, f"weights, features and logits {of} are {_listed(dtypes)}")
            require(bool(logits.isfinite().all()), f"logits {of} are not finite")


def key_decides(network: type[Network]) -> None:
    """The same key draws the same bits, another one others; no global generator is asked; shapes are known without
    drawing.
    """
    for norm in network.norms:
        model = _model(network, norm)
        before = torch.get_rng_state()
        first, again, other = (model.init(keys.key(seed)) for seed in (1, 1, 2))
        require(torch.equal(before, torch.get_rng_state()), "it draws from torch's global generator; use bench.keys")
        require(tree.largest_difference(first, again) == 0, "the same key gives other weights")
        require(tree.largest_difference(first, other) > 0, "another key gives the same weights")
        drawn, shapes = (tree.flatten(each) for each in (first, model.init(keys.key(1, "meta"))))
        same = {path: leaf.shape for path, leaf in drawn.items()} == {path: leaf.shape for path, leaf in shapes.items()}
        require(same, "without drawing (a key on the device meta) the shapes are others")
        places = {leaf.device.type for leaf in shapes.values()}
        require(places == {"meta"}, f"with a key on the device meta, weights are on {_listed(places)}: use key.device")


def parts_are_body_and_head(network: type[Network]) -> None:
    """The blocks one after the other are the body: each reads its own keys, and every leaf is in one of them."""
    for norm in network.norms:
        model = _model(network, norm)
        params = model.init(keys.key(1))
        require(set(params) == {"body", "head"}, f"a model has the keys {_listed(params)}, not body and head")
        x = keys.normal(keys.key(2), 2, *model.shape)
        passed = x
        for block in model.blocks:
            try:
                passed = block.run({key: params["body"][key] for key in block.keys}, passed)
            except KeyError as error:
                require(False, f"the block {block.name} reads {error}, which is not among its keys")
        require(torch.equal(passed, model.features(params["body"], x)), "features are not the blocks in their order")
        told = [key for block in model.blocks for key in block.keys]
        require(sorted(told) == sorted(params["body"]), f"blocks have the keys {_listed(told)}, "
                f"and the body {_listed(params['body'])}")  # fmt: skip
        for path in tree.flatten(params):
            block_of(model, path)


def norms_are_explicit(network: type[Network]) -> None:
    """Norm layers are called `norm`; with norm=batch they hold statistics, which training moves and testing reads; with
    norm=group and norm=layer they hold none, and are of that kind.
    """
    for norm in network.norms:
        model = _model(network, norm)
        body = model.init(keys.key(1))["body"]
        layers = {path.rpartition("/norm/")[0] for path in tree.flatten(body) if is_norm(path)}
        statistics = {path for path in tree.flatten(body) if is_norm_statistic(path)}
        wanted = {f"{layer}/norm/stats/{kind}" for layer in layers for kind in ("mean", "var") if norm == "batch"}
        require(statistics == wanted, f"with norm={norm} statistics are {_listed(statistics)}, not {_listed(wanted)}; "
                "use bench.models.layers.norm_layer")  # fmt: skip
        x = keys.normal(keys.key(2), 4, *model.shape)
        with training(Recorder(torch.ones(4), padded=False, frozen=False)) as recorder:
            model.features(body, x)
        moved = tree.flatten(recorder.following(tree.split(body, is_norm_statistic)[0]))
        still = [path for path, leaf in moved.items() if torch.equal(leaf, tree.flatten(body)[path])]
        require(not still, f"training does not move {_listed(still)}; use bench.models.layers.norm")
    if not {"group", "layer"} <= set(network.norms):
        return
    group, layer = (_model(network, norm) for norm in ("group", "layer"))
    body = group.init(keys.key(1))["body"]
    deaf = layers and torch.equal(group.features(body, x), layer.features(body, x))
    require(not deaf, "norm=layer gives what norm=group does; use bench.models.layers.norm, with self.norm")


def examples_are_apart(network: type[Network]) -> None:
    """Outside of training, an image's features do not depend on the others of its batch."""
    for norm in network.norms:
        model = _model(network, norm)
        body = model.init(keys.key(1))["body"]
        x = keys.normal(keys.key(2), 4, *model.shape)
        apart = (model.features(body, x)[:2] - model.features(body, x[:2])).abs().max()
        require(float(apart) < 1e-4, f"with norm={norm} features change by {float(apart):.1e} with the batch's others")


def gradients_are_everywhere(network: type[Network]) -> None:
    """Every weight of body and head is trained: its gradient is finite, and not zero."""
    for norm in network.norms:
        model = _model(network, norm)
        params = model.init(keys.key(1))
        moving = {path: leaf.requires_grad_() for path, leaf in tree.flatten(tree.parameters(params)).items()}
        x, y = keys.normal(keys.key(2), 16, *model.shape), torch.arange(16) % _CLASSES
        with training(Recorder(torch.ones(16), padded=False, frozen=False)):
            value = F.cross_entropy(model.logits(params["head"], model.features(params["body"], x)), y)
        slopes = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
        unused = [path for path, slope in zip(moving, slopes, strict=True) if slope is None or not slope.any()]
        require(not unused, f"nothing trains {_listed(unused)}")
        finite = all(bool(slope.isfinite().all()) for slope in slopes if slope is not None)
        require(finite, f"with norm={norm} a gradient is not finite")


def sums_are_over_images(network: type[Network]) -> None:
    """What is asked of training images is a sum over them, nothing of none; what follows from it are leaves of the
    body that are never differentiated.
    """
    if network.learns is None:
        return
    model = _model(network)
    x = keys.normal(keys.key(2), 5, *model.shape)
    none, whole, *parts = (model.summary(part) for part in (x[:0], x, x[:2], x[2:]))
    require(none.ndim == 1 and whole.dtype == tree.counting("cpu"), "a summary is (s,) in float64: tree.in_float64")
    require(not none.any(), "a summary of no images is not zero")
    apart = (parts[0] + parts[1] - whole).abs().max() / (1 + whole.abs().max())
    require(float(apart) < 1e-9, f"the summaries of two parts add up to another one than the whole's, by {apart:.1e}")
    body, started = (tree.flatten(each) for each in (model.init(keys.key(1))["body"], model.started(whole)))
    require(started.keys() <= body.keys(), f"what follows from the sum is {_listed(started)}; the body has "
            f"{_listed(body)}")  # fmt: skip
    fit = all((leaf.shape, leaf.dtype) == (body[path].shape, body[path].dtype) for path, leaf in started.items())
    require(fit and all(map(tree.is_statistic, started)), "what follows from the sum has another form than in the "
            "body, or lies outside of stats")  # fmt: skip


def engines_agree(network: type[Network]) -> None:
    """Both engines train the same models, with group norm, or what there is instead."""
    serial, stacked = (toy.states(toy.finish(_run(network, engine))) for engine in ("serial", "stacked"))
    require(tree.is_finite(serial), "a trained model is not finite")
    apart = tree.largest_difference(serial, stacked)
    require(apart <= engines.TOLERANCE, f"models of the two engines differ by {apart:.1e}")


def clients_stack(network: type[Network]) -> None:
    """With batch norm, if it can have that, gradients and statistics of clients stacked and padded are those of each
    alone: in float64, as with few images a batch rounding may grow without bound.
    """
    model = _model(network, usual_norm(_name(network), "batch"))
    clients = tree.stack([tree.map(Tensor.double, model.init(keys.key(seed))) for seed in (1, 2)])
    x, y = keys.normal(keys.key(3), 2, 6, *model.shape).double(), torch.arange(12).reshape(2, 6) % _CLASSES
    real = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]).double()  # the second client has two images less
    together = torch.func.vmap(partial(_slopes, model, padded=True))(clients, x, y, real)
    for client, count in ((0, 6), (1, 4)):
        own = tree.map(partial(_client, client), clients)
        alone = _slopes(model, own, x[client, :count], y[client, :count], real[client, :count], padded=False)
        found = tree.map(partial(_client, client), together)
        scale = 1 + max(float(leaf.abs().max()) for leaf in tree.flatten(alone).values())
        apart = tree.largest_difference(found, alone) / scale
        require(apart < 1e-6, f"gradients of stacked clients are off by {apart:.1e} of the largest")


def _slopes(model: Network, params: Tree, x: Tensor, y: Tensor, real: Tensor, padded: bool) -> Tree:
    """Differentiate cross-entropy in training mode, and give the next statistics with the gradient."""
    statistics, moving = tree.split(params, tree.is_statistic)

    def loss(moving: Tree) -> tuple[Tensor, Tree]:
        whole = tree.merge(moving, statistics)
        with training(Recorder(real, padded, frozen=False)) as recorder:
            logits = model.logits(whole["head"], model.features(whole["body"], x))
        value = (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()
        return value, recorder.following(statistics)

    slopes, following = torch.func.grad(loss, has_aux=True)(moving)
    return tree.merge(slopes, following)


def _client(client: int, leaf: Tensor) -> Tensor:
    return leaf[client]


def resumes(network: type[Network]) -> None:
    """Stopping after a round and going on gives the bits of one go."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        first = _run(network, checkpoint=checkpoint)
        first.saved = -math.inf  # save after this round, however quick it was
        first.step()
        resumed = toy.finish(_run(network, checkpoint=checkpoint)).outcome().digest
    require(resumed == toy.finish(_run(network)).outcome().digest, "a resumed run ends in another state")


def _name(network: type[Network]) -> str:
    return next(name for name in MODELS if MODELS.entered().get(name) is network)


def _model(network: type[Network], norm: str | None = None) -> Network:
    side = max(network.smallest, 8)
    return network(_name(network), _CLASSES, (3, side, side), norm or usual_norm(_name(network)))


def _run(network: type[Network], engine: str = "serial", checkpoint: Path | None = None) -> Run:
    """Set up two short rounds of plain federated averaging."""
    setting = replace(
        toy.SETTING, model=_name(network), norm=usual_norm(_name(network)), clients=len(_SIZES), participation=1.0,
        rounds=2, epochs=1, lr=0.01, eval_every=2,
    )  # fmt: skip
    pictures = toy.Toy(test=12, enlarged=-(-network.smallest // 8))
    return toy.run(toy.Host(), engine, setting=setting, sizes=_SIZES, checkpoint=checkpoint, dataset=pictures)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


PROMISES: Mapping[str, Callable[[type[Network]], None]] = {
    "the name is the file's name": name_is_file_name,
    "it is a value: equal, repr evaluates back, pickles small": is_a_value,
    "shapes fit": shapes_fit,
    "the key decides, and nothing else": key_decides,
    "blocks are the body, a head is on top": parts_are_body_and_head,
    "norm layers are explicit": norms_are_explicit,
    "images are apart": examples_are_apart,
    "gradients are everywhere": gradients_are_everywhere,
    "what is asked of images is a sum": sums_are_over_images,
    "engines agree": engines_agree,
    "clients stack": clients_stack,
    "stop and resume equals one go": resumes,
}
