"""Weights pre-trained elsewhere: a file that the user names becomes the body of a model."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from bench import keys, tree
from bench.models import Model, is_norm
from bench.models.layers import is_norm_statistic
from bench.system import reading
from bench.tree import Tree

_LEFT_OUT = re.compile(r"(fc|classifier)\..*|head/.*|.*\.num_batches_tracked")
"""Names of tensors that no body has a place for, and that are no sign of another network."""


class BadWeights(ValueError):
    """A file of weights cannot be read, or they are those of another network."""


def read(path: Path, model: Model) -> Tree:
    """Read a body's weights and running statistics.

    Tensors go by torchvision's names where it has such a network (`layer1.0.conv1.weight`), maybe below `state_dict` or
    behind `module.`, or by those of our flattened trees (`body/stem/conv/weight`). A head is left out.

    Args:
        path: Written by `torch.save` (no code in it is run), or `.safetensors`, which needs the package of that name.
        model: Whose body they are for.

    Returns:
        The body, float32, on the CPU.

    Raises:
        BadWeights: The file cannot be read, or a tensor is missing, superfluous, of another shape or not finite.
    """
    expected = tree.flatten(model.init(keys.key(0, "meta"))["body"])  # shapes only: nothing is drawn
    if not expected:
        raise BadWeights(f"{model.name} has no body that weights could be read into; choose another model")
    found = tensors(path)
    own = any(name.startswith("body/") for name in found)
    names = {place: f"body/{place}" if own else model.torchvision(place) for place in expected}
    known = set(names.values())
    superfluous = [name for name in found if name not in known and not _LEFT_OUT.fullmatch(name)]
    of_images = any(map(is_norm, expected)) and not any(map(is_norm_statistic, expected))
    if of_images and any(re.search(r"\.running_|/stats/", name) for name in superfluous):
        statistics = f"{path} holds statistics of batch norm, and {model.name} has {model.norm} norm here"
        raise BadWeights(f"{statistics}; ask for batch norm with --set norm=batch ('bench data embed': --norm batch)")
    misfit, advice = f"{path} is not for {model.name}", "choose the --model and norm that it was made with"
    for name in names.values():
        if name not in found:
            raise BadWeights(f"{misfit}: it has no tensor {name}; {advice}")
    for name in superfluous:
        raise BadWeights(f"{misfit}, which has no place for {name}; {advice}")
    body = {}
    for place, leaf in expected.items():
        tensor = found[names[place]]
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise BadWeights(f"{path}: {names[place]} is sparse or has no values; save a state_dict of plain tensors")
        if tensor.shape != leaf.shape or not tensor.is_floating_point():
            found_as, wanted = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(leaf.shape)} {leaf.dtype}"
            raise BadWeights(f"{misfit}: {names[place]} is {found_as}, and {wanted} is wanted; {advice}")
        if not tensor.isfinite().all():
            raise BadWeights(f"{path}: {names[place]} is not finite; name another file")
        body[place] = tensor.detach().to(torch.float32)
    return tree.unflatten(body)


def digest(path: Path) -> str:
    """Give the SHA-256 of a file, 64 hexadecimal digits: what a run's identity says of its weights.

    Raises:
        BadWeights: The file cannot be read.
    """
    try:
        with _opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _opened(path: Path) -> io.BufferedReader:
    """Open a file that is no larger than weights can be."""
    file = reading.opened(path)
    if os.fstat(file.fileno()).st_size > reading.MOST:
        file.close()
        raise OSError(f"it has more than {reading.MOST:,} bytes")
    return file


def _unreadable(path: Path, error: OSError) -> BadWeights:
    return BadWeights(f"{path} cannot be read ({error.strerror or error}); a file of weights is wanted")


def tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, without `module.` and whatever they are wrapped in."""
    try:
        content: Any = _safe(path) if path.suffix == ".safetensors" else _unpickled(path)
    except BadWeights:
        raise
    except ImportError as error:
        raise BadWeights(f"{path} needs the package safetensors, which is not installed; or save it as .pth") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # whatever a damaged file makes of the reader: IndexError, EOFError, ...
        raise BadWeights(f"{path} is no file of tensors by name ({type(error).__name__}); save a state_dict") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise BadWeights(f"{path} is no file of tensors by name ({type(content).__name__}); save a state_dict")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _unpickled(path: Path) -> object:
    """Read what `torch.save` wrote; no code in it is run."""
    with _opened(path) as file:
        if is_zipfile(file):
            with ZipFile(file) as archive:
                if any(member.compress_type != ZIP_STORED for member in archive.infolist()):
                    raise BadWeights(f"{path} is packed, as torch.save never does; save a state_dict anew")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols, before it refuses them
            return torch.load(file, "cpu", weights_only=True)


def _safe(path: Path) -> dict[str, Tensor]:
    library = importlib.import_module("safetensors.torch")
    with _opened(path):  # which does not wait for a pipe, as the library would
        pass
    tensors: dict[str, Tensor] = library.load_file(path)
    return tensors
