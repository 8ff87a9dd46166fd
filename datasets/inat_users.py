"""iNaturalist-User-120k: photographs of 1,203 species, whose 9,275 photographers are the clients.

Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. Federated visual classification with real-world data distribution. ECCV
2020. https://arxiv.org/abs/2003.08082
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench import register
from bench.files.download import Remote
from bench.files.lists import Entries, Known, Listed, is_number, read_names, read_table, repeated

SPLIT = "inaturalist-user-120k"
BUCKET = "https://ml-inat-competition-datasets.s3.amazonaws.com/2017"
REMOTES = (
    Remote(
        f"https://storage.googleapis.com/gresearch/federated-vision-datasets/{SPLIT}.zip", f"{SPLIT}.zip", unpack=True
    ),
    Remote(f"{BUCKET}/train_val2017.zip", "train_val2017.zip", "444c835f6459867ad69fcb36478786e7", unpack=True),
    Remote(
        f"{BUCKET}/train_val_images.tar.gz",
        "train_val_images.tar.gz",
        "7c784ea5e424efaec655bd392f87301f",
        bytes=199_332_058_343,
        unpack=True,
    ),
)


@register("inat_users")
@dataclass(frozen=True, kw_only=True)
class InatUsers(Listed):
    """120,300 training photographs of 9,275 users, and 35,641 for testing, which have no users.

    Lies in `inat2017`: `federated_train_user_120k.csv` (columns user_id, image_id, class, label) and `test.csv`
    (without user_id), there or in `inaturalist-user-120k/`; `train2017.json` and `val2017.json` of iNaturalist 2017,
    and its photographs in `train_val_images/`. Lists may be packed (.xz, .gz).

    The columns are those of the authors' README. That an image_id is a photograph's file name without `.jpg` is how
    TensorFlow Federated and others read it, and so is the number of test photographs; the CSVs themselves we have not
    seen. Should photographs be in neither JSON, those of a `test2017.json` beside them are looked at too.
    """

    one_folder_per_class: ClassVar[bool] = False  # classes are the authors', folders iNaturalist's
    all_classes: ClassVar[int] = 1203
    home: ClassVar[str] = "inat2017"
    known: ClassVar[tuple[Known, Known]] = (Known(images=120_300, users=9_275), Known(images=35_641))
    tail = "natural"
    own_clients: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, object]] = {"participation": 0.01, "rounds": 100, "eval_every": 50}
    size: ClassVar[str] = "199 GB"
    licence: ClassVar[str] = (
        "non-commercial research and education, no redistribution; each photograph has its own besides"
    )
    citation: ClassVar[str] = (
        "Hsu, Qi, Brown, Federated visual classification with real-world data distribution, ECCV 2020, "
        "https://arxiv.org/abs/2003.08082"
    )
    source: ClassVar[str] = (
        "https://github.com/google-research/google-research/tree/master/federated_vision_datasets and "
        "https://github.com/visipedia/inat_comp/tree/master/2017"
    )
    by_hand: ClassVar[str] = (
        "unpack in {home} inaturalist-user-120k.zip of https://github.com/google-research/google-research "
        "(federated_vision_datasets), and train_val2017.zip and train_val_images.tar.gz of "
        "https://github.com/visipedia/inat_comp (2017)"
    )
    remotes: ClassVar[tuple[Remote, ...]] = REMOTES

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """Read the two CSVs, and where their photographs are from the JSONs."""
        train, test, *lists = self.find(
            folder,
            (f"{SPLIT}/federated_train_user_120k.csv", "federated_train_user_120k.csv"),
            (f"{SPLIT}/test.csv", "test.csv"),
            ("train2017.json", "train_val2017/train2017.json"),
            ("val2017.json", "train_val2017/val2017.json"),
        )
        columns = ["image_id", "class", "label"]
        tables = [read_table(train, ["user_id", *columns], self.again()), read_table(test, columns, self.again())]
        wanted = {image for table in tables for image in table["image_id"]}
        lists += [path for path in (folder / "test2017.json",) if path.is_file()]
        places = self._places(lists, wanted)
        first, second = (self._entries(path, table, places) for path, table in zip((train, test), tables, strict=True))
        self._check_species(train, tables)
        return first, second

    def _places(self, lists: list[Path], wanted: set[str]) -> dict[str, str]:
        """Give the path of each wanted image id."""
        listed = (path for file in lists for path in read_names(file, self.again()))
        named = ((path.rpartition("/")[2].removesuffix(".jpg"), path) for path in listed)
        pairs = {pair for pair in named if pair[0] in wanted}
        twice = repeated(image for image, _ in pairs)
        self.refuse(lists[0].parent, "image ids of the CSVs that several photographs have", sorted(map(str, twice)))
        return dict(pairs)

    def _entries(self, source: Path, table: dict[str, list[str]], places: Mapping[str, str]) -> Entries:
        absent = (image for image in table["image_id"] if image not in places)
        self.refuse(source, "image ids that are not in train2017.json or val2017.json", absent)
        odd = (text for text in table["class"] if not is_number(text))
        self.refuse(source, "classes that are no numbers", odd)
        labels = np.array([int(text) for text in table["class"]], dtype=np.int64)
        return Entries(source, [places[image] for image in table["image_id"]], labels, table.get("user_id"))

    def _check_species(self, source: Path, tables: list[dict[str, list[str]]]) -> None:
        """Refuse a label of iNaturalist that stands for two classes."""
        pairs = {pair for table in tables for pair in zip(table["label"], table["class"], strict=True)}
        self.refuse(source.parent, "labels of the CSVs with several classes", repeated(label for label, _ in pairs))
