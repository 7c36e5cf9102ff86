"""Glyphs: pixels are exact functions of random words, and the words of (seed, step); nothing else enters."""

import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch

from experiments.training import glyphs
from experiments.training.config import MODELS
from experiments.training.data import Batch, DrawnGlyphs, Glyphs
from experiments.training.models import vit

ROOT = Path(__file__).parents[2]
PINNED = re.findall(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[0]


@pytest.fixture(scope="module")
def loaded() -> DrawnGlyphs:
    return Glyphs().load(vit.MICRO_GLYPHS)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Every parameter at one value: no noise, no slant, in the middle, the same size."""
    fixed = {"HEIGHT": 2048, "STRETCH": 256, "PLACE": 0, "SLANT": 0, "TILT": 0, "PAPER": 50, "INK": 144, "NOISE": 0}
    for name, value in fixed.items():
        monkeypatch.setattr(glyphs, name, (value, value + 1))
    yield monkeypatch


def words(count: int, key: int = 1) -> np.ndarray:
    return np.random.Philox(key=key).random_raw(count * glyphs.WORDS).reshape(count, glyphs.WORDS)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Batches


def test_a_batch_depends_on_seed_and_step_alone(loaded: DrawnGlyphs) -> None:
    first = loaded.train_batch(3, 5, 8)
    loaded.train_batch(0, 0, 64)
    np.random.default_rng(0).random()
    assert equal(first, loaded.train_batch(3, 5, 8))
    assert equal(first, Glyphs(validation_images=36).load(vit.MICRO_GLYPHS).train_batch(3, 5, 8))
    for other in (loaded.train_batch(3, 6, 8), loaded.train_batch(4, 5, 8), loaded.train_batch(5, 3, 8)):
        assert not torch.equal(first[0], other[0])


def test_a_smaller_batch_is_the_beginning_of_a_larger_one(loaded: DrawnGlyphs) -> None:
    images, labels = loaded.train_batch(7, 11, 64)
    for size in (1, 5, 63):
        assert equal(loaded.train_batch(7, 11, size), (images[:size], labels[:size]))


def test_shapes_types_and_values(loaded: DrawnGlyphs) -> None:
    values = (torch.arange(256, dtype=torch.float64) - 88) * 3 / 128
    assert torch.equal(values.float().double(), values)  # exact
    batches = [loaded.train_batch(0, 0, 64), *loaded.validation_batches(64)]
    for images, labels in batches:
        assert images.shape == (len(labels), 1, 16, 16) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and loaded.classes == 36
        assert labels.min() >= 0 and labels.max() < 36
        assert torch.isin(images.double(), values).all()
    everything = torch.cat([images for images, _ in batches])
    assert everything.mean().abs() < 0.1 and (everything.std() - 1).abs() < 0.1


def test_every_class_is_as_likely_and_held_out_equally_often(loaded: DrawnGlyphs) -> None:
    labels = torch.cat([labels for _, labels in loaded.validation_batches(64)])
    assert labels.bincount(minlength=36).tolist() == [50] * 36
    count = 40 * 256
    drawn = torch.cat([loaded.train_batch(0, step, 256)[1] for step in range(40)]).bincount(minlength=36)
    expected = count / 36
    assert ((drawn - expected) ** 2 / expected).sum() < scipy.stats.chi2.isf(1e-6, 35)


def test_no_key_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the validation set, of every step, of every seed that a config takes: the generator's keys are all different.

    A key has two words. The first is the seed, below 2**32, or the validation set's; the second is the step.
    """
    keys: list[tuple[int, int]] = []
    draw = DrawnGlyphs._words

    def recorded(key: tuple[int, int], count: int) -> np.ndarray:
        keys.append(key)
        return draw(key, count)

    monkeypatch.setattr(DrawnGlyphs, "_words", staticmethod(recorded))
    data = Glyphs(validation_images=36).load(vit.MICRO_GLYPHS)
    list(data.validation_batches(16))
    asked = [(seed, step) for seed in (0, 1, 2**32 - 1) for step in (0, 1, 2**40)]
    for seed, step in asked:
        data.train_batch(seed, step, 1)
    assert keys == [DrawnGlyphs.HELD_OUT_KEY, *asked]
    assert 2**32 <= DrawnGlyphs.HELD_OUT_KEY[0] < 2**64
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*32\)"):
        data.train_batch(2**63, 0, 1)
    with pytest.raises(ValueError, match=r"step in \[0, 2\*\*64\)"):
        data.train_batch(0, -1, 1)


def test_no_held_out_image_is_trained_on(loaded: DrawnGlyphs) -> None:
    trained = [loaded.train_batch(seed, step, 64)[0] for seed in (0, 1) for step in range(20)]
    images = [image.numpy().tobytes() for image in torch.cat([*trained, loaded.held_out[0]])]
    assert len(set(images)) == len(images) == 2 * 20 * 64 + 1800


@pytest.mark.skipif(matplotlib.__version__ != PINNED, reason=f"the pixels are those of matplotlib {PINNED}'s fonts")
def test_the_pixels_of_one_batch(loaded: DrawnGlyphs) -> None:
    images, labels = loaded.train_batch(0, 0, 64)
    content = hashlib.sha256(images.numpy().astype("<f4").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert content.hexdigest() == "ad10b6b9d3cd1e71dd8cf11c27cdf51f6a455ee59a078482041d66f6ce7f22a0"
    assert Glyphs().fingerprint() == "877347473700c26867cb6de4e0dd79cdfd0c6d7509ecb1727ba4e15eb626576a"


# What the fingerprint tells apart


def test_the_fingerprint_is_of_the_atlas_and_of_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {Glyphs().fingerprint()}
    assert seen == {Glyphs(validation_images=36).fingerprint()}
    atlas = glyphs.atlas()
    for place in ((0, 0, 0, 0), (15, 35, 47, 47), (7, 20, 24, 24)):
        changed = atlas.copy()
        changed[place] ^= 1
        with monkeypatch.context() as patch:
            patch.setattr(glyphs, "atlas", lambda changed=changed: changed)
            seen.add(Glyphs().fingerprint())
    for name in ("HEIGHT", "STRETCH", "PLACE", "SLANT", "TILT", "PAPER", "INK", "NOISE"):
        low, high = getattr(glyphs, name)
        with monkeypatch.context() as patch:
            patch.setattr(glyphs, name, (low, high + 16))
            seen.add(Glyphs().fingerprint())
    assert len(seen) == 1 + 3 + 8


def test_the_atlas_is_read_only_and_its_cells_have_empty_edges() -> None:
    cells = glyphs.atlas()
    assert cells.shape == (len(glyphs.FONTS), len(glyphs.CHARACTERS), glyphs.CELL, glyphs.CELL)
    assert cells.dtype == np.uint8 and cells.max() == glyphs.FULL and not cells.flags.writeable
    assert not cells[:, :, [0, -1]].any() and not cells[:, :, :, [0, -1]].any()
    for font in cells:
        assert len({cell.tobytes() for cell in font}) == 36  # in no font do two characters look the same


# Rasterizing


def test_arcs_become_chords_with_exact_ends() -> None:
    vertices = np.array([(0, 0), (3, 7), (10, 1), (-5, 2), (0, 0)])
    outline = glyphs.edges(vertices, np.array([1, 3, 3, 2, 79]))
    p, q, r = (tuple(map(Fraction, map(int, v))) for v in vertices[:3])
    for t in range(9):
        s = Fraction(t, 8)
        point = [64 * ((1 - s) ** 2 * a + 2 * s * (1 - s) * b + s * s * c) for a, b, c in zip(p, q, r, strict=True)]
        assert outline[t, 0].tolist() == point
    assert outline[8:, 1].tolist() == [[-320, 128], [0, 0]]
    with pytest.raises(ValueError, match="lines and quadratic arcs has no code 4"):
        glyphs.edges(vertices, np.array([1, 4, 4, 4, 79]))


def polygon(*corners: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(zip(corners, (*corners[1:], corners[0]), strict=True))


OUTLINES = {
    "triangle": polygon((0, 0), (700, 131), (150, 641)),
    "ring": polygon((0, 0), (600, 0), (600, 640), (0, 640)) + polygon((100, 100), (100, 500), (500, 500), (500, 100)),
    "overlap": polygon((0, 0), (400, 0), (400, 640), (0, 640)) + polygon((200, 100), (600, 100), (600, 500)),
    "thin": polygon((0, 0), (3, 0), (803, 640), (800, 640)),
}


@pytest.mark.parametrize("name", OUTLINES)
def test_a_cell_counts_the_samples_inside_by_winding_number(name: str) -> None:
    """Against exact rational arithmetic, a sample at a time, on a diagonal band of the cell."""
    edges, height = OUTLINES[name], 640
    cell = glyphs.rasterize(np.array(edges), height)
    corners = [corner for edge in edges for corner in edge]
    middle = [Fraction(min(c) + max(c), 2) for c in zip(*corners, strict=True)]
    step = Fraction(2 * height, 4 * glyphs.CELL)  # half of the cell's 4 x 48 samples are one height

    def inside(column: int, row: int) -> bool:
        px = middle[0] + step * (column - 2 * glyphs.CELL + Fraction(1, 2))
        py = middle[1] - step * (row - 2 * glyphs.CELL + Fraction(1, 2))
        winding = 0
        for (x0, y0), (x1, y1) in edges:
            if min(y0, y1) <= py < max(y0, y1) and x0 + (py - y0) * (x1 - x0) / (y1 - y0) <= px:
                winding += 1 if y1 > y0 else -1
        return winding != 0

    for j in range(glyphs.CELL):
        for i in {(j + shift) % glyphs.CELL for shift in (0, 3, 24)}:
            count = sum(inside(4 * i + a, 4 * j + b) for a in range(4) for b in range(4))
            assert cell[j, i] == count, (i, j)


def test_an_outline_too_wide_is_refused() -> None:
    glyphs.rasterize(np.array(polygon((0, 0), (46, 0), (46, 24))), 24)
    with pytest.raises(ValueError, match=r"\[47 24\] units wide and high does not fit a cell of 48"):
        glyphs.rasterize(np.array(polygon((0, 0), (47, 0), (47, 24))), 24)


# Drawing


def test_an_image_depends_on_its_own_words_and_label_alone() -> None:
    given, labels = words(6), np.array([0, 35, 7, 7, 20, 11])
    images = glyphs.draw(given, labels)
    order = np.array([4, 0, 5])
    assert np.array_equal(glyphs.draw(given[order], labels[order]), images[order])
    assert images.dtype == np.uint8 and images.shape == (6, 16, 16)


def test_a_character_moves_by_whole_pixels(plain: pytest.MonkeyPatch) -> None:
    given, labels = words(36), np.arange(36)
    still = glyphs.draw(given, labels)
    plain.setattr(glyphs, "PLACE", (2 * 256, 2 * 256 + 1))  # to the right and down
    assert np.array_equal(glyphs.draw(given, labels)[:, 2:, 2:], still[:, :-2, :-2])


def test_a_plain_image_is_the_atlas_scaled(plain: pytest.MonkeyPatch) -> None:
    """At a height of 8 pixels, 24 in the atlas, a pixel is the mean of the 3 x 3 pixels of the atlas it lies on."""
    given, labels = words(36), np.arange(36)
    font = glyphs.uniform(given[:, 0], 0, len(glyphs.FONTS))
    cells = glyphs.atlas()[font, labels].astype(int)
    cover = cells.reshape(36, 16, 3, 16, 3).sum((2, 4))
    assert np.array_equal(glyphs.draw(given, labels), 50 + cover * 144 * 455 // 65536)
    assert 50 + 9 * glyphs.FULL * 144 * 455 // 65536 == 50 + 143  # full ink, rounded down


def test_noise_has_the_stated_deviation(plain: pytest.MonkeyPatch) -> None:
    """Mean and deviation over 36 x 256 pixels, within 6 standard errors and the half that rounding down takes."""
    given, labels = words(36), np.arange(36)
    plain.setattr(glyphs, "PAPER", (100, 101))
    plain.setattr(glyphs, "INK", (20, 21))
    clean = glyphs.draw(given, labels).astype(float)
    plain.setattr(glyphs, "NOISE", (16, 17))
    noise = glyphs.draw(given, labels) - clean
    assert abs(noise.mean() + 0.5) < 6 * 16 / math.sqrt(noise.size)
    assert abs(noise.std() - 16) < 6 * 16 / math.sqrt(2 * noise.size) + 0.1


def test_uniform_is_the_upper_half_of_a_word_scaled() -> None:
    given = np.concatenate([words(1).ravel(), np.array([0, 2**32 - 1, 2**64 - 1], dtype=np.uint64)])
    for low, high in ((0, 36), (-384, 385), (2048, 3073), (5, 6)):
        expected = [low + (int(word) >> 32) * (high - low) // 2**32 for word in given]
        assert glyphs.uniform(given, low, high).tolist() == expected
        assert min(expected) == low and max(expected) == high - 1


# Bad input, and what an import costs


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 35, 1000):
        with pytest.raises(ValueError, match=f"positive multiple of the 36 classes, is {count}"):
            Glyphs(validation_images=count)
    for model in (vit.MICRO, vit.BASE):
        with pytest.raises(ValueError, match=r"glyphs need image_size, channels, classes \(16, 1, 36\), vit-"):
            Glyphs().check_model(model)
    Glyphs().check_model(MODELS["vit-micro-glyphs"])
    monkeypatch.setattr(glyphs, "FONTS", ("NoSuchFont",))
    with pytest.raises(ValueError, match=rf"fonts of matplotlib, and {matplotlib.__version__} lacks .*NoSuchFont.ttf"):
        glyphs.atlas.__wrapped__()


def test_matplotlib_is_loaded_by_the_first_image_alone() -> None:
    code = (
        "import sys; from experiments.training.config import model; from experiments.training.data import Glyphs\n"
        "Glyphs().check_model(model('vit-micro-glyphs')); print('matplotlib' in sys.modules)\n"
        "Glyphs(validation_images=36).load(model('vit-micro-glyphs')); print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"]
