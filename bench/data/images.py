"""Images by number, and how batches are made of them.

Images stay uint8, in one resident tensor or in a file that batches are read from. Normalisation and augmentation are
tensor operations on whole batches, keyed by (client, round, epoch, example), hence the same in every engine. Floating
examples of any shape are treated alike: all but the first axis of one is a row of pixels.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from bench import keys, tree
from bench.dataset import Streamed

AUGMENTATIONS = ("none", "crop", "crop_flip", "batch_crop_flip", "altflip")
"""`crop` and `crop_flip` draw for each image (black padding of 4 pixels, an eighth of images above 32);
`batch_crop_flip` draws once for a whole batch and pads with the mean colour, which is what the CReFF family of codes
does. `altflip` shifts each image within its reflection of 2 pixels (a sixteenth above 32), and mirrors it in every
second pass over it, from the first or from the second on; Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6.
"""

_AT_ONCE = 2**18
"""Numbers of a few batches that are made together: they stay in the cache until they are used."""


class Images:
    """Images by number, and how to make batches of them on one device.

    Args:
        x: (N, channels, height, width) uint8, or floating examples (N, channels, ...): a tensor stays resident on its
            device, a file is read batch by batch.
        y: (N,) int64, on the device.
        mean: Per channel, of pixels in [0, 1], or of floating numbers as they are.
        std: Per channel, likewise.
        augment: One of `AUGMENTATIONS`; "none" unless examples are images.
        scale: The pixel value that stands for 1.0 (255, or 16 for digits; 1 for floating numbers).
        rows: (N,) int64, the row of `x` of each number, where the two are not the same.
        teacher: (N, d) float32, what a teacher makes of each, on the device; None: there is none.
        mirrored: (N,) bool, which are mirrored in the first pass over them, on the device, where `augment` alternates;
            None: none is.
    """

    def __init__(
        self,
        x: Tensor | Streamed,
        y: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: str = "none",
        scale: float = 255.0,
        rows: Tensor | None = None,
        teacher: Tensor | None = None,
        mirrored: Tensor | None = None,
    ) -> None:
        self.y, self.augment, self.shape, self.rows, self.scale = y, augment, tuple(x.shape[1:]), rows, scale
        self.teacher = teacher
        self.mirrored = torch.zeros_like(y, dtype=torch.bool) if mirrored is None else mirrored
        self.box = self.shape if len(self.shape) == 3 else (self.shape[0], 1, math.prod(self.shape[1:]))
        self.device = y.device
        self.pad = (
            0 if augment == "none" else max(2, self.box[1] // 16) if self.alternates else max(4, self.box[1] // 8)
        )
        colour = torch.tensor(mean) if augment.startswith("batch") else torch.zeros(len(mean))
        self.colour = (colour * scale).round().to(x.dtype).to(self.device)
        self.factor = (1.0 / (scale * torch.tensor(std))).to(self.device)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).to(self.device)
        # Of pixels a product and a sum are exact enough; of numbers far from zero their difference would be lost.
        self.shift = torch.tensor(mean).to(self.device) if x.dtype.is_floating_point else None
        self.streamed = None if isinstance(x, Tensor) else x
        # Padded once for all: a crop is then one gather.
        self.x = self._padded(x if rows is None else x[rows]) if isinstance(x, Tensor) else None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def alternates(self) -> bool:
        """Whether an image's orientation hangs on how often it was seen before."""
        return self.augment == "altflip"

    def gather(self, index: Tensor) -> tuple[Images, Tensor]:
        """Make images resident: for code that cannot read a file, such as a mapped one.

        Args:
            index: Any shape, int64, the numbers that will be asked for.

        Returns:
            Images with at least these, and the index of the same shape for them.
        """
        if self.streamed is None:
            return self, index
        numbers, places = index.unique(return_inverse=True)
        resident = copy.copy(self)
        resident.y, resident.rows, resident.streamed = self.y[numbers], None, None
        resident.teacher = None if self.teacher is None else self.teacher[numbers]
        resident.mirrored = self.mirrored[numbers]
        resident.x = self._padded(self._read(numbers))
        return resident, places

    def resident(self, most: int) -> Images:
        """Give the same images in memory, if that takes at most so many bytes: a few megabytes of features are read
        sooner at once than row by row.
        """
        if self.streamed is None or len(self) * math.prod(self.shape) * self.streamed.dtype.itemsize > most:
            return self
        return self.gather(torch.arange(len(self), device=self.device))[0]

    def prefetch(self, index: Tensor) -> None:
        """Tell which images will be asked for soon, in this order; those in memory are there already."""
        if self.streamed is not None:
            self.streamed.prefetch(self._rows(index))

    def batches_at_once(self, size: int) -> int:
        """Say how many batches are made together, of which a step then takes its own, with the bits of one by itself.

        One, where images are read from a file, where a draw is a whole batch's, and where a batch would not begin where
        vectors of a processor do, on which a product's bits may depend.
        """
        pixels = size * math.prod(self.shape)
        if self.streamed is not None or self.augment.startswith("batch") or pixels % 16:
            return 1
        return max(1, _AT_ONCE // max(pixels, 1))

    def plain(self, index: Tensor) -> Tensor:
        """Give images without augmentation: (B, channels, height, width) float32, or (B, channels, ...)."""
        if self.x is None:
            return self._normalise(self._read(index).permute(0, 2, 3, 1))
        _, height, width = self.box
        inner = self.x[:, self.pad : self.pad + height, self.pad : self.pad + width]
        return self._normalise(inner[index])

    def augmented(self, index: Tensor, key: Tensor, example: Tensor, seen: Tensor | int = 0) -> Tensor:
        """Give randomly shifted and flipped images.

        Args:
            index: (B,) rows.
            key: () int64, of the client, round and epoch.
            example: (B,) what each draw depends on: the number of the example within its client, or its place in the
                epoch where an example may come twice.
            seen: () or (B,) int64, passes over each image before this one, where they alternate.
        """
        if self.augment == "none":
            return self.plain(index)
        if self.augment.startswith("batch"):
            key, example = keys.fold(key, example[0]), torch.zeros_like(example)
        draws = keys.fold(key, example)
        _, height, width = self.box
        down, right = (draws >> 8) & 0xFFFF, (draws >> 24) & 0xFFFF
        column = torch.arange(width, device=index.device)
        if self.augment.endswith("flip"):
            odd = (self.mirrored[index] + seen if self.alternates else draws >> 40) & 1
            column = torch.where(odd.bool()[:, None], width - 1 - column, column)
        row = torch.arange(height, device=index.device) + (down % (2 * self.pad + 1))[:, None]
        column = column + (right % (2 * self.pad + 1))[:, None]
        pixels = self.x
        if pixels is None:
            pixels, index = self._padded(self._read(index)), torch.arange(len(index), device=index.device)
        return self._normalise(pixels[index[:, None, None], row[:, :, None], column[:, None, :]])

    def _rows(self, index: Tensor) -> Tensor:
        return index.cpu() if self.rows is None else self.rows[index.cpu()]

    def _read(self, index: Tensor) -> Tensor:
        """Read (B, channels, height, width) from the file."""
        assert self.streamed is not None
        return tree.bring(self.streamed[self._rows(index)], self.device).reshape(len(index), *self.box)

    def _padded(self, x: Tensor) -> Tensor:
        """Give images channels last, with a border: (B, height + 2 pad, width + 2 pad, channels)."""
        channels, height, width = self.box
        if self.alternates:
            down, across = (_reflected(side, self.pad, x.device) for side in (height, width))
            upright = x.reshape(len(x), *self.box).permute(0, 2, 3, 1)
            return tree.bring(upright[:, down][:, :, across].contiguous(), self.device)
        size = (len(x), height + 2 * self.pad, width + 2 * self.pad, channels)
        padded = self.colour.expand(size).clone(memory_format=torch.contiguous_format)
        padded[:, self.pad : self.pad + height, self.pad : self.pad + width] = x.reshape(len(x), *self.box).permute(
            0, 2, 3, 1
        )
        return padded

    def _normalise(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(torch.float32)
        pixels = pixels * self.factor + self.offset if self.shift is None else (pixels - self.shift) * self.factor
        examples = pixels.permute(0, 3, 1, 2)
        return examples if self.box == self.shape else examples.reshape(len(examples), *self.shape)


def _reflected(side: int, pad: int, device: torch.device) -> Tensor:
    """Number the places of a line with its reflection at both ends, the ends themselves once: (side + 2 pad,) int64."""
    place = torch.arange(-pad, side + pad, device=device).abs()
    return (side - 1 - (side - 1 - place).abs()).clamp(min=0)
