"""Images that are decoded when a batch needs them: files in folders by class, or shards in the layout of WebDataset.

Worker threads, one for every usable core, decode the batches of the next steps while a step computes: a batch depends
on (seed, step) alone, so what was read ahead is what would have been read. Pillow lets other threads run meanwhile.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from experiments.training.settings import Settings
from experiments.training.tokens import Batch, generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AHEAD = 2  # batches that are being decoded while one is used
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FOLDER_SUFFIXES = {f".{name}" for name in (*IMAGE_SUFFIXES, "bmp", "gif", "pgm", "ppm", "tif", "tiff")}
SPLITS = ("train", "val")


class Image(NamedTuple):
    """Where an image's file lies: a part of `path` that is `size` bytes long, or all of it."""

    path: Path
    label: int
    offset: int = 0
    size: int = -1


Pending = tuple[list[Future[np.ndarray]], list[int]]  # images under way, and their labels


class ColourImages(Settings):
    """Base of the data sets of images of three channels in files."""

    tag: ClassVar[str] = "name"
    inputs: ClassVar[str] = "images"
    lazy: ClassVar[bool] = True  # load reads no images

    def check_model(self, model: Any) -> None:
        self.require_of(model, "image_size", "channels", "classes")
        self.require(model.channels == 3, f"images have 3 channels, {model.name} has {model.channels}")


@dataclass(frozen=True)
class ImageFolders(ColourImages):
    """`folder`/train/CLASS/* and `folder`/val/CLASS/*, the layout of ImageNet; labels in order of class name. Files
    that do not end as an image's do (FOLDER_SUFFIXES) are left out.

    Training images: a random crop of 8-100% of the area and of aspect 3/4 to 4/3, a mirror image half of the time.
    Validation: the shorter side scaled to image_size / 0.875, the centre cut out.
    """

    name: ClassVar[str] = "image-folders"

    folder: str

    def load(self, model: Any) -> "DecodedImages":
        folder = Path(self.folder)
        paths = _images(folder)
        names = sorted({path.parent.name for path in paths if path.parent.parent.name == "train"})
        self.require(
            len(names) == model.classes,
            f"{folder}/train has {len(names)} classes, {model.name} has {model.classes}",
        )
        label = {name: i for i, name in enumerate(names)}
        unknown = ", ".join(sorted({path.parent.name for path in paths} - label.keys()))
        self.require(not unknown, f"{folder}/val has classes that train has not: {unknown}")
        train, held_out = (
            [Image(path, label[path.parent.name]) for path in paths if path.parent.parent.name == split]
            for split in SPLITS
        )
        return DecodedImages(train, held_out, model.image_size, model.classes)

    def fingerprint(self) -> str:
        """Of the names and sizes of all files, not of their contents."""
        listing = [[str(path.relative_to(self.folder)), path.stat().st_size] for path in _images(Path(self.folder))]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _images(folder: Path) -> list[Path]:
    paths = []
    for split in SPLITS:
        files = (folder / split).glob("*/*")
        found = sorted(path for path in files if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file())
        if not found:
            raise ValueError(f"image-folders: {folder} has no {split}/CLASS/* images; it needs those of train and val")
        paths += found
    return paths


@dataclass(frozen=True)
class ImageShards(ColourImages):
    """`folder`/train-*.tar and `folder`/val-*.tar in the layout of WebDataset: KEY.jpg (or png, webp) and KEY.cls, the
    number of its class.

    The shards' headers are read once and images then directly, in any order; crops are those of ImageFolders.
    """

    name: ClassVar[str] = "image-shards"

    folder: str

    def load(self, model: Any) -> "DecodedImages":
        train, held_out = ([image for path in self._shards(split) for image in _members(path)] for split in SPLITS)
        highest = max(image.label for image in (*train, *held_out))
        self.require(
            highest < model.classes,
            f"{self.folder} has a label {highest}, {model.name} has {model.classes} classes",
        )
        return DecodedImages(train, held_out, model.image_size, model.classes)

    def fingerprint(self) -> str:
        """Of the names and sizes of all shards, not of their contents."""
        listing = [[path.name, path.stat().st_size] for split in SPLITS for path in self._shards(split)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def _shards(self, split: str) -> list[Path]:
        paths = sorted(Path(self.folder).glob(f"{split}-*.tar"))
        self.require(bool(paths), f"{self.folder} has no {split}-*.tar")
        return paths


@cache
def _members(shard: Path) -> list[Image]:
    """The images of a shard. Raises ValueError for an image without a class, and for a shard without images."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                if suffix.lower() in IMAGE_SUFFIXES:
                    places[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    file = tar.extractfile(member)
                    assert file is not None
                    labels[key] = _label(file.read(), member.name)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"image-shards: {shard} is no tar file of images and classes: {error}") from None
    if not places or (alone := places.keys() - labels.keys()):
        what = f"image {min(alone)[1:]} without a .cls" if places else f"no .{', .'.join(IMAGE_SUFFIXES)}"
        raise ValueError(f"image-shards: {shard} has {what}")
    return [Image(shard, labels[key], *place) for key, place in places.items()]


def _label(content: bytes, name: str) -> int:
    if not content.strip().isdigit():
        raise ValueError(f"{name} must be the number of a class, from 0 on; it is {content[:20]!r}")
    return int(content)


class DecodedImages:
    """Batches of image files: float32 (B, 3, H, W), standardized by channel, and labels (B,) int64."""

    def __init__(self, train: list[Image], held_out: list[Image], size: int, classes: int) -> None:
        self.train, self.held_out, self.size, self.classes = train, held_out, size, classes
        self._ahead: dict[tuple[int, int, int], Pending] = {}

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        mine = self._ahead.get((seed, step, batch_size)) or self._drawn(seed, step, batch_size)
        keys = [(seed, later, batch_size) for later in range(step + 1, step + 1 + AHEAD)]
        self._ahead = {key: self._ahead.get(key) or self._drawn(*key) for key in keys}
        return _batch(mine)

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        for i in range(0, len(self.held_out), batch_size):
            yield _batch(self._begin([(image, None) for image in self.held_out[i : i + batch_size]]))

    def _drawn(self, seed: int, step: int, batch_size: int) -> Pending:
        rng = generator(seed, step)
        chosen = [self.train[i] for i in rng.integers(0, len(self.train), size=batch_size)]
        return self._begin(list(zip(chosen, rng.random((batch_size, 5)), strict=True)))

    def _begin(self, items: list[tuple[Image, np.ndarray | None]]) -> Pending:
        futures = [self._threads.submit(decode, image, crop, self.size) for image, crop in items]
        return futures, [image.label for image, _ in items]


def _batch(pending: Pending) -> Batch:
    futures, labels = pending
    pixels = torch.from_numpy(np.stack([future.result() for future in futures]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std, torch.tensor(labels)


def _in_colour(image: Any) -> Any:
    """A Pillow image in RGB, 16 bits as their upper 8: Pillow itself would clip them. Raises ValueError for 32 bits."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range; those of 8 or 16 have")
    return image.convert("RGB")


def decode(file: Image, crop: np.ndarray | None, size: int) -> np.ndarray:
    """A file's image, cropped and scaled: (size, size, 3) uint8.

    crop: five uniform numbers in [0, 1) that choose area, aspect, left, top and mirror; None for the centre. size: of a
    side, in pixels. Raises ValueError, which names the file, for one that Pillow cannot read.
    """
    from PIL import Image as pillow  # only for runs that read image files

    try:
        with file.path.open("rb") as opened:
            opened.seek(file.offset)
            with pillow.open(io.BytesIO(opened.read(file.size))) as read:
                image = _in_colour(read)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        part = f", {file.size} bytes from {file.offset}" if file.size >= 0 else ""
        what = re.sub(r" <.*>", "", str(error))
        raise ValueError(f"{file.path}{part}: no image that can be read ({what}); mend it, or delete it") from None
    width, height = image.size
    if crop is None:
        side = 0.875 * min(width, height)
        box_width, box_height, left, top, mirror = side, side, 0.5, 0.5, False
    else:
        area = width * height * (0.08 + 0.92 * crop[0])
        aspect = (3 / 4) * (16 / 9) ** crop[1]  # log-uniform from 3/4 to 4/3
        box_width, box_height = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
        left, top, mirror = crop[2], crop[3], crop[4] < 0.5
    x, y = left * (width - box_width), top * (height - box_height)
    box = (x, y, x + box_width, y + box_height)
    image = image.resize((size, size), pillow.Resampling.BICUBIC, box=box)
    if mirror:
        image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
