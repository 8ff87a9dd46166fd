"""What every dataset promises, each promise a function."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.contract import extremes
from bench.contract.promises import ContractBroken, require
from bench.dataset import DataDamaged, DataMissing, Dataset
from bench.files import data_root
from bench.plugins.registry import DATASETS


def name_is_file_name(plugin: type[Dataset]) -> None:
    """The registered name is the name of the file."""
    stem = Path(inspect.getfile(plugin)).stem
    names = [name for name in DATASETS if DATASETS[name] is plugin]
    require(names == [stem], f"registered as {names}, but the file is {stem}.py")


def describes_itself(plugin: type[Dataset]) -> None:
    """Classes, image shape, mean and standard deviation are stated, and agree in the number of channels."""
    dataset = plugin()
    try:
        channels, classes = dataset.image_shape[0], dataset.num_classes
    except DataMissing:  # a user's own files say it
        return
    require(classes >= 2, f"num_classes = {classes}")
    require(
        len(dataset.mean) == channels == len(dataset.std),
        f"mean and std need {channels} values, one a channel",
    )
    require(all(s > 0 for s in dataset.std), f"std = {dataset.std}: must be above 0")


def loads(plugin: type[Dataset]) -> None:
    """Images are uint8, other examples finite float16 or float32, of the stated shape, labels int64 in range; every
    class has training and test images.
    """
    dataset, root = plugin(), data_root(None)
    try:
        splits = dataset.load(root)
    except DataMissing as missing:
        require(len(str(missing)) > 20, "DataMissing should say what to fetch and where to put it")
        return
    for part, x, y in (("train", splits.train_x, splits.train_y), ("test", splits.test_x, splits.test_y)):
        require(
            x.dtype in (torch.uint8, torch.float16, torch.float32) and tuple(x.shape[1:]) == dataset.image_shape,
            f"{part} images are {x.dtype} {tuple(x.shape)}",
        )
        few = x[torch.arange(min(len(x), 1000))]
        require(bool(few.isfinite().all()), f"{part} examples are not all finite")
        require(y.dtype == torch.int64 and y.shape == x.shape[:1], f"{part} labels are {y.dtype} {tuple(y.shape)}")
        counts = torch.bincount(y, minlength=dataset.num_classes)
        require(
            len(counts) == dataset.num_classes and bool((counts > 0).all()),
            f"{part} images of each class: {counts.tolist()}",
        )
    labels = dataset.labels(root)
    require(
        torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y),
        "labels() differ from load()",
    )
    again = plugin().load(root)
    few = torch.arange(min(len(splits.train_y), 1000))
    require(torch.equal(again.train_x[few], splits.train_x[few]), "loading twice gives two results")


def says_what_is_missing(plugin: type[Dataset]) -> None:
    """Where files are needed and there are none, the error is DataMissing, in a sentence that says what to
    do.
    """
    with tempfile.TemporaryDirectory() as empty:
        try:
            plugin().load(Path(empty))
        except DataMissing as missing:
            require(len(str(missing)) > 20, "the message should say what to fetch and where to put it")
        except DataDamaged:
            raise ContractBroken("an empty folder is missing data, not damaged data") from None


def numbers_are_bounded(plugin: type[Dataset]) -> None:
    """No field takes a number out of any sense, or keeps it from saying what it is."""
    extremes.numbers_are_bounded(plugin, extremes.say_facts)


PROMISES: dict[str, Callable[[type[Dataset]], None]] = {
    "the name is the file's name": name_is_file_name,
    "it describes itself": describes_itself,
    "it loads what it says": loads,
    "it says what is missing": says_what_is_missing,
    "numbers out of any sense are refused, or do no harm": numbers_are_bounded,
}
