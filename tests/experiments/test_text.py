"""Text with a tokenizer file: the tokens are the tokenizer's, in order; what does not fit is said before a run."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.running.grid import run_grid
from experiments.training import text
from experiments.training.config import Config
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.text import HuggingFaceText, TextFile
from tests.experiments.experiment_jobs import Here, one_thread, tiny_config

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "[UNK]", "<|end|>"]
MODEL = GPT2Config(name="g", layers=1, heads=1, d_model=8, context=4, vocab_size=8)
LINES = ["the cat sat on a mat", "a cat", "the mat sat on the dog"] * 5


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A word a token; with a template, truncation and padding that a stream of text must be spared."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|end|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 7)])
    made.enable_truncation(3)
    made.enable_padding(length=5)
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def ids(lines: list[str], after: list[int] | None = None) -> list[int]:
    known = {word: number for number, word in enumerate(WORDS)}
    return [number for line in lines for number in [*(known.get(word, 6) for word in line.split()), *(after or [])]]


def written(folder: Path, lines: list[str]) -> str:
    (folder / "text.txt").write_text("\n".join(lines))
    return str(folder / "text.txt")


def test_a_text_file_is_its_tokens_and_the_end_is_held_out(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextFile(written(tmp_path, LINES), tokenizer, held_out_share=0.2)
    loaded = data.load(MODEL)
    expected = ids(LINES)
    assert [*loaded.train, *loaded.held_out] == expected
    assert len(loaded.held_out) == len(expected) - round(0.8 * len(expected))
    monkeypatch.setattr(text, "PIECE", 10)
    text._tokens_of_file.cache_clear()
    again = data.load(MODEL)
    np.testing.assert_array_equal(again.train, loaded.train)
    before = data.fingerprint()
    written(tmp_path, [*LINES, "cat"])
    assert [*data.load(MODEL).train, *data.load(MODEL).held_out] == [*expected, 1]  # the file is read again
    assert data.fingerprint() != before


def test_a_run_trains_on_a_text_file(tmp_path: Path, tokenizer: str) -> None:
    data = TextFile(written(tmp_path, LINES), tokenizer, held_out_share=0.4, validation_windows=4)
    config = tiny_config(data=data, steps=3, warmup_steps=1)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with one_thread():
        (row,) = run_grid([config], tmp_path / "g", Here())
    assert row.status == "finished", row.cause
    assert json.loads((tmp_path / "g" / row.signature / "env.json").read_text())["data_sha256"] == data.fingerprint()


@pytest.mark.parametrize("how", ["save_to_disk", "json"])
def test_a_folder_of_datasets_is_its_documents(
    tmp_path: Path, tokenizer: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {"train": LINES, "validation": LINES[:3]}
    folder = tmp_path / "folder"
    if how == "save_to_disk":
        tables = {name: datasets.Dataset.from_dict({"text": lines, "n": lines}) for name, lines in splits.items()}
        datasets.DatasetDict(tables).save_to_disk(str(folder))
    else:
        folder.mkdir()
        for name, lines in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = HuggingFaceText(str(folder), tokenizer, separator="<|end|>")
    loaded = data.load(MODEL)
    assert (list(loaded.train), list(loaded.held_out)) == (ids(LINES, [7]), ids(LINES[:3], [7]))
    assert data.fingerprint() == HuggingFaceText(str(folder), tokenizer).fingerprint()
    with pytest.raises(ValueError, match=r"unknown split of .*folder 'test'; there are: train, validation"):
        HuggingFaceText(str(folder), tokenizer, held_out="test").load(MODEL)
    with pytest.raises(ValueError, match=r"unknown column of .*folder 'txt'; there are: text"):
        HuggingFaceText(str(folder), tokenizer, column="txt").load(MODEL)


def test_what_does_not_fit_is_said_when_the_config_is_made(tmp_path: Path, tokenizer: str) -> None:
    file = written(tmp_path, LINES)
    small = GPT2Config(name="small", layers=1, heads=1, d_model=8, context=4, vocab_size=7)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 8 tokens, small has vocab_size 7; take at least 8"):
        tiny_config(model=small, data=TextFile(file, tokenizer))
    with pytest.raises(ValueError, match=r"no file nowhere\.json"):
        tiny_config(data=TextFile(file, "nowhere.json"))
    with pytest.raises(ValueError, match=r"text\.txt is no tokenizer file .*; expected a tokenizer\.json"):
        tiny_config(data=TextFile(file, file))
    with pytest.raises(ValueError, match=r"unknown separator token .*eos"):
        tiny_config(data=HuggingFaceText(str(tmp_path), tokenizer, separator="<|eos|>"))
    (tmp_path / "text.txt").write_bytes(b"the \xff")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 at byte 4"):
        TextFile(file, tokenizer).load(MODEL)
