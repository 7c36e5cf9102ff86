"""Makes small data in the layouts of real ones: the standard library as shards of tokens, glyphs as shards of images.

With them a grid of real size can be tried on a small machine, on the very path that its data take. Nothing is
downloaded.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.training import glyphs
from experiments.training.data import HELD_OUT_MODULES, TRAINING_MODULES, stdlib_files
from experiments.training.token_files import texts_of, tokenizer, write_tokens

IMAGES = {"train": 7200, "val": 1800}
IMAGES_PER_SHARD = 1800
SCALE = 2  # pixels of an image file, across and down, for one of a glyph


def write_text(output: Path) -> dict[str, int]:
    """A folder of tokens: the bytes of the standard library, as stdlib-text has them. Returns the tokens by split."""
    texts = {"train": TRAINING_MODULES, "val": HELD_OUT_MODULES}
    return write_tokens(
        output,
        {split: texts_of(stdlib_files(modules)) for split, modules in texts.items()},
        tokenizer("bytes"),
        shard_tokens=2**21,
    )


def write_images(output: Path) -> dict[str, int]:
    """A folder of shards of 32 x 32 pixels in colour, 36 classes equally often. Returns the images by split.

    Raises: ValueError where the folder exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists; give another folder, or delete it")
    part = output.with_name(output.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for key, (split, count) in enumerate(IMAGES.items()):
        files = _files(key, count)
        for shard in range(0, count, IMAGES_PER_SHARD):
            with tarfile.open(
                part / f"{split}-{shard // IMAGES_PER_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT
            ) as tar:
                for _ in range(shard, min(shard + IMAGES_PER_SHARD, count)):
                    for name, content in next(files):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    part.replace(output)
    return dict(IMAGES)


def _files(key: int, count: int) -> Iterator[list[tuple[str, bytes]]]:
    """For each of `count` images its files, as (name, content): the pixels and the class. key: of the draws."""
    from PIL import Image

    words = np.random.Philox(key=np.array([2**63, 1 + key], dtype=np.uint64)).random_raw(count * glyphs.WORDS)
    labels = np.arange(count) % len(glyphs.CHARACTERS)
    pixels = glyphs.draw(words.reshape(count, glyphs.WORDS), labels)  # (N, 16, 16) uint8
    for i, (image, label) in enumerate(zip(pixels.repeat(SCALE, 1).repeat(SCALE, 2), labels, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).convert("RGB").save(file, "png")
        yield [(f"{i:06d}.png", file.getvalue()), (f"{i:06d}.cls", str(label).encode())]
