"""Images of characters from the fonts that matplotlib ships, drawn from random words in integer arithmetic.

From the outlines' integer coordinates to the pixels there is no floating point and no library's rasterizer: the same
fonts and the same words give the same pixels on every machine.
"""

import hashlib
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)

SIZE = 16  # of an image, in pixels
CELL = 48  # of a cell of the atlas, in its pixels; a capital letter's height is half of it
FULL = 16  # a pixel of the atlas that lies inside the character: 4 x 4 samples
WORDS = 16 + SIZE * SIZE // 2  # of 64 random bits for each image: its parameters, then 32 bits of noise a pixel

# Ranges of the parameters, each uniform over the integers from the first to the one before the second.
HEIGHT = (8 * 256, 12 * 256 + 1)  # of a capital letter, in 1/256 pixel
STRETCH = (218, 301)  # of the width, in 1/256
PLACE = (-384, 385)  # of the character's centre, from the image's, in 1/256 pixel, across and down
SLANT = (-64, 65)  # pixels across for each pixel down, in 1/256
TILT = (-32, 33)  # pixels down for each pixel across, in 1/256
PAPER = (40, 101)  # value of a pixel without ink, of 255
INK = (100, 161)  # what full ink adds; clipped at 255
NOISE = (5, 21)  # standard deviation of a pixel's noise


@lru_cache(maxsize=1)
def atlas() -> np.ndarray:
    """Every character in every font at one capital height: (fonts, characters, CELL, CELL) uint8, read only.

    A value from 0 to FULL is how many of 4 x 4 samples lie inside the outline; the character is centred in its cell.

    Raises: ValueError for a matplotlib that lacks one of the fonts or does not give outlines in font units.
    """
    cells = np.stack([_font(name) for name in FONTS])
    cells.setflags(write=False)
    return cells


def fingerprint() -> str:
    """SHA-256, in hex, of the atlas and of what is drawn from it: of the first image of every font."""
    words = np.random.Philox(key=0).random_raw(len(FONTS) * WORDS).reshape(-1, WORDS)
    images = draw(words, np.arange(len(FONTS)) % len(CHARACTERS))
    return hashlib.sha256(atlas().tobytes() + images.tobytes()).hexdigest()


def draw(words: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images (B, SIZE, SIZE) uint8 of the characters `labels` (B,), 0 black and 255 white.

    words: (B, WORDS) uint64, uniformly random; an image depends on its own words and label alone.
    """
    ranges = ((0, len(FONTS)), HEIGHT, STRETCH, PLACE, PLACE, SLANT, TILT, PAPER, INK, NOISE)
    drawn = [uniform(words[:, i], *ends).astype(np.int32)[:, None] for i, ends in enumerate(ranges)]
    font, height, stretch, across, down, slant, tilt, paper, ink, noise = drawn  # each (B, 1)
    # The samples' offsets from the character's centre, in 1/768 pixel, for 3 x 3 samples a pixel.
    offset = 128 * np.arange(1 - 3 * SIZE, 3 * SIZE, 2, dtype=np.int32)
    x, y = offset - 3 * across, offset - 3 * down  # (B, 48) each
    scale = (1 << 23) // height  # pixels of the atlas in 1/768 pixel, in 2**-20
    width = scale * stretch >> 8
    column = _inside((width * x)[:, None, :] + (width * slant >> 8)[:, None] * y[:, :, None])  # (B, 48, 48) each
    row = _inside((scale * y)[:, :, None] + (scale * tilt >> 8)[:, None] * x[:, None, :])
    row *= CELL
    row += column
    row += ((font * len(CHARACTERS) + labels.astype(np.int32)[:, None]) * CELL**2)[:, None]
    samples = atlas().reshape(-1).take(row)
    bands = samples[:, 0::3] + samples[:, 1::3] + samples[:, 2::3]
    cover = (bands[:, :, 0::3] + bands[:, :, 1::3] + bands[:, :, 2::3]).astype(np.int32)  # (B, 16, 16), 0 to 9 FULL
    # The sum of 4 random bytes: nearly normal, mean 510, standard deviation 147.8.
    octets = np.ascontiguousarray(words[:, 16:]).astype("<u8", copy=False).view(np.uint8)
    octets = octets.reshape(len(words), SIZE, SIZE, 4)
    grain = octets[..., 0].astype(np.int32)
    for i in (1, 2, 3):
        grain += octets[..., i]
    grain -= 510
    cover *= (ink * 455)[:, None]  # 65536 / (9 FULL)
    grain *= (noise * 111)[:, None]  # 16384 / 147.8
    value = (cover >> 16) + (grain >> 14) + paper[:, None]
    return value.clip(0, 255).astype(np.uint8)


def uniform(words: np.ndarray, low: int, high: int) -> np.ndarray:
    """Integers from `low` to `high` - 1, int64, of the words' upper 32 bits; uniform to (high - low) / 2**32."""
    return low + ((words >> np.uint64(32)) * np.uint64(high - low) >> np.uint64(32)).astype(np.int64)


def _inside(position: np.ndarray) -> np.ndarray:
    """Rows or columns of a cell from offsets to its centre in 2**-20 pixels; past the edge the edge, which is empty."""
    position >>= 20
    position += CELL // 2
    return np.clip(position, 0, CELL - 1, out=position)


def _font(name: str) -> np.ndarray:
    """The cells of one font, (characters, CELL, CELL) uint8."""
    import matplotlib  # a quarter of a second to import: only for runs that use it

    ft2font: Any = import_module("matplotlib.ft2font")  # its types are those of one version

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise ValueError(f"glyphs are drawn from the fonts of matplotlib, and {matplotlib.__version__} lacks {path}")
    # Outlines in font units: before 3.11 the width would be divided by a factor, and before 3.10 the flag is a number.
    unhinted: dict[str, Any] = {} if matplotlib.__version_info__ >= (3, 11) else {"hinting_factor": 1}
    font = ft2font.FT2Font(str(path), **unhinted)
    no_scale = ft2font.LoadFlags.NO_SCALE if hasattr(ft2font, "LoadFlags") else ft2font.LOAD_NO_SCALE

    def outline(character: str) -> np.ndarray:
        font.load_char(ord(character), flags=no_scale)
        vertices, codes = font.get_path()  # in font units / 64
        units = vertices * 64
        if not (units == np.rint(units)).all():
            raise ValueError(f"glyphs need outlines in whole font units; matplotlib {matplotlib.__version__} rounds")
        return edges(units.astype(np.int64), codes)

    height = int(np.ptp(outline("H")[:, :, 1]))
    return np.stack([rasterize(outline(character), height) for character in CHARACTERS])


def edges(vertices: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The closed outline as straight edges, (N, 2, 2) int64: from and to, x and y, in 1/64 of the vertices' unit.

    A quadratic arc becomes 8 chords, their ends exact. vertices: (M, 2) int64; codes: (M,) as in matplotlib.path.Path.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    i, start, at = 0, vertices[0], vertices[0]
    while i < len(codes):
        if codes[i] == 1:  # MOVETO
            start = at = vertices[i]
        elif codes[i] == 2:  # LINETO
            found.append((64 * at, 64 * vertices[i]))
            at = vertices[i]
        elif codes[i] == 3:  # CURVE3: a control point, then the end
            control, end = vertices[i], vertices[i + 1]
            points = [(8 - t) ** 2 * at + 2 * t * (8 - t) * control + t * t * end for t in range(9)]
            found.extend(pairwise(points))
            at, i = end, i + 1
        elif codes[i] == 79:  # CLOSEPOLY: its vertex means nothing
            found.append((64 * at, 64 * start))
            at = start
        else:
            raise ValueError(f"an outline of lines and quadratic arcs has no code {codes[i]}")
        i += 1
    return np.array(found, dtype=np.int64)


def rasterize(outline: np.ndarray, height: int) -> np.ndarray:
    """The cell (CELL, CELL) uint8 of an outline by the non-zero winding rule, `height` being half a cell.

    outline: (N, 2, 2) int64 as `edges` gives it, y upwards. Raises: ValueError for one that does not fit the cell.
    """
    samples = 4 * CELL  # across and down
    low, high = outline.min((0, 1)), outline.max((0, 1))
    if ((high - low) * CELL > 2 * (CELL - 2) * height).any():
        raise ValueError(f"a character {high - low} units wide and high does not fit a cell of {2 * height}")
    # In units of which 2 x height are a sample, from the centre of the first one: exact.
    x, y = np.moveaxis(samples * outline - samples // 2 * (low + high) + (samples - 1) * height, 2, 0)  # (N, 2) each
    line = 2 * height * np.arange(samples)[:, None]  # (samples, 1)
    up, down = ((y[:, i] <= line) & (line < y[:, 1 - i]) for i in (0, 1))  # (samples, N): the edge crosses the line
    crossed, edge = np.nonzero(up | down)
    (x0, x1), (y0, y1) = x[edge].T, y[edge].T
    rise = y1 - y0
    sign = np.sign(rise)
    across = (x0 * rise + (line[crossed, 0] - y0) * (x1 - x0)) * sign  # of the crossing, times |rise|
    first = np.clip(-(-across // (2 * height * np.abs(rise))), 0, samples)  # the first sample at or after it
    winding = np.zeros((samples, samples + 1), dtype=np.int64)
    np.add.at(winding, (crossed, first), sign)
    inside = winding.cumsum(1)[::-1, :-1] != 0  # y downwards
    return inside.reshape(CELL, 4, CELL, 4).sum((1, 3)).astype(np.uint8)
