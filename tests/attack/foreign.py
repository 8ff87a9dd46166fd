"""Pickles and other files of strangers: read as data, with no more memory than they honestly take, or refused."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.attack.frame import TRIES, Try
from tests.attack.verdict import bench, refused, require
from tests.test_foreign import forged, header, own
from tests.trees import odd

AREA = "pickles and foreign files"
OFF = ("--ray", "off", "--tracking-uri", "off")
TB = 10**12
ADVICE = ("allow_pickle", "unsafe", "max_header_size", "trust")


class Evil:
    """Runs code when it is unpickled by somebody careless."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


def _enter(name: str, act: Callable[[], object], seconds: float = 40) -> None:
    TRIES.append(Try(area=AREA, name=name, act=act, seconds=seconds))


def _refused(*words: object) -> None:
    """Refused in a sentence before anything is begun, and no code has run."""
    answer = refused(bench(*words), status=(2, 3))
    require(not Path("opened").exists(), "code has run")
    require(not any(word in answer.text for word in ADVICE), "advice of a library is passed on")
    require(len(answer.err.splitlines()) <= 2, f"many lines: {answer.err[-300:]!r}")
    require(not Path("runs").exists(), "a folder of runs is left")


def _array(write: Callable[[Path], object]) -> None:
    path = Path("own.npz").absolute()
    write(path)
    _refused("run", "--algos", "fedavg", "--rounds", 1, *OFF, "--dataset", f"arrays(path='{path}')", "--out", "runs")


def _saved(**changes: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **own(**changes))


def _header(key: str, shape: tuple[int, ...], descr: str = "|u1") -> Callable[[Path], object]:
    return lambda path: forged(path, key, header(shape, descr) + bytes(2700))


def _cut(path: Path) -> None:
    np.savez(path, **own())
    path.write_bytes(path.read_bytes()[:-200])


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in own():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                stream.write(header((10**9,)))
                for _ in range(100):
                    stream.write(bytes(10**7))


ARRAYS: dict[str, Callable[[Path], object]] = {
    "labels up to 2 10^14": _saved(train_y=np.arange(30) % 3 * 10**14),
    "labels below zero": _saved(train_y=np.arange(30) % 3 - 5),
    "test labels up to 10^18": _saved(test_y=np.arange(9) % 3 * 10**18),
    "labels of 64 bits without a sign": _saved(train_y=np.array([2**64 - 1] * 30, np.uint64)),
    "labels that are fractions": _saved(train_y=np.arange(30) % 3 + 0.5),
    "labels that are texts": _saved(train_y=np.array(["a"] * 30)),
    "images that are NaN": _saved(train_x=np.full((30, 6, 5, 3), np.nan, np.float32)),
    "images of objects": _saved(train_x=np.array([Evil()] * 30, dtype=object)),
    "labels of objects": _saved(train_y=np.array([Evil()] * 30, dtype=object)),
    "no images": _saved(train_x=np.zeros((0, 6, 5, 3), np.uint8), train_y=np.zeros(0, np.int64)),
    "one dimension": _saved(train_x=np.zeros(30, np.uint8)),
    "complex numbers": _saved(train_x=np.zeros((30, 6), np.complex128)),
    "a header of 64 TB": _header("train_x", (TB, 64)),
    "a header beyond all numbers": _header("train_x", (2**62, 2**62)),
    "a header below zero": _header("train_x", (-30, -6, 5, 3)),
    "numbers without bytes": _header("train_y", (TB,), "|V0"),
    "a pickle as a member": lambda path: forged(path, "train_y", pickle.dumps(Evil())),
    "a header of a gigabyte": lambda path: forged(
        path, "train_y", b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**6) + b" " * 10**6
    ),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a file that was cut off": _cut,
    "a bomb of a zip": _zip_bomb,
    "nothing": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(9999)),
    **{f"a {kind}": partial(odd, kind=kind) for kind in ("pipe", "device", "folder", "socket")},
}
for name, write in ARRAYS.items():
    _enter(f"arrays: {name}", partial(_array, write), 90)


def _weights(write: Callable[[Path], object], ending: str) -> None:
    path = Path(f"body{ending}").absolute()
    write(path)
    _refused("run", "--algos", "fedavg", "--rounds", 1, *OFF, "--weights", path, "--out", "runs")


def _torch(value: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import torch

        torch.save(value() if callable(value) else value, path)

    return write


def _promise(path: Path) -> None:
    """A safetensors file whose header is longer than the file."""
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def _shape(path: Path) -> None:
    text = b'{"body.hidden.weight":{"dtype":"F32","shape":[1000000000000,64],"data_offsets":[0,256000000000000]}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle that runs code": (lambda path: path.write_bytes(pickle.dumps(Evil())), ".pth"),
    "a pickle of torch that runs code": (_torch(Evil), ".pth"),
    "a list": (_torch(lambda: [1, 2]), ".pth"),
    "an empty dictionary": (_torch(dict), ".pth"),
    "no tensors": (_torch(lambda: {"a": "b"}), ".pth"),
    "nothing": (lambda path: path.write_bytes(b""), ".pth"),
    "nested pickles": (lambda path: path.write_bytes(b"\x80\x04" + b"]" * 10**6 + b"."), ".pth"),
    "a long number": (lambda path: path.write_bytes(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1)), ".pth"),
    "a promise of a terabyte": (_promise, ".safetensors"),
    "shapes that are not there": (_shape, ".safetensors"),
    "a terabyte of nothing": (_sparse, ".pth"),
    "a terabyte of nothing, safe": (_sparse, ".safetensors"),
}
for name, (write, ending) in WEIGHTS.items():
    _enter(f"weights: {name}", partial(_weights, write, ending))


def _packed(damage: Callable[[bytes], bytes]) -> None:
    """A pack of images that is damaged is refused before a run begins, and no run fails of it."""
    require(bench("data", "pack", "digits", "--imbalance", 10, "--out", "pack.npz").status == 0, "nothing was packed")
    file = Path("pack.npz")
    file.write_bytes(damage(file.read_bytes()))
    _refused("run", "--algos", "fedavg,fedrep", "--rounds", 1, *OFF, "--data-root", "pack.npz", "--out", "runs")


def _flip(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        place = int(len(content) * share)
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return change


for share in (0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
    _enter(f"a pack with one bit changed, at {share:g} of it", partial(_packed, _flip(share)))
_enter("a pack that was cut off", partial(_packed, lambda content: content[: len(content) // 2]))
_enter("a pack of nothing", partial(_packed, lambda content: b""))


def _cifar() -> None:
    """The pickles of CIFAR are read by somebody who knows the few names that they need."""
    from bench import DataDamaged
    from bench.files.official import unpickle

    try:
        unpickle(pickle.dumps(Evil()))
    except DataDamaged as error:
        require("\n" not in str(error), f"{error}")
    else:
        require(False, "it is taken")
    require(not Path("opened").exists(), "code has run")


_enter("a pickle in place of CIFAR's", _cifar)
