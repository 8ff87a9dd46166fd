"""Small trees in the official formats of datasets of photographs: lists, and photographs that a model can learn from.

Every function writes below `root` what the dataset of its name reads there, for its first `classes` classes, and is
read with that field: `trees.inat(root, classes=6)` with `inat(classes=6)`. Classes are long-tailed, photographs differ
in size, their colour shows their class, and all follows from the seed.
"""

from __future__ import annotations

import colorsys
import csv
import gzip
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CINIC_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GROUPS = ("Aves", "Insecta", "Plantae")


@dataclass(frozen=True)
class Shot:
    """One photograph to be."""

    label: int
    number: int
    """Counted over both parts, training first: different for every photograph."""
    user: str
    name: str
    """32 hexadecimal digits, as iNaturalist names files."""


@dataclass(frozen=True)
class Plan:
    """The photographs of both parts, each part in a shuffled order."""

    train: list[Shot]
    test: list[Shot]


def plan(classes: int, largest: int, smallest: int, tested: int, users: int, seed: int) -> Plan:
    """Say what photographs there are.

    Args:
        classes: C.
        largest: Training photographs of class 0.
        smallest: Training photographs of class C - 1; between them sizes fall geometrically.
        tested: Test photographs of every class.
        users: People who took them; each has a training photograph if there are as many.
        seed: Of order, names and users.
    """
    random = np.random.default_rng(seed)
    sizes = np.round(np.geomspace(largest, smallest, classes)).astype(int)
    parts, number = [], 0
    for counts in (sizes, np.full(classes, tested)):
        labels = np.repeat(np.arange(classes), counts)
        owners = random.permutation(np.arange(len(labels)) % users)
        part = [
            Shot(label, number + row, f"User {owner} é", random.bytes(16).hex())
            for row, (label, owner) in enumerate(zip(labels.tolist(), owners.tolist(), strict=True))
        ]
        parts.append([part[row] for row in random.permutation(len(part))])
        number += len(part)
    return Plan(*parts)


def photograph(path: Path, label: int, number: int) -> None:
    """Write a photograph: its hue shows its class, with noise, 40 to 99 pixels high and wide.

    The format is the suffix's; the bytes depend on `label` and `number` only.
    """
    random = np.random.default_rng((label, number))
    height, width = random.integers(40, 100, 2)
    colour = np.array(colorsys.hsv_to_rgb((label * 0.381966) % 1, 0.8, 0.8)) * 255
    pixels = colour + random.normal(0, 30, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(path, quality=90)  # which PNG has not, and ignores


def inat(
    root: Path,
    *,
    version: int = 2018,
    classes: int = 6,
    largest: int = 40,
    smallest: int = 5,
    tested: int = 4,
    users: int = 8,
    forms: tuple[str, str] = ("json", "json"),
    photographs: bool = True,
    seed: int = 0,
) -> Path:
    """Write iNaturalist in its official form, or as lists.

    Args:
        root: The data root.
        version: 2018 or 2019.
        classes: As the other numbers, of `plan`.
        largest: See there.
        smallest: See there.
        tested: See there.
        users: Rights holders.
        forms: Of the training and of the validation list, "json" or "txt".
        photographs: Whether to write them too.
        seed: Of all.

    Returns:
        The dataset's folder, `root/inat2018`.
    """
    folder = root / f"inat{version}"
    folder.mkdir(parents=True, exist_ok=True)
    made = plan(classes, largest, smallest, tested, users, seed)
    for part, shots, form in zip(("train", "val"), (made.train, made.test), forms, strict=True):
        paths = [_inat_path(f"train_val{version}", shot) for shot in shots]
        if form == "json":
            write_json(folder / f"{part}{version}.json", version, shots, paths, classes)
        else:
            write_text(folder / f"iNaturalist{version % 100}_{part}.txt", shots, paths)
        if photographs:
            _take(folder, shots, paths)
    return folder


def inat_users(
    root: Path,
    *,
    classes: int = 6,
    largest: int = 40,
    smallest: int = 5,
    tested: int = 4,
    users: int = 8,
    photographs: bool = True,
    seed: int = 0,
) -> Path:
    """Write the two CSVs of iNaturalist-User-120k, and the lists of iNaturalist 2017 with twice as many photographs;
    numbers as in `inat`. Gives `root/inat2017`.
    """
    folder = root / "inat2017"
    tables = folder / "inaturalist-user-120k"
    tables.mkdir(parents=True, exist_ok=True)
    made = plan(classes, largest, smallest, tested, users, seed)
    others = plan(classes, largest, smallest, tested, users, seed + 1)
    for part, shots, more in (("train", made.train, others.train), ("val", made.test, others.test)):
        listed = [*shots, *(Shot(s.label, s.number + 10**6, s.user, s.name) for s in more)]
        paths = [_inat_path("train_val_images", shot) for shot in listed]
        write_json(folder / f"{part}2017.json", 2017, listed, paths, classes)
        if photographs:
            _take(folder, shots, paths[: len(shots)])
    names = ["image_id", "class", "label"]
    rows = [[shot.user, shot.name, shot.label, f"species {shot.label}"] for shot in made.train]
    write_table(tables / "federated_train_user_120k.csv", ["user_id", *names], rows)
    write_table(tables / "test.csv", names, [[shot.name, shot.label, f"species {shot.label}"] for shot in made.test])
    return folder


def imagenet_lt(
    root: Path,
    *,
    classes: int = 6,
    largest: int = 40,
    smallest: int = 5,
    tested: int = 4,
    photographs: bool = True,
    seed: int = 0,
) -> Path:
    """Write ImageNet-LT's lists over ImageNet's folders; numbers as in `inat`. Gives `root/imagenet`."""
    folder = root / "imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    made = plan(classes, largest, smallest, tested, 1, seed)
    train = [f"train/{_wnid(shot.label)}/{_wnid(shot.label)}_{shot.number}.JPEG" for shot in made.train]
    test = [f"val/{_wnid(shot.label)}/ILSVRC2012_val_{shot.number:08d}.JPEG" for shot in made.test]
    for part, shots, paths in (("train", made.train, train), ("test", made.test, test)):
        write_text(folder / f"ImageNet_LT_{part}.txt", shots, paths)
        if photographs:
            _take(folder, shots, paths)
    return folder


def places_lt(
    root: Path,
    *,
    classes: int = 6,
    largest: int = 40,
    smallest: int = 5,
    tested: int = 4,
    photographs: bool = True,
    seed: int = 0,
) -> Path:
    """Write Places-LT's lists over the folders of Places365; numbers as in `inat`. Gives `root/places365_standard`."""
    folder = root / "places365_standard"
    folder.mkdir(parents=True, exist_ok=True)
    made = plan(classes, largest, smallest, tested, 1, seed)
    train = [f"train/place_{shot.label:03d}/{shot.number:08d}.jpg" for shot in made.train]
    test = [f"val/place_{shot.label:03d}/Places365_val_{shot.number:08d}.jpg" for shot in made.test]
    for part, shots, paths in (("train", made.train, train), ("test", made.test, test)):
        write_text(folder / f"Places_LT_{part}.txt", shots, paths)
        if photographs:
            _take(folder, shots, paths)
    return folder


def cinic10(root: Path, *, classes: int = 4, each: int = 12, seed: int = 0) -> Path:
    """Write the three parts of CINIC-10, `each` pictures of every class in every part. Gives `root/cinic10`."""
    folder = root / "cinic10"
    for offset, part in enumerate(("train", "valid", "test")):
        for label in range(classes):
            for row in range(each):
                number = (offset * classes + label) * each + row + seed
                photograph(folder / part / CINIC_CLASSES[label] / f"cifar10-train-{number}.png", label, number)
    return folder


def tiny_imagenet(root: Path, *, classes: int = 4, each: int = 12, tested: int = 3, seed: int = 0) -> Path:
    """Write Tiny ImageNet as its zip unpacks it. Gives `root/tiny-imagenet-200`."""
    folder = root / "tiny-imagenet-200"
    names = [_wnid(label) for label in range(classes)]
    for label, name in enumerate(names):
        for row in range(each):
            photograph(folder / "train" / name / "images" / f"{name}_{row}.JPEG", label, label * each + row + seed)
    (folder / "wnids.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
    order = np.random.default_rng(seed).permutation(classes * tested).tolist()
    for row, place in enumerate(order):
        photograph(folder / "val" / "images" / f"val_{row}.JPEG", place % classes, 10**6 + row + seed)
    lines = [f"val_{row}.JPEG\t{names[place % classes]}\t0\t32\t44\t62\n" for row, place in enumerate(order)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def emnist(
    root: Path,
    *,
    part: str = "balanced",
    classes: int = 47,
    first: int = 0,
    each: tuple[int, int] = (2, 1),
    packed: bool,
) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Write the four files of a part of EMNIST as the official zip unpacks them, or as torchvision leaves them.

    Args:
        root: The data root.
        part: As in their names.
        classes: C.
        first: Label of class 0.
        each: Training and test images of every class.
        packed: Whether they lie in `EMNIST/raw/gzip` as .gz, or in `EMNIST/raw`.

    Returns:
        By the names of the files the images as people see them, (N, 28, 28), and the labels, (N,).
    """
    written = {}
    folder = root / "EMNIST" / "raw" / ("gzip" if packed else "")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (which, images) in enumerate(zip(("train", "test"), each, strict=True)):
        random = np.random.default_rng(seed)
        labels = random.permutation(np.arange(classes * images) % classes + first).astype(np.uint8)
        upright = random.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        stored = {"images-idx3": upright.transpose(0, 2, 1), "labels-idx1": labels}
        for kind, values in stored.items():
            name = f"emnist-{part}-{which}-{kind}-ubyte"
            content = idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(
                gzip.compress(content, mtime=0) if packed else content
            )
            written[name] = upright if kind == "images-idx3" else labels
    return written


def folder(
    path: Path,
    *,
    classes: int = 4,
    largest: int = 20,
    smallest: int = 4,
    tested: int = 3,
    users: int | None = 5,
    seed: int = 0,
) -> Path:
    """Write a person's own images, JPEG and PNG, some in folders of folders, with `clients.csv` unless `users` is
    None. Gives `path`.
    """
    made = plan(classes, largest, smallest, tested, users or 1, seed)
    rows = []
    for part, shots in (("train", made.train), ("test", made.test)):
        for shot in shots:
            below = "day 2/" if shot.number % 3 == 0 else ""
            suffix = ".png" if shot.number % 4 == 0 else ".JPG"
            name = f"{part}/kind {shot.label}/{below}image {shot.number}{suffix}"
            photograph(path / name, shot.label, shot.number)
            rows.append([name, shot.user])
    if users is not None:
        write_table(path / "clients.csv", ["path", "client"], rows)
    return path


# Formats ----------------------------------------------------------------------------------------------------


def idx(values: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Spell an array in the idx format of MNIST."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    return header + np.ascontiguousarray(values).tobytes()


def write_json(path: Path, version: int, shots: list[Shot], paths: list[str], classes: int) -> None:
    """Write a COCO-like list of the iNaturalist competitions."""
    document = {
        "info": {"description": "generated", "year": version, "version": "1.0"},
        "images": [
            {"id": shot.number, "file_name": name, "rights_holder": shot.user, "license": 1, "width": 8, "height": 8}
            for shot, name in zip(shots, paths, strict=True)
        ],
        "licenses": [{"id": 1, "name": "none", "url": ""}],
        "annotations": [{"id": shot.number, "image_id": shot.number, "category_id": shot.label} for shot in shots],
        "categories": [{"id": label, "name": f"species {label}"} for label in range(classes)],
    }
    path.write_text(json.dumps(document))


def write_text(path: Path, shots: list[Shot], paths: list[str]) -> None:
    """Write `path label` lines."""
    path.write_text("".join(f"{name} {shot.label}\n" for shot, name in zip(shots, paths, strict=True)))


def write_table(path: Path, columns: list[str], rows: list[list[object]] | list[list[str]]) -> None:
    """Write a CSV with a header."""
    with path.open("w", newline="") as sink:
        csv.writer(sink).writerows([columns, *rows])


def files(tree: Path, *suffixes: str) -> Iterator[Path]:
    """List the files of a tree with certain suffixes, in order."""
    return iter(sorted(path for path in tree.rglob("*") if path.is_file() and path.suffix in suffixes))


def _inat_path(top: str, shot: Shot) -> str:
    return f"{top}/{GROUPS[shot.label % len(GROUPS)]}/{shot.label}/{shot.name}.jpg"


def _wnid(label: int) -> str:
    return f"n{1440764 + 1111 * label:08d}"


def _take(folder: Path, shots: list[Shot], paths: list[str]) -> None:
    for shot, path in zip(shots, paths, strict=True):
        photograph(folder / path, shot.label, shot.number)


def odd(path: Path, kind: str) -> Path:
    """Put something that is no file in a place."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as own_socket:
            here = os.getcwd()
            os.chdir(path.parent)  # its address has 100 bytes at most
            own_socket.bind(path.name)
            os.chdir(here)
    else:
        path.symlink_to("/dev/zero")
    return path
