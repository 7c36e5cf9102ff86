"""Data of one's own, as found on disks: what can be read is read as it is meant, the rest is named in one line."""

import base64
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.command.cli import main
from experiments.grids import GridError, load_grid
from experiments.grids.source_files import SourceError
from experiments.running.grid import run_grid
from experiments.training import token_files as files
from experiments.training.data import ImageFolders, ImageShards, TokenFiles
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.models.vit import ViTConfig
from experiments.training.optimizers import AdamW
from experiments.training.record import RunFolderError
from tests.experiments.experiment_jobs import Here, one_thread, tiny_config
from tests.experiments.test_data import shards

TEXT_MODEL = GPT2Config(name="g", layers=1, heads=1, d_model=8, context=16, vocab_size=300)
MODEL = ViTConfig(name="v", layers=1, heads=1, d_model=8, image_size=8, patch_size=8, channels=3, classes=1)


def prepare(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """`lpsim data prepare` of a folder: its exit code, and what it said of a mistake."""
    status = main(["data", "prepare", str(folder), "--output", str(folder.parent / "out"), *options])
    return status, capsys.readouterr().err


# --- text and tokenizers ---


def test_a_tokenizer_neither_cuts_nor_pads_a_text(tmp_path: Path) -> None:
    """Both may be saved in tokenizer.json, for a model's inputs. Numbers with gaps count to the largest."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7, "</s>": 9}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.enable_padding(length=5)
    made.save(str(tmp_path / "tokenizer.json"))
    words = files.tokenizer(str(tmp_path / "tokenizer.json"))
    assert [list(tokens) for tokens in words.encode(["a b b b", "b"])] == [[0, 7, 7, 7], [7]]
    assert (words.vocab_size, words.end) == (10, 9)


def test_ranks_of_tiktoken_are_complete_and_distinct(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    for ranks in ({}, {i: i for i in range(200)}, {i: i // 2 for i in range(256)}):
        lines = (f"{base64.b64encode(bytes([token])).decode()} {rank}\n" for token, rank in ranks.items())
        (tmp_path / "some.tiktoken").write_text("".join(lines))
        with pytest.raises(ValueError, match="all 256 bytes must be tokens, and every token and rank be there once"):
            files.tokenizer(str(tmp_path / "some.tiktoken"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    assert list(files.texts_of([tmp_path / "a.txt"])) == ["ab"]


def test_lines_of_json_are_the_texts_of_as_many_files(tmp_path: Path) -> None:
    """Those under "text"; whatever else a line says. An error names the line."""
    texts = ["a\nb", "", 'say "ü"']
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, "utf-8")
    lines = [json.dumps({"url": "x", "text": text}) for text in texts]
    (tmp_path / "all.jsonl").write_text(lines[0] + "\n\n" + "\n".join(lines[1:]))
    assert list(files.texts_of([tmp_path / "all.jsonl"])) == list(files.texts_of(sorted(tmp_path.glob("*.txt"))))
    for line in ("{", "[]", "{}", '{"text": 1}', "3"):
        (tmp_path / "all.jsonl").write_text(f"{lines[0]}\n{line}\n")
        with pytest.raises(ValueError, match=r'all\.jsonl:2: a line .* must be an object with a string "text"'):
            list(files.texts_of([tmp_path / "all.jsonl"]))


def test_an_interrupted_preparation_leaves_no_folder_and_is_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 9)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    options = "--tokenizer", "bytes", "--shard-tokens", "3"
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", interrupted)
        assert prepare(tmp_path / "texts", capsys, *options) == (130, "lpsim: interrupted\n")
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path / "texts", capsys, *options[:2]) == (0, "")
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2


def test_a_folder_without_texts_is_told_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    assert prepare(texts, capsys, "--tokenizer", "bytes") == (2, f"lpsim: there is no folder {texts}\n")
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.md").write_text(name)
    status, error = prepare(texts, capsys, "--tokenizer", "bytes")
    assert status == 2 and error.endswith("end in .txt; two are the least; --suffix may name others, there are: .md\n")
    status, error = prepare(texts, capsys, "--tokenizer", "bytes", "--end-token", "</s>")
    assert status == 2 and "leave --end-token out" in error
    assert prepare(texts, capsys, "--tokenizer", "bytes", "--suffix", "md") == (0, "")


def test_a_full_disk_is_told_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system names no file then."""
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(name)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    told = prepare(tmp_path / "texts", capsys, "--tokenizer", "bytes")
    assert told == (2, "lpsim: No space left on device\n") and not (tmp_path / "out").exists()


# --- folders of tokens ---


def tokens(folder: Path, largest: int) -> TokenFiles:
    """The layout of nanoGPT; one token is `largest`."""
    folder.mkdir(exist_ok=True)
    for split in files.SPLITS:
        np.array([largest, *range(30)], "<u2").tofile(folder / f"{split}.bin")
    return TokenFiles(folder=str(folder), validation_windows=2)


def test_a_token_that_the_model_has_not_is_told_before_the_model_sees_it(tmp_path: Path) -> None:
    """A GPU would end the process instead."""
    known = tokens(tmp_path, TEXT_MODEL.vocab_size - 1).load(TEXT_MODEL)
    assert max(int(inputs.max()) for inputs, _ in known.validation_batches(2)) == TEXT_MODEL.vocab_size - 1
    unknown = tokens(tmp_path, TEXT_MODEL.vocab_size).load(TEXT_MODEL)
    with pytest.raises(ValueError, match="the tokens reach 300, the model's vocab_size is 300"):
        list(unknown.validation_batches(2))


@pytest.mark.parametrize("text", ['{"dtype":', "[]", "{}", '{"dtype": "word", "vocab_size": 9}'])
def test_a_damaged_tokens_json_is_named(tmp_path: Path, text: str) -> None:
    data = tokens(tmp_path, 9)
    (tmp_path / "tokens.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokens\.json must be an object with dtype, such as <u2, and vocab_size"):
        data.check_model(TEXT_MODEL)


def test_more_tokens_than_the_model_has_are_refused_with_the_config(tmp_path: Path) -> None:
    data = tokens(tmp_path, 9)
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "<u2", "vocab_size": 301}))
    with pytest.raises(ValueError, match="are of 301 kinds, g has vocab_size 300"):
        data.check_model(TEXT_MODEL)


# --- images ---


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """A folder with one image a split."""
    folder = tmp_path / "images"
    for split in files.SPLITS:
        (folder / split / "a").mkdir(parents=True)
        Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / split / "a" / "0.png")
    yield folder


def test_what_is_no_image_by_its_name_is_left_out(images: Path) -> None:
    before = ImageFolders(folder=str(images)).fingerprint()
    (images / "train" / "a" / ".DS_Store").write_bytes(b"\0")
    (images / "val" / "a" / "README.txt").write_text("a")
    assert ImageFolders(folder=str(images)).fingerprint() == before
    assert len(ImageFolders(folder=str(images)).load(MODEL).train) == 1


def test_an_image_that_cannot_be_read_is_named(images: Path) -> None:
    path = images / "val" / "a" / "0.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        loaded = ImageFolders(folder=str(images)).load(MODEL)
        with pytest.raises(ValueError, match=r"val/a/0\.png: no image that can be read \(.*\); mend it, or delete it"):
            list(loaded.validation_batches(1))


def test_a_split_without_images_is_refused(images: Path) -> None:
    shutil.rmtree(images / "val")
    with pytest.raises(ValueError, match=r"has no val/CLASS/\* images"):
        ImageFolders(folder=str(images)).load(MODEL)


def test_every_kind_of_pixel_is_read_as_its_grey(images: Path) -> None:
    """Of 1, 8, 16 bits, with and without colour, palette and alpha; 32 bits have no range."""
    path = images / "val" / "a" / "0.png"
    for mode, suffix, grey in (
        ("L", "png", 77),
        ("LA", "png", 77),
        ("P", "png", 77),
        ("RGBA", "png", 77),
        ("1", "png", 255),
    ):
        Image.new("L", (9, 9), grey).convert(mode).save(path, suffix)
        assert shown(images) == [grey]
    Image.fromarray(np.full((9, 9), 77 * 257, np.uint16)).save(path)
    assert shown(images) == [77]
    Image.new("CMYK", (9, 9), (0, 0, 0, 255 - 77)).save(path, "jpeg", quality=100)
    assert shown(images) == [77]
    path.unlink()
    Image.new("F", (9, 9), 0.5).save(path.with_suffix(".tif"))
    with pytest.raises(ValueError, match="pixels of 32 bits have no known range"):
        shown(images)


def shown(folder: Path) -> list[int]:
    """The values of the pixels of the validation image, to 8 bits."""
    from experiments.training.image_files import decode

    (image,) = ImageFolders(folder=str(folder)).load(MODEL).held_out
    return np.unique(decode(image, None, 8)).tolist()


@pytest.mark.parametrize("label", [-1, "cat"])
def test_a_class_of_a_shard_is_a_number_from_0_on(tmp_path: Path, images: Path, label: Any) -> None:
    content = (images / "val" / "a" / "0.png").read_bytes()
    data: ImageShards = shards(tmp_path, {split: [(content, label)] for split in files.SPLITS})
    with pytest.raises(ValueError, match=rf"0\.cls must be the number of a class, from 0 on; it is b'{label}'"):
        data.load(MODEL)


# --- in a grid ---


def test_data_that_were_mended_before_anything_was_trained_are_the_run_s_data(tmp_path: Path, images: Path) -> None:
    """Those of a run that has begun stay what they were."""
    data = ImageFolders(folder=str(images))
    config = tiny_config(model=MODEL, data=data, steps=3, warmup_steps=1)
    damaged = images / "val" / "a" / "1.png"
    damaged.write_bytes(b"no image")
    with one_thread():
        (failed,) = run_grid([config], tmp_path / "g", Here())
        assert failed.status == "failed" and "val/a/1.png: no image that can be read" in (failed.cause or "")
        damaged.unlink()
        (row,) = run_grid([config], tmp_path / "g", Here(), retry_failed=True)
    assert row.status == "finished", row.cause
    environment = json.loads((tmp_path / "g" / row.signature / "env.json").read_text())
    assert environment["data_sha256"] == data.fingerprint() and "resumed" not in environment
    shutil.copy(images / "val" / "a" / "0.png", damaged)
    with pytest.raises(RunFolderError, match=r"trained on other data than image-folders holds now .its fingerprint"):
        run_grid([config], tmp_path / "g", Here())


def test_a_gpu_that_is_not_there_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    executor = Here()
    with pytest.raises(GridError, match="for device cuda, and torch finds no GPU here: run it where one is"):
        run_grid([tiny_config(device="cuda:1")], tmp_path / "g", executor)
    assert executor.submitted == 0


def test_a_setting_that_does_not_exist_is_told_those_that_do(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from experiments.training.optimizers import AdamW\n\ndef grid():\n    yield AdamW(learning_rate=1.0)\n"
    )
    with pytest.raises(SourceError, match=r"mine\.py:4: .*'learning_rate'; there are: lr, weight_decay, betas, eps$"):
        load_grid(str(tmp_path / "mine.py"))


def test_a_tuple_of_the_wrong_length_is_told_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"AdamW\.betas must be tuple\[float, float\], is \(0\.9,\)"):
        AdamW(lr=0.1, betas=(0.9,))  # type: ignore[arg-type]
