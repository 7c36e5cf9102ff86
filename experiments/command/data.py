"""`lpsim data`: data of real size. `prepare` makes tokens of a folder of text, `sample` small data of both layouts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.command.shared import UserError, user_errors


def add(commands: Any) -> None:
    parser = commands.add_parser("data", help="make token files of a folder of text; sample data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="tokens of a folder of text, in shards, for the data set token-files")
    prepare.add_argument("folder", type=Path, metavar="TEXTS", help="its files, folders in it included, are the texts")
    prepare.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="tokenizer.json of the package tokenizers, NAME.tiktoken of tiktoken, or the word bytes",
    )
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    prepare.add_argument(
        "--suffix",
        action="append",
        metavar=".txt",
        help='how a file of texts ends; repeatable (default: .txt); of .jsonl every line\'s "text" is one',
    )
    prepare.add_argument(
        "--validation", type=float, default=0.01, metavar="SHARE", help="of the files, held out (default: 0.01)"
    )
    prepare.add_argument("--shard-tokens", type=int, default=2**27, metavar="N", help="tokens a file (default: 2^27)")
    prepare.add_argument("--end-token", metavar="WORD", help="set after every text (default: the tokenizer's)")
    prepare.set_defaults(function=run_prepare)
    sample = actions.add_parser("sample", help="twin-text and twin-images, small, from what is installed")
    sample.add_argument("--output", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    sample.set_defaults(function=run_sample)


def run_prepare(options: argparse.Namespace) -> int:
    from experiments.training import token_files

    with mistakes():
        words = token_files.tokenizer(options.tokenizer, options.end_token)
        files = token_files.split_files(options.folder, options.suffix or [".txt"], options.validation)
        texts = {split: token_files.texts_of(paths) for split, paths in files.items()}
        counts = token_files.write_tokens(options.output, texts, words, options.shard_tokens)
    print(f"{options.output}: " + ", ".join(f"{split} {count:,} tokens" for split, count in counts.items()))
    return 0


def run_sample(options: argparse.Namespace) -> int:
    from experiments.training import sample_data

    with mistakes():
        for name, write in (("twin-text", sample_data.write_text), ("twin-images", sample_data.write_images)):
            folder = options.output / name
            counts = write(folder)
            print(f"{folder}: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()))
    return 0


@contextmanager
def mistakes() -> Iterator[None]:
    """What is wrong with a text, a tokenizer or a folder is told in one line."""
    with user_errors():
        try:
            yield
        except OSError as error:
            place = "" if error.filename is None else f"{error.filename}: "  # a full disk names no file
            raise UserError(f"{place}{error.strerror or error}") from error
