"""Data sets of text that become tokens when a run begins: a text file, or a folder of Hugging Face's `datasets`.

The tokenizer file is the `tokenizer.json` of the package tokenizers, which transformers writes too. A process keeps its
last texts as tokens, so that the runs of a grid share them. For gigabytes of text make token files once (`TokenFiles`).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.training.settings import Settings, choose
from experiments.training.tokens import Tokens

PIECE = 1 << 20  # characters made into tokens at once; while it is made, a token takes about a hundred bytes
MIB = 1 << 20
Stamp = tuple[int, int]  # of a file: when it was changed, in ns, and its size; another one is read again


@dataclass(frozen=True)
class TextFile(Settings):
    """A UTF-8 text file, of whose tokens the last `held_out_share` are the held-out split.

    It is made into tokens in pieces of about a million characters that end with a line; no token spans two pieces.
    """

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "text-file"
    inputs: ClassVar[str] = "tokens"

    file: str
    tokenizer: str  # a tokenizer.json
    held_out_share: float = 0.1
    validation_windows: int = 256

    def check(self) -> None:
        self.require(0 < self.held_out_share < 1, "held_out_share must lie between 0 and 1")
        self.require(self.validation_windows >= 1, "validation_windows must be at least 1")

    def check_model(self, model: Any) -> None:
        self.require_of(model, "context", "vocab_size")
        _check_vocabulary(self.tokenizer, model)

    def load(self, model: Any) -> Tokens:
        stream = _tokens_of_file(self.file, _stamp(self.file), self.tokenizer, _stamp(self.tokenizer))
        cut = round(len(stream) * (1 - self.held_out_share))
        return Tokens(stream[:cut], stream[cut:], model, self.validation_windows)

    def fingerprint(self) -> str:
        return hashlib.sha256(_bytes(self.file) + _bytes(self.tokenizer)).hexdigest()


@dataclass(frozen=True)
class HuggingFaceText(Settings):
    """A column of text of a local folder that `datasets` reads: one of `save_to_disk`, or of Parquet, JSON, ... files.

    The documents of a split follow each other. After each stands the `separator`, a token of the tokenizer such as
    "<|endoftext|>", where one is given.
    """

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "huggingface-text"
    inputs: ClassVar[str] = "tokens"

    folder: str
    tokenizer: str  # a tokenizer.json
    column: str = "text"
    train: str = "train"  # the names of the two splits
    held_out: str = "validation"
    separator: str | None = None
    validation_windows: int = 256

    def check(self) -> None:
        self.require(self.validation_windows >= 1, "validation_windows must be at least 1")

    def check_model(self, model: Any) -> None:
        self.require_of(model, "context", "vocab_size")
        _check_vocabulary(self.tokenizer, model)
        if self.separator is not None:
            choose(_tokenizer(self.tokenizer, _stamp(self.tokenizer)).get_vocab(), self.separator, "separator token")

    def load(self, model: Any) -> Tokens:
        stamps = (_stamp(self.tokenizer), *map(_stamp, _files(self.folder)))
        train, held_out = (
            _tokens_of_split(self.folder, stamps, self.tokenizer, self.column, split, self.separator)
            for split in (self.train, self.held_out)
        )
        return Tokens(train, held_out, model, self.validation_windows)

    def fingerprint(self) -> str:
        """A hash of the tokenizer, and of the names, sizes, first and last MiB of the folder's files."""
        content = hashlib.sha256(_bytes(self.tokenizer))
        for path in _files(self.folder):
            size = path.stat().st_size
            content.update(f"{path.relative_to(self.folder)} {size}\n".encode())
            with path.open("rb") as file:
                content.update(file.read(MIB))
                file.seek(max(0, size - MIB))
                content.update(file.read())
        return content.hexdigest()


def _check_vocabulary(tokenizer: str, model: Any) -> None:
    """Raises ValueError for a model that does not know all tokens."""
    needed = 1 + max(_tokenizer(tokenizer, _stamp(tokenizer)).get_vocab().values())
    if model.vocab_size < needed:
        raise ValueError(
            f"{tokenizer} has {needed} tokens, {model.name} has vocab_size {model.vocab_size}; take at least {needed}"
        )


@lru_cache(maxsize=4)
def _tokenizer(path: str, stamp: Stamp) -> Any:
    """The tokenizer of that file, which neither cuts nor pads. Raises ValueError."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("text with a tokenizer file needs the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{path} is no tokenizer file ({error}); expected a tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=2)
def _tokens_of_file(file: str, stamp: Stamp, tokenizer: str, tokenizer_stamp: Stamp) -> np.ndarray:
    try:
        text = _bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}") from None
    return _encoded(_pieces(text), _tokenizer(tokenizer, tokenizer_stamp), None)


@lru_cache(maxsize=4)
def _tokens_of_split(
    folder: str, stamps: tuple[Stamp, ...], tokenizer: str, column: str, split: str, separator: str | None
) -> np.ndarray:
    try:
        import datasets
    except ImportError:
        raise ValueError("a folder of Hugging Face's datasets needs their package: pip install datasets") from None
    saved = any((Path(folder) / name).exists() for name in ("dataset_dict.json", "state.json"))
    found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder)
    splits = dict(found) if isinstance(found, dict) else {"(a table without splits)": found}
    documents = choose(splits, split, f"split of {folder}")
    columns = {name: documents.select_columns([name]) for name in documents.column_names}
    texts = (row[column] for row in choose(columns, column, f"column of {folder}"))
    return _encoded(texts, _tokenizer(tokenizer, stamps[0]), separator)


def _encoded(texts: Iterable[str], tokenizer: Any, separator: str | None) -> np.ndarray:
    """(number of tokens,) unsigned: the tokens of all texts, one after the other."""
    vocabulary = tokenizer.get_vocab()
    dtype = np.uint16 if max(vocabulary.values()) < 1 << 16 else np.uint32
    after = np.array([] if separator is None else [vocabulary[separator]], dtype)
    parts = [np.array([], dtype)]
    for text in texts:
        parts += [np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype), after]
    return np.concatenate(parts)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE)
        end = newline + 1 or len(text)
        yield text[start:end]
        start = end


def _files(folder: str) -> list[Path]:
    """What a folder of datasets holds, less what the package caches there. Raises ValueError where that is nothing."""
    found = sorted(
        path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(("cache-", "."))
    )
    if not found:
        raise ValueError(f"{folder} holds no files; expected a folder that `save_to_disk` of datasets wrote")
    return found


def _bytes(path: str) -> bytes:
    _stamp(path)
    return Path(path).read_bytes()


def _stamp(path: str | Path) -> Stamp:
    """When a file was changed, and its size. Raises ValueError where there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    stat = Path(path).stat()
    return stat.st_mtime_ns, stat.st_size
