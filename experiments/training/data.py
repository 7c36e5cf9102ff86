"""Data sets: seeded batches that depend on (seed, step) alone, and a fixed held-out split.

A batch is drawn from a generator made for its step, so a resumed run draws what it would have drawn and all arms of an
ablation with one seed see the same batches (common random numbers).

The embedded data need no download: Python's own standard library as bytes, scikit-learn's handwritten digits, and
characters drawn from the fonts that matplotlib ships. **The text differs between Python versions, the characters may
between versions of matplotlib**: every data set has a fingerprint, which a run records (env.json) and a grid compares.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from experiments.training import glyphs, own
from experiments.training.image_files import ImageFolders, ImageShards
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.models.huggingface import TransformersCausalLM, TransformersImageClassifier
from experiments.training.models.vit import ViTConfig
from experiments.training.settings import Settings
from experiments.training.text import HuggingFaceText, TextFile
from experiments.training.token_files import TokenFiles
from experiments.training.tokens import Batch, Tokens, generator

ModelConfig = GPT2Config | ViTConfig | TransformersCausalLM | TransformersImageClassifier | own.Model

# Modules of every Python from 3.11 to 3.14, 5.4 MB together; none that distributions package apart.
TRAINING_MODULES = """
    _collections_abc.py _pydecimal.py _pyio.py _strptime.py argparse.py ast.py base64.py bdb.py calendar.py
    cmd.py codecs.py compileall.py contextlib.py copy.py csv.py dataclasses.py difflib.py dis.py doctest.py
    enum.py filecmp.py fileinput.py fractions.py ftplib.py functools.py getopt.py gettext.py gzip.py heapq.py
    hmac.py imaplib.py inspect.py ipaddress.py mailbox.py mimetypes.py modulefinder.py ntpath.py optparse.py
    os.py pdb.py pickle.py pickletools.py pkgutil.py platform.py plistlib.py poplib.py posixpath.py pprint.py
    pstats.py pyclbr.py pydoc.py queue.py random.py reprlib.py sched.py selectors.py shelve.py shlex.py
    shutil.py smtplib.py socketserver.py ssl.py statistics.py subprocess.py tarfile.py textwrap.py threading.py
    timeit.py tokenize.py trace.py traceback.py typing.py uuid.py wave.py weakref.py zipapp.py
    asyncio/base_events.py asyncio/events.py asyncio/futures.py asyncio/locks.py asyncio/queues.py
    asyncio/selector_events.py asyncio/sslproto.py asyncio/streams.py asyncio/tasks.py asyncio/unix_events.py
    concurrent/futures/_base.py concurrent/futures/process.py email/_header_value_parser.py email/feedparser.py
    email/generator.py email/header.py email/message.py http/client.py http/cookies.py http/server.py
    json/decoder.py json/encoder.py logging/__init__.py logging/config.py multiprocessing/connection.py
    multiprocessing/context.py multiprocessing/managers.py multiprocessing/pool.py multiprocessing/queues.py
    unittest/case.py unittest/loader.py unittest/mock.py urllib/request.py xml/dom/minidom.py
    xml/etree/ElementTree.py xml/sax/expatreader.py
"""
HELD_OUT_MODULES = """
    configparser.py contextvars.py datetime.py glob.py graphlib.py locale.py profile.py py_compile.py socket.py
    symtable.py tempfile.py types.py webbrowser.py zipimport.py asyncio/subprocess.py
    concurrent/futures/thread.py email/charset.py http/cookiejar.py json/scanner.py logging/handlers.py
    multiprocessing/process.py unittest/result.py urllib/parse.py xml/dom/expatbuilder.py
"""


class Data(Protocol):
    """What the training loop needs of a data set."""

    classes: int  # size of the output distribution: a uniform guess has loss ln(classes)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Inputs and targets of `batch_size` examples, a function of the seed and the step (from 0) alone."""
        ...

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out split, in the same batches every time; the last may be smaller."""
        ...


class ImageArrays:
    """Images in memory (N, C, H, W) float32 and their labels (N,) int64; a batch is drawn without replacement."""

    def __init__(self, train: Batch, held_out: Batch, classes: int) -> None:
        self.train, self.held_out, self.classes = train, held_out, classes

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        count = len(self.train[0])
        if batch_size > count:
            raise ValueError(f"batch_size {batch_size} is more than the {count} training images")
        chosen = torch.from_numpy(generator(seed, step).choice(count, batch_size, replace=False))
        return self.train[0][chosen], self.train[1][chosen]

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        images, labels = self.held_out
        for i in range(0, len(images), batch_size):
            yield images[i : i + batch_size], labels[i : i + batch_size]


@dataclass(frozen=True)
class StdlibText(Settings):
    """Python's standard library as a stream of bytes, held out by file. The text is that of the running Python."""

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "stdlib-text"
    inputs: ClassVar[str] = "tokens"

    validation_windows: int = 256
    half: int | None = None  # 1 or 2: train on that half of the training bytes alone

    later: ClassVar[Mapping[str, Any]] = {"half": None}

    def check(self) -> None:
        self.require(self.validation_windows >= 1, "validation_windows must be at least 1")
        self.require(self.half in (None, 1, 2), f"half must be 1, 2 or None, is {self.half}")

    def check_model(self, model: Any) -> None:
        self.require_of(model, "context", "vocab_size")
        self.require(
            model.vocab_size >= 256, f"bytes need a vocab_size of at least 256, {model.name} has {model.vocab_size}"
        )

    def load(self, model: Any) -> Tokens:
        train, held_out = (
            np.frombuffer(_stdlib_bytes(m), dtype=np.uint8) for m in (TRAINING_MODULES, HELD_OUT_MODULES)
        )
        if self.half is not None:
            train = np.array_split(train, 2)[self.half - 1]
        return Tokens(train, held_out, model, self.validation_windows)

    def fingerprint(self) -> str:
        content = hashlib.sha256(_stdlib_bytes(TRAINING_MODULES))
        content.update(_stdlib_bytes(HELD_OUT_MODULES))
        return content.hexdigest()


@lru_cache
def _stdlib_bytes(modules: str) -> bytes:
    """The named sources of the running Python, one after the other."""
    try:
        return b"".join(path.read_bytes() for path in stdlib_files(modules))
    except OSError as error:
        raise ValueError(
            f"stdlib-text reads the sources of the standard library, and this Python lacks one: {error}"
        ) from None


def stdlib_files(modules: str) -> list[Path]:
    """Where the named sources of the running Python lie."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [folder / module for module in modules.split()]


@dataclass(frozen=True)
class Digits(Settings):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, standardized; 360 of a fixed shuffle are held out."""

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "digits"
    inputs: ClassVar[str] = "images"

    def check_model(self, model: Any) -> None:
        wanted = (8, 1, 10)
        got = tuple(getattr(model, name, None) for name in ("image_size", "channels", "classes"))
        self.require(got == wanted, f"digits need image_size, channels, classes {wanted}, {model.name} has {got}")

    def load(self, model: Any) -> ImageArrays:
        pixels, labels = _digits()
        held_out = np.zeros(len(labels), dtype=bool)
        held_out[np.random.default_rng(0).permutation(len(labels))[::5]] = True
        scaled = (pixels - pixels[~held_out].mean()) / pixels[~held_out].std()
        images = torch.from_numpy(scaled.astype(np.float32)).unsqueeze(1)  # (N, 1, 8, 8)
        targets = torch.from_numpy(labels.astype(np.int64))
        keep = torch.from_numpy(~held_out)
        return ImageArrays((images[keep], targets[keep]), (images[~keep], targets[~keep]), model.classes)

    def fingerprint(self) -> str:
        pixels, labels = _digits()
        return hashlib.sha256(pixels.astype("<f8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a second to import: only for runs that use it

    digits = load_digits()
    return digits.images, digits.target  # (N, 8, 8), (N,)


@dataclass(frozen=True)
class Glyphs(Settings):
    """Characters of 16 fonts that matplotlib ships, drawn at random: 36 classes, 16x16 pixels, never the same twice.

    The digits and the capital letters, one font, size, place, slant, tilt, contrast and noise each (ranges in
    glyphs.py). 0 and O look alike in some fonts, and noise hides others: no model reaches an accuracy of 1. Training
    images have no end; `validation_images` of them, each class equally often, are a fixed set under a key of its own.
    """

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "glyphs"
    inputs: ClassVar[str] = "images"

    validation_images: int = 1800

    def check(self) -> None:
        classes = len(glyphs.CHARACTERS)
        self.require(
            self.validation_images >= 1 and self.validation_images % classes == 0,
            f"validation_images must be a positive multiple of the {classes} classes, is {self.validation_images}",
        )

    def check_model(self, model: Any) -> None:
        wanted = (glyphs.SIZE, 1, len(glyphs.CHARACTERS))
        got = tuple(getattr(model, name, None) for name in ("image_size", "channels", "classes"))
        self.require(got == wanted, f"glyphs need image_size, channels, classes {wanted}, {model.name} has {got}")

    def load(self, model: Any) -> "DrawnGlyphs":
        return DrawnGlyphs(self.validation_images)

    def fingerprint(self) -> str:
        return glyphs.fingerprint()


class DrawnGlyphs:
    """The images of Glyphs: float32 (B, 1, 16, 16), standardized, and labels (B,) int64.

    An image depends on (seed, step, its place in the batch) alone. The random words are Philox's own, whose stream
    NumPy promises never to change, under the key (seed, step); the validation set's key has a first word that no seed
    reaches. So no two steps share a key, and none shares the validation set's.
    """

    HELD_OUT_KEY = (2**63, 0)  # a seed is below 2**32

    def __init__(self, validation_images: int) -> None:
        self.classes = len(glyphs.CHARACTERS)
        labels = np.arange(validation_images) % self.classes
        self.held_out = self._images(self._words(self.HELD_OUT_KEY, validation_images), labels)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        if not (0 <= seed < 2**32 and 0 <= step < 2**64):
            raise ValueError(f"seed must lie in [0, 2**32) and step in [0, 2**64), are {seed} and {step}")
        words = self._words((seed, step), batch_size)
        return self._images(words, glyphs.uniform(words[:, -1], 0, self.classes))

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        images, labels = self.held_out
        for i in range(0, len(images), batch_size):
            yield images[i : i + batch_size], labels[i : i + batch_size]

    @staticmethod
    def _words(key: tuple[int, int], count: int) -> np.ndarray:
        """(count, WORDS + 1) uint64: what each image is drawn from, and a word for its label."""
        width = glyphs.WORDS + 1
        return np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(count * width).reshape(count, width)

    @staticmethod
    def _images(words: np.ndarray, labels: np.ndarray) -> Batch:
        pixels = glyphs.draw(words[:, :-1], labels)
        images = (torch.from_numpy(pixels).unsqueeze(1).float() - 88) * (3 / 128)  # mean 0, deviation 1 to 0.1; exact
        return images, torch.from_numpy(labels)


DATA: dict[str, type[Settings]] = {
    data.name: data
    for data in (StdlibText, Digits, Glyphs, TokenFiles, ImageFolders, ImageShards, TextFile, HuggingFaceText)
}
DataConfig = (
    StdlibText | Digits | Glyphs | TokenFiles | ImageFolders | ImageShards | TextFile | HuggingFaceText | own.DataSet
)
