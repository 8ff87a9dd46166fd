"""ImageNet-LT: 1,000 classes of ImageNet, cut to a long tail: a Pareto distribution with power 6.

Ziwei Liu, Zhongqi Miao, Xiaohang Zhan, Jiayun Wang, Boqing Gong, Stella X. Yu. Large-scale long-tailed recognition in
an open world. CVPR 2019. https://arxiv.org/abs/1904.05160
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import register
from bench.files.lists import Entries, Known, Listed


@register("imagenet_lt")
@dataclass(frozen=True, kw_only=True)
class ImagenetLT(Listed):
    """115,846 training photographs, 5-1,280 of a class, and for testing ImageNet's validation part, 50,000, 50 of a
    class. The list `ImageNet_LT_val.txt`, 20,000 further training photographs, is not used.

    Lies in `imagenet`: the two lists (also packed: .xz, .gz) beside ImageNet's folders `train/<wnid>/` and
    `val/<wnid>/`, the official archives with the validation photographs sorted in a folder per class; `train` and
    `val` may be symbolic links.
    """

    all_classes: ClassVar[int] = 1000
    home: ClassVar[str] = "imagenet"
    known: ClassVar[tuple[Known, Known]] = (
        Known(
            images=115_846,
            per_class=(5, 1280),
            digests={"ImageNet_LT_train.txt": "a063f095fcd475db4cf8b0658c4b73955535bbf9"},
        ),
        Known(
            images=50_000,
            per_class=(50, 50),
            digests={"ImageNet_LT_test.txt": "76a2fb9749d6cd29e765cc4f8c270f2504131e2f"},
        ),
    )
    """The lists as git has them in github.com/facebookresearch/classifier-balancing."""
    tail = "natural"
    quick: ClassVar[Mapping[str, object]] = {"batch_size": 64}
    size: ClassVar[str] = "about 145 GB"
    licence: ClassVar[str] = "ImageNet's terms: non-commercial research and education, after registering"
    citation: ClassVar[str] = (
        "Liu et al., Large-scale long-tailed recognition in an open world, CVPR 2019, https://arxiv.org/abs/1904.05160"
    )
    source: ClassVar[str] = (
        "https://image-net.org, and the lists of https://github.com/facebookresearch/classifier-balancing"
    )
    by_hand: ClassVar[str] = (
        "register at https://image-net.org and unpack ILSVRC2012's training and validation images in {home}/train and "
        "{home}/val, a folder per class, and put ImageNet_LT_train.txt and ImageNet_LT_test.txt beside them, of "
        "https://github.com/facebookresearch/classifier-balancing (data/ImageNet_LT)"
    )

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """Read the two lists."""
        train, test = self.find(folder, ("ImageNet_LT_train.txt",), ("ImageNet_LT_test.txt",))
        return self.read(train), self.read(test)
