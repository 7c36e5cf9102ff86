"""The data set of tokens in files, which are read as a batch needs them; and `write_tokens`, which makes such files.

A folder of tokens holds `train.bin` and `val.bin`, the usual layout of prepared OpenWebText, or shards of them,
`train-00000.bin` and so on, which are one stream: how it is cut changes no batch. `tokens.json` beside them says the
type of a token; without it a token is a uint16.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.training.record import write_json
from experiments.training.settings import Settings
from experiments.training.tokens import Shards, Tokens

SPLITS = ("train", "val")
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**22  # of the texts that a tokenizer gets at once
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class TokenFiles(Settings):
    """The tokens of a folder, which `lpsim data prepare` makes or which have the usual layout of OpenWebText."""

    tag: ClassVar[str] = "name"
    name: ClassVar[str] = "token-files"
    inputs: ClassVar[str] = "tokens"
    lazy: ClassVar[bool] = True  # load reads no tokens

    folder: str
    validation_windows: int = 256

    def check(self) -> None:
        self.require(self.validation_windows >= 1, "validation_windows must be at least 1")

    def check_model(self, model: Any) -> None:
        self.require_of(model, "context", "vocab_size")
        described = self._described()
        if described is None:
            self.require(
                model.vocab_size <= 2**16, f"uint16 tokens reach 65535, {model.name} has vocab_size {model.vocab_size}"
            )
        else:
            self.require(
                described["vocab_size"] <= model.vocab_size,
                f"the tokens of {self.folder} are of {described['vocab_size']} kinds, {model.name} has vocab_size "
                f"{model.vocab_size}",
            )

    def load(self, model: Any) -> Tokens:
        self.check_model(model)  # the folder may have been filled since
        return Tokens(self._stream("train"), self._stream("val"), model, self.validation_windows)

    def fingerprint(self) -> str:
        """A hash of all files' sizes and first and last MiB: they are too large to be read before every run."""
        content = hashlib.sha256()
        for split in SPLITS:
            for part in self._parts(split):
                content.update(str(len(part)).encode() + part[: 2**19].tobytes() + part[-(2**19) :].tobytes())
        return content.hexdigest()

    def _stream(self, split: str) -> np.ndarray | Shards:
        parts = self._parts(split)
        return parts[0] if len(parts) == 1 else Shards(parts)

    def _parts(self, split: str) -> list[np.ndarray]:
        described = self._described()
        kind = np.dtype("<u2" if described is None else described["dtype"])
        paths = sorted(Path(self.folder).glob(f"{split}-*.bin")) or [Path(self.folder) / f"{split}.bin"]
        try:
            return [np.memmap(path, dtype=kind, mode="r") for path in paths]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"token-files: cannot map {paths[0]} ({error}); the folder must hold train.bin and val.bin, or their "
                "shards; `lpsim data prepare` makes them"
            ) from None

    def _described(self) -> dict[str, Any] | None:
        path = Path(self.folder) / "tokens.json"
        try:
            described = json.loads(path.read_bytes())
            return {"dtype": np.dtype(described["dtype"]).str, "vocab_size": int(described["vocab_size"])}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"token-files: {path} must be an object with dtype, such as <u2, and vocab_size; without the file a "
                "token is a uint16"
            ) from None


@dataclass(frozen=True)
class Tokenizer:
    """encode: texts to token numbers, of which there are `vocab_size`; `end` is set after every text."""

    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    vocab_size: int
    end: int
    source: dict[str, str]  # what tokens.json says of it


def tokenizer(name: str, end_token: str | None = None) -> Tokenizer:
    """The tokenizer in a file, or "bytes", whose tokens are the bytes of UTF-8.

    A file is a tokenizer.json of the package tokenizers, or ranks of the package tiktoken (NAME.tiktoken), whose texts
    are split by the pattern of GPT-2. end_token: the word that ends a text; by default the first known one.
    Raises: ValueError for a file that cannot be read, a package that is missing, an unknown end.
    """
    if name == "bytes":
        if end_token is not None:
            raise ValueError("the tokenizer bytes ends a text with a token of its own; leave --end-token out")
        return Tokenizer(lambda texts: [list(text.encode()) for text in texts], 257, 256, {"file": "bytes"})
    path = Path(name)
    try:
        source = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}; give a file, or bytes") from None
    try:
        if path.suffix == ".tiktoken":
            return _tiktoken(path, source, end_token)
        return _tokenizers(path, source, end_token)
    except ImportError as error:
        raise ValueError(f"{path} needs a package: pip install 'lpsim[data]' ({error})") from None


def _tiktoken(path: Path, source: dict[str, str], end_token: str | None) -> Tokenizer:
    import base64

    import tiktoken

    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(
            f"{path}: every line must be a token in base64 and its rank, as tiktoken has it: {error}"
        ) from None
    if len(set(ranks.values())) < len(lines) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError(f"{path}: all 256 bytes must be tokens, and every token and rank be there once")
    end = max(ranks.values()) + 1
    special = {end_token or END_TOKENS[0]: end}
    encoding = tiktoken.Encoding(path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding.encode_ordinary_batch, end + 1, end, source)


def _tokenizers(path: Path, source: dict[str, str], end_token: str | None) -> Tokenizer:
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer.json of the package tokenizers: {error}") from None
    made.no_truncation()  # both are of a model's inputs, and often saved with it
    made.no_padding()
    wanted = END_TOKENS if end_token is None else (end_token,)
    ends = [end for word in wanted if (end := made.token_to_id(word)) is not None]
    if not ends:
        raise ValueError(f"{path} has none of {', '.join(wanted)} to end a text with; name another one")

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in made.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(encode, 1 + max(made.get_vocab().values()), ends[0], source)


def split_files(folder: Path, suffixes: Sequence[str], validation: float) -> dict[str, list[Path]]:
    """The text files below a folder by split: a share of them, chosen by a hash of their names, is held out.

    Raises: ValueError for no such folder, for fewer than two files and for a share that leaves nothing.
    """
    if not 0 < validation < 1:
        raise ValueError(f"the held-out share must lie between 0 and 1, is {validation}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in found if path.name.endswith(tuple(suffixes))]
    if len(files) < 2:
        others = ", ".join(sorted({path.suffix or path.name for path in found} - set(suffixes))[:12])
        there = f"; --suffix may name others, there are: {others}" if others else ""
        raise ValueError(
            f"{folder} holds {len(files)} files that end in {', '.join(suffixes)}; two are the least{there}"
        )

    def drawn(path: Path) -> str:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest()

    held_out = set(sorted(files, key=drawn)[: min(max(1, round(validation * len(files))), len(files) - 1)])
    return {"train": [path for path in files if path not in held_out], "val": sorted(held_out)}


def texts_of(files: Iterable[Path]) -> Iterator[str]:
    """The texts of files, without a byte order mark: of a .jsonl file every line's "text", of another all of it.

    Raises ValueError for a file that is not UTF-8, and for a line without a text.
    """
    for path in files:
        try:
            if path.suffix == ".jsonl":
                yield from _texts_of_lines(path)
            else:
                yield path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it, with iconv say, or leave it out") from None


def _texts_of_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: a line of a .jsonl file must be an object with a string "text"')
            yield text


def write_tokens(
    output: Path, texts: Mapping[str, Iterable[str]], words: Tokenizer, shard_tokens: int = SHARD_TOKENS
) -> dict[str, int]:
    """Write a folder of tokens, each split's texts in order with the end token after each; the tokens by split.

    The folder appears when it is complete. Raises: ValueError where it exists, and for less than one token a shard.
    """
    if output.exists():
        raise ValueError(f"{output} exists; give another --output, or delete it")
    if shard_tokens < 1:
        raise ValueError(f"a shard must have at least one token, not {shard_tokens}")
    kind = np.dtype("<u2" if words.vocab_size <= 2**16 else "<u4")
    part = output.with_name(output.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for file in [*(file for split in SPLITS for file in part.glob(f"{split}-*.bin")), part / "tokens.json"]:
        file.unlink(missing_ok=True)  # of an attempt that was interrupted
    counts = {split: _write_split(part, split, texts[split], words, kind, shard_tokens) for split in SPLITS}
    description = {"version": 1, "dtype": kind.str, "vocab_size": words.vocab_size, "end": words.end, "tokens": counts}
    write_json(part / "tokens.json", {**description, "tokenizer": words.source})
    part.replace(output)
    return counts


def _write_split(
    folder: Path, split: str, texts: Iterable[str], words: Tokenizer, kind: np.dtype[Any], shard_tokens: int
) -> int:
    written, held, count = 0, np.empty(0, kind), 0

    def write(tokens: np.ndarray) -> None:
        nonlocal written
        (folder / f"{split}-{written:05d}.bin").write_bytes(tokens.tobytes())
        written += 1

    for batch in _batched(texts):
        encoded = [np.array([*tokens, words.end], kind) for tokens in words.encode(batch)]
        held = np.concatenate([held, *encoded])
        count += sum(map(len, encoded))
        while len(held) >= shard_tokens:
            write(held[:shard_tokens])
            held = held[shard_tokens:]
    if len(held):
        write(held)
    return count


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of a few million characters."""
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
