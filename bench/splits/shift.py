"""Feature shift: each client's pictures look as if another camera had taken them, training and test images alike.

What a client's camera does is a function of the split's seed and the client, drawn once; its pixels are written anew
before anything is trained. The official test part, on which generic models are tested, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench import keys
from bench.dataset import Dataset, Splits
from bench.protocol.settings import BadConfig, Setting
from bench.splits.split import Split

Camera = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(n, channels, height, width) pixels in 0..1, () the client's randomness, () that of these images, and how strong, to
pixels of the same shape."""


def shifted(dataset: Dataset, splits: Splits, split: Split, setting: Setting, seed: int) -> tuple[Splits, Split]:
    """Give images as clients' cameras see them, and whose they are; the same where nothing is shifted.

    Test images of clients stand behind the official ones, each client's apart from the others', even where two clients
    were dealt the same image.

    Args:
        dataset: Says what its pixels mean.
        splits: Official images; left as they are.
        split: Of them.
        setting: Which shift, how strong, and how many clients are held out.
        seed: Of the run.

    Raises:
        BadConfig: The images are read from files while a run trains.
    """
    if not setting.shifts:
        return splits, split
    if not isinstance(splits.train_x, Tensor) or not isinstance(splits.test_x, Tensor):
        said = f"shift = {setting.shift}: these images are read from files while a run trains, and cannot be shifted"
        raise BadConfig(f"{said}; leave it out, or choose data that fits in memory")
    training, root = setting.training_clients(len(split.clients)), keys.key(setting.seed_of_split(seed))
    train_x, tests = splits.train_x.clone(), [splits.test_x]
    for client, (mine, tested) in enumerate(zip(split.clients, split.tests, strict=True)):
        severity = setting.severity_of(client >= training)
        own = mine if splits.held is None else torch.searchsorted(splits.held, mine)
        for part, x in (("train", train_x[own]), ("test", splits.test_x[tested])):
            seen = _through(CAMERAS[setting.shift], x, dataset.scale, keys.fold(root, "shift", client), part, severity)
            if part == "train":
                train_x[own] = seen
            else:
                tests.append(seen)
    first = len(splits.test_y)
    ends = torch.tensor([len(tested) for tested in split.tests]).cumsum(0).tolist()
    rows = tuple(torch.arange(end - len(own), end) + first for end, own in zip(ends, split.tests, strict=True))
    test_y = splits.test_y[torch.cat([torch.arange(first), *split.tests])]
    return replace(splits, train_x=train_x, test_x=torch.cat(tests), test_y=test_y), replace(split, tests=rows)


def _through(camera: Camera, x: Tensor, scale: float, key: Tensor, part: str, severity: float) -> Tensor:
    """Give images of some dtype as a camera sees them, in that dtype."""
    seen = camera(x.float() / scale, key, keys.fold(key, part), severity).clamp(0, 1) * scale
    return seen.to(x.dtype) if x.dtype.is_floating_point else seen.round().to(x.dtype)


def _between(key: Tensor, what: str, *shape: int) -> Tensor:
    """Draw numbers uniform in -1..1."""
    return 2 * keys.uniform(keys.fold(key, what), math.prod(shape)).reshape(shape) - 1


def contrast(x: Tensor, client: Tensor, images: Tensor, severity: float) -> Tensor:
    """Stretch pixels about the middle by 0.5 to 1.5 at severity 1, and lift them by up to a quarter."""
    gain, lift = (_between(client, what, 1) * severity for what in ("gain", "lift"))
    return (1 + 0.5 * gain) * (x - 0.5) + 0.5 + 0.25 * lift


def colour(x: Tensor, client: Tensor, images: Tensor, severity: float) -> Tensor:
    """Mix channels: each by 0.5 to 1.5 of itself and ±0.25 of each other one at severity 1, lifted by up to a quarter;
    of grey pictures it is a contrast.
    """
    channels = x.shape[1]
    share = 0.25 + 0.25 * torch.eye(channels)
    mixing = torch.eye(channels) + share * _between(client, "mixing", channels, channels) * severity
    lift = 0.25 * severity * _between(client, "lift", channels)
    return torch.einsum("oc,nchw->nohw", mixing, x - 0.5) + (0.5 + lift)[:, None, None]


def blur(x: Tensor, client: Tensor, images: Tensor, severity: float) -> Tensor:
    """Blur by a Gaussian of a standard deviation of up to 1.5 pixels at severity 1."""
    from torchvision.transforms.v2.functional import gaussian_blur  # a second of its own

    deviation = 1.5 * severity * float(keys.uniform(keys.fold(client, "blur"), 1))
    reach = min(math.ceil(3 * deviation), min(x.shape[2:]) - 1)
    return x if reach < 1 or not len(x) else gaussian_blur(x, [2 * reach + 1] * 2, [deviation] * 2)


def noise(x: Tensor, client: Tensor, images: Tensor, severity: float) -> Tensor:
    """Add Gaussian noise of a standard deviation of up to 0.1 of the range at severity 1, the same for an image each
    time it is seen.
    """
    deviation = 0.1 * severity * float(keys.uniform(keys.fold(client, "noise"), 1))
    each = keys.fold(images, torch.arange(len(x)))
    return x + deviation * keys.normal_rows(each, x[0].numel() if len(x) else 0).reshape(x.shape)


CAMERAS: dict[str, Camera] = {"colour": colour, "contrast": contrast, "blur": blur, "noise": noise}
"""By the name in `bench.protocol.settings.SHIFTS`."""
