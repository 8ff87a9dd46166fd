"""iNaturalist 2018 and 2019: photographs of 8,142 and 1,010 species, long-tailed as nature and people made them.

Grant Van Horn, Oisin Mac Aodha, Yang Song, Yin Cui, Chen Sun, Alex Shepard, Hartwig Adam, Pietro Perona, Serge
Belongie. The iNaturalist species classification and detection dataset. CVPR 2018. https://arxiv.org/abs/1707.06642
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bench import register
from bench.files.download import Remote
from bench.files.lists import Entries, Known, Listed

CLASSES = {2018: 8142, 2019: 1010}
_TRAIN_2018, _TEST_2018 = "4accdb7584d2f0a5106c40a33ed6afa392189bcc", "4c23900857fd0f5adcd4cc0dffef345039eeb05f"
KNOWN = {
    2018: (
        Known(
            images=437_513,
            per_class=(2, 1000),
            digests={"train2018.json": _TRAIN_2018, "iNaturalist18_train.txt": _TRAIN_2018},
        ),
        Known(
            images=24_426,
            per_class=(3, 3),
            digests={"val2018.json": _TEST_2018, "iNaturalist18_val.txt": _TEST_2018},
        ),
    ),
    2019: (
        Known(
            images=265_213,
            per_class=(16, 500),
            digests={"iNaturalist19_train.txt": "0fbd14841ff6d5f9c24d48ce1780a1035d6352b9"},
        ),
        Known(
            images=3_030,
            per_class=(3, 3),
            users=2_109,
            digests={"val2019.json": "eb6c0c4c19ede1fbde148a0f56ba6f5ea67a0afe"},
        ),
    ),
}
"""The lists of 2018 as git has them in github.com/facebookresearch/classifier-balancing, made from the JSONs in their
order. The training JSON of 2019 we have not seen: of it only the numbers are checked.
"""
MD5 = {
    2018: ("b1c6952ce38f31868cc50ea72d066cc3", "bfa29d89d629cbf04d826a720c0a68b0", "f2ed8bfe3e9901cdefceb4e53cd3775d"),
    2019: ("c60a6e2962c9b8ccbd458d12c8582644", "b06a6683537867c0d5c7a45f407a306d", "5cc5509b0fe495f1c8c1362612448497"),
}
"""Of the archives of photographs, training and validation JSON: github.com/visipedia/inat_comp, 2018 and 2019."""


@register("inat")
@dataclass(frozen=True, kw_only=True)
class Inat(Listed):
    """The official training part for training (2018: 437,513 photographs, 2-1,000 of a class; 2019: 265,213, 16-500),
    the official validation part for testing (24,426 and 3,030, three of a class).

    Lies in `inat2018` (`inat2019`): `train2018.json` and `val2018.json`, or the lists `iNaturalist18_train.txt` and
    `iNaturalist18_val.txt`, whose lines are a path and a class, each also packed (.xz, .gz), and the photographs in
    `train_val2018/`. The natural users are the rights holders that the JSON names; a part read from a list has none.
    """

    tail = "natural"
    quick: ClassVar[Mapping[str, object]] = {"batch_size": 64}
    licence: ClassVar[str] = (
        "non-commercial research and education, no redistribution; each photograph has its own besides"
    )
    citation: ClassVar[str] = (
        "Van Horn et al., The iNaturalist species classification and detection dataset, CVPR 2018, "
        "https://arxiv.org/abs/1707.06642"
    )
    by_hand: ClassVar[str] = (
        "unpack the three archives of https://github.com/visipedia/inat_comp (training and validation images, training "
        "annotations, validation annotations) in {home}"
    )

    version: Literal[2018, 2019] = 2018
    """Of the competition."""

    @property
    def size(self) -> str:  # type: ignore[override]
        """Of the download."""
        return {2018: "120 GB", 2019: "74 GB"}[self.version]

    @property
    def source(self) -> str:  # type: ignore[override]
        """Where the official files are described."""
        return f"https://github.com/visipedia/inat_comp/tree/master/{self.version}"

    @property
    def home(self) -> str:
        """Of this version."""
        return f"inat{self.version}"

    @property
    def folder_name(self) -> str:
        """With the version."""
        return super().folder_name.replace("inat", f"inat-{self.version}", 1)

    @property
    def all_classes(self) -> int:
        """Species."""
        return CLASSES[self.version]

    @property
    def known(self) -> tuple[Known, Known]:
        """Of this version."""
        return KNOWN[self.version]

    @property
    def remotes(self) -> tuple[Remote, ...]:
        """Three archives."""
        bucket = f"https://ml-inat-competition-datasets.s3.amazonaws.com/{self.version}"
        names = (
            f"train_val{self.version}.tar.gz",
            f"train{self.version}.json.tar.gz",
            f"val{self.version}.json.tar.gz",
        )
        return tuple(
            Remote(f"{bucket}/{name}", name, md5=md5, unpack=True)
            for name, md5 in zip(names, MD5[self.version], strict=True)
        )

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """Read each part from its JSON, else from its list."""
        year, short = self.version, self.version % 100
        found = self.find(
            folder,
            (f"train{year}.json", f"iNaturalist{short}_train.txt"),
            (f"val{year}.json", f"iNaturalist{short}_val.txt"),
        )
        train, test = map(self.read, found)
        for part in (train, test):
            other = (path for path in part.paths if not path.startswith(f"train_val{year}/"))
            self.refuse(part.source, f"photographs that are not of {year}, in train_val{year}/", other)
        return train, test
