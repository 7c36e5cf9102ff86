"""Data sets: batches are functions of (seed, step), held-out data are held out, loaders read the real layouts."""

import base64
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.command.cli import main
from experiments.training import data, image_files
from experiments.training import token_files as files
from experiments.training.data import Digits, ImageFolders, ImageShards, StdlibText, TokenFiles
from experiments.training.models import gpt2, vit
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.models.vit import ViTConfig

TEXT_MODEL = GPT2Config(name="g", layers=1, heads=1, d_model=8, context=16, vocab_size=256)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    for loaded in (StdlibText().load(gpt2.MICRO), Digits().load(vit.MICRO)):
        first = loaded.train_batch(3, 5, 8)
        loaded.train_batch(0, 0, 8)
        torch.manual_seed(9)
        again = loaded.train_batch(3, 5, 8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for other in (loaded.train_batch(3, 6, 8), loaded.train_batch(4, 5, 8)):
            assert not torch.equal(first[0], other[0])


def test_text_targets_are_the_inputs_one_token_on() -> None:
    loaded = StdlibText(validation_windows=5).load(TEXT_MODEL)
    for inputs, targets in (loaded.train_batch(0, 0, 4), *loaded.validation_batches(4)):
        assert inputs.shape[1:] == targets.shape[1:] == (16,)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert sum(len(inputs) for inputs, _ in loaded.validation_batches(4)) == 5


def test_the_halves_of_the_text_make_the_whole() -> None:
    whole, first, second = (StdlibText(half=half).load(TEXT_MODEL) for half in (None, 1, 2))
    assert np.array_equal(np.concatenate([first.train, second.train]), whole.train)
    assert abs(len(first.train) - len(second.train)) <= 1
    assert np.array_equal(first.held_out, whole.held_out)
    with pytest.raises(ValueError, match="half must be 1, 2 or None"):
        StdlibText(half=3)


def test_text_is_the_standard_library_and_held_out_by_file() -> None:
    train, held_out = data.TRAINING_MODULES.split(), data.HELD_OUT_MODULES.split()
    assert len({*train, *held_out}) == len(train) + len(held_out)
    loaded = StdlibText().load(gpt2.MICRO)
    assert len(loaded.train) > 4_000_000 and len(loaded.held_out) > 400_000
    assert b"class Thread" in loaded.train.tobytes() and b"class Thread:" not in loaded.held_out.tobytes()


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "HELD_OUT_MODULES", "no_such_module.py")
    with pytest.raises(ValueError, match=r"this Python lacks one: .*no_such_module\.py"):
        StdlibText().fingerprint()


def test_digits_split() -> None:
    loaded = Digits().load(vit.MICRO)
    assert len(loaded.train[0]) == 1437 and len(loaded.held_out[0]) == 360
    assert loaded.train[0].shape[1:] == (1, 8, 8)
    assert loaded.train[0].mean().abs() < 1e-5 and (loaded.train[0].std() - 1).abs() < 1e-3
    images = {image.numpy().tobytes() for image in loaded.train[0]}
    assert sum(image.numpy().tobytes() in images for image in loaded.held_out[0]) == 0
    assert set(loaded.held_out[1].tolist()) == set(range(10))
    batch = loaded.train_batch(0, 0, 1437)[0]
    assert len({image.numpy().tobytes() for image in batch}) == len(images)  # without replacement
    with pytest.raises(ValueError, match="more than the 1437 training images"):
        loaded.train_batch(0, 0, 1438)


def test_fingerprints_are_stable_and_tell_contents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Digits().fingerprint() == "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443"
    here = StdlibText().fingerprint()
    assert here == StdlibText(validation_windows=3).fingerprint()
    monkeypatch.setattr(data, "HELD_OUT_MODULES", "glob.py")
    assert StdlibText().fingerprint() != here


def token_files(folder: Path, train: list[int], val: list[int]) -> TokenFiles:
    np.array(train, dtype="<u2").tofile(folder / "train.bin")
    np.array(val, dtype="<u2").tofile(folder / "val.bin")
    return TokenFiles(folder=str(folder), validation_windows=3)


def test_token_files(tmp_path: Path) -> None:
    config = token_files(tmp_path, list(range(100, 300)), list(range(500, 540)))
    loaded = config.load(GPT2Config(name="g", layers=1, heads=1, d_model=8, context=16, vocab_size=50257))
    inputs, targets = loaded.train_batch(0, 0, 64)
    assert inputs.shape == (64, 16) and torch.equal(inputs + 1, targets)
    assert inputs.min() >= 100 and targets.max() <= 299
    held_out = torch.cat([inputs for inputs, _ in loaded.validation_batches(2)])
    assert held_out[:, 0].tolist() == [500, 511, 523]
    assert isinstance(loaded.train, np.memmap)
    before = config.fingerprint()
    assert token_files(tmp_path, list(range(100, 300)), list(range(501, 541))).fingerprint() != before


def test_token_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold train\.bin and val\.bin"):
        TokenFiles(folder=str(tmp_path)).load(TEXT_MODEL)
    with pytest.raises(ValueError, match="validation stream has 16 tokens; a context of 16 needs more"):
        token_files(tmp_path, list(range(17)), list(range(16))).load(TEXT_MODEL)


def image_folders(folder: Path) -> ImageFolders:
    """Two classes told apart by colour, images of several sizes and modes."""
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("n01", (250, 10, 10)), ("n02", (10, 10, 250))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40 + 7 * i, 30 + 11 * i), colour)
                image.save(folder / split / name / f"{i}.{'png' if i % 2 else 'jpeg'}")
    return ImageFolders(folder=str(folder))


def test_image_folders(tmp_path: Path) -> None:
    config = image_folders(tmp_path)
    loaded = config.load(
        ViTConfig(name="v", layers=1, heads=1, d_model=8, image_size=24, patch_size=8, channels=3, classes=2)
    )
    images, labels = loaded.train_batch(0, 3, 10)
    assert images.shape == (10, 3, 24, 24) and images.dtype == torch.float32
    assert torch.equal(labels == 0, images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2)))  # red is class n01
    assert torch.equal(images, loaded.train_batch(0, 3, 10)[0])
    held_out = list(loaded.validation_batches(4))
    assert [len(labels) for _, labels in held_out] == [4, 2]
    assert torch.cat([labels for _, labels in held_out]).tolist() == [0, 0, 0, 1, 1, 1]
    red = (torch.tensor([250, 10, 10]) / 255 - torch.tensor(image_files.MEAN)) / torch.tensor(image_files.STD)
    assert torch.allclose(held_out[0][0][0], red.view(3, 1, 1).expand(3, 24, 24), atol=0.03)  # JPEG's error
    before = config.fingerprint()
    (tmp_path / "train" / "n01" / "0.jpeg").unlink()
    assert config.fingerprint() != before


def test_a_random_crop_keeps_left_and_right_apart(tmp_path: Path) -> None:
    """A crop is a part of the image, mirrored or not: a horizontal ramp stays one."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 64, 3))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / split / "a" / "0.png")
    loaded = ImageFolders(folder=str(tmp_path)).load(
        ViTConfig(name="v", layers=1, heads=1, d_model=8, image_size=16, patch_size=8, channels=3, classes=1)
    )
    slopes = [image[0].mean(0).diff() for image in loaded.train_batch(0, 0, 16)[0]]
    assert all((slope >= -1e-6).all() or (slope <= 1e-6).all() for slope in slopes)
    assert len({bool(slope.sum() > 0) for slope in slopes}) == 2  # some mirrored, some not


def test_image_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = image_folders(tmp_path)
    with pytest.raises(ValueError, match="train has 2 classes, vit-b/16 has 1000"):
        config.load(vit.BASE)
    with pytest.raises(ValueError, match="has no train/CLASS/"):
        ImageFolders(folder=str(tmp_path / "nowhere")).fingerprint()


# --- shards, and the commands that make them ---


def shards(folder: Path, images: dict[str, list[tuple[bytes, int]]]) -> ImageShards:
    """The images and labels of each split in shards of two, as WebDataset has them."""
    for split, members in images.items():
        for first in range(0, len(members), 2):
            with tarfile.open(folder / f"{split}-{first:02d}.tar", "w") as tar:
                for i, (content, label) in enumerate(members[first : first + 2]):
                    for name, data in ((f"./{first + i}.cls", str(label).encode()), (f"./{first + i}.png", content)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return ImageShards(folder=str(folder))


def test_shards_give_the_images_that_folders_give(tmp_path: Path) -> None:
    """Also where the batches of later steps were decoded ahead."""
    folders = image_folders(tmp_path / "folders")
    model = ViTConfig(name="v", layers=1, heads=1, d_model=8, image_size=24, patch_size=8, channels=3, classes=2)
    of_folders = folders.load(model)
    content = {
        split: [(image.path.read_bytes(), image.label) for image in images]
        for split, images in (("train", of_folders.train), ("val", of_folders.held_out))
    }
    (tmp_path / "shards").mkdir()
    config = shards(tmp_path / "shards", content)
    of_shards = config.load(model)
    for step in (0, 1, 2, 9, 1):
        pairs = zip(of_folders.train_batch(3, step, 5), of_shards.train_batch(3, step, 5), strict=True)
        fresh = config.load(model).train_batch(3, step, 5)[0]
        (images, same), labels = pairs
        assert torch.equal(images, same) and torch.equal(same, fresh) and torch.equal(*labels)
    held_out = zip(of_folders.validation_batches(4), of_shards.validation_batches(4), strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in held_out)
    with pytest.raises(ValueError, match="has a label 1, v has 1 classes"):
        config.load(replace(model, classes=1))
    with tarfile.open(tmp_path / "shards" / "train-99.tar", "w") as tar:
        tar.add(of_folders.train[0].path, "lonely.png")
    with pytest.raises(ValueError, match=r"train-99\.tar has image lonely without a \.cls"):
        config.load(model)


def test_how_a_stream_of_tokens_is_cut_changes_no_batch(tmp_path: Path) -> None:
    texts = {"train": ["grüße " * 20, "", "x" * 50], "val": ["held out " * 9]}
    words = files.tokenizer("bytes")
    streams = []
    for shard_tokens in (7, 10_000):
        folder = tmp_path / str(shard_tokens)
        assert files.write_tokens(folder, texts, words, shard_tokens) == {"train": 213, "val": 82}
        streams.append(TokenFiles(folder=str(folder), validation_windows=5).load(replace(TEXT_MODEL, vocab_size=257)))
    (cut, whole), step = streams, 4
    assert whole.train[:].tolist() == cut.train[:].tolist()
    assert bytes(whole.train[:160].tolist()).decode() == "grüße " * 20 and whole.train[160] == 256
    assert torch.equal(cut.train_batch(1, step, 64)[0], whole.train_batch(1, step, 64)[0])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*(s.validation_batches(2) for s in streams), strict=True))
    with pytest.raises(ValueError, match="are of 257 kinds, g has vocab_size 256"):
        TokenFiles(folder=str(tmp_path / "7")).load(TEXT_MODEL)
    with pytest.raises(ValueError, match="7 exists; give another --output"):
        files.write_tokens(tmp_path / "7", texts, words)


@pytest.mark.parametrize("kind", ["tokenizer.json", "two.tiktoken"])
def test_prepare_writes_what_the_tokenizer_says(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {f"{name}.txt": f"{name} the theme\n" * 3 for name in "abcd"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    file = tmp_path / kind
    if kind == "tokenizer.json":
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(texts.values(), trainer)
        made.save(str(file))
        decode = made.decode
    else:
        tiktoken = pytest.importorskip("tiktoken")
        ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
        file.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for word, rank in ranks.items()))
        decode = tiktoken.Encoding("", pat_str=files.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}).decode
    command = ["data", "prepare", str(tmp_path), "--tokenizer", str(file), "--output", str(tmp_path / "out")]
    assert main([*command, "--validation", "0.25"]) == 0
    described = json.loads((tmp_path / "out" / "tokens.json").read_text())
    streams = {split: np.fromfile(tmp_path / "out" / f"{split}-00000.bin", "<u2") for split in ("train", "val")}
    found = []
    for split, stream in streams.items():
        assert stream[-1] == described["end"] and len(stream) == described["tokens"][split]
        ends = np.flatnonzero(stream == described["end"])
        found += [decode(part[part != described["end"]].tolist()) for part in np.split(stream, ends + 1)[:-1]]
        assert (
            len(ends) == (3 if split == "train" else 1) and len(stream) < sum(map(len, texts.values())) * len(ends) / 4
        )
    assert sorted(found) == sorted(texts.values())
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert main([*command[:4], str(tmp_path / "none"), *command[5:]]) == 2
    assert "cannot read the tokenizer" in capsys.readouterr().err
