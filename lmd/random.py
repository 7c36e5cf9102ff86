"""Counter-based normal noise: Philox4x32-7 words and Box-Muller.

Every word is a function of (seed, parameter index, step, draw, element index) and of nothing else: there is no
generator state, so noise is drawn again instead of stored, and depends neither on device and thread count nor on what
was drawn before. Philox4x32 is the generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (SC 2011); seven rounds are the fewest that its authors found to pass BigCrush.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

Word = int | Tensor
Words = tuple[Word, Word, Word, Word]


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of one tensor. `seed`: 64 bits; the others: 32 bits each."""

    seed: int
    parameter: int = 0
    step: int = 0
    draw: int = 0


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = ROUNDS) -> Words:
    """The four 32-bit output words of a counter and a key.

    A word is a Python int or an int64 tensor with values 0 .. 2**32 - 1; tensors broadcast. The 64-bit products wrap
    in int64, which leaves both of their 32-bit halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK, (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0 = (k0 + WEYL[0]) & MASK
        k1 = (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(key: NoiseKey, count: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """One 32-bit word for each of `count` elements from `first` on, as an int64 tensor of shape (count,).

    Element i takes word i % 4 of the counter (i // 4, draw, step, parameter) under the key (low, high half of the
    seed).
    """
    block = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=device)
    output = philox4x32((block, key.draw, key.step, key.parameter), (key.seed & MASK, key.seed >> 32))
    return torch.stack([torch.as_tensor(word, device=device) for word in output], dim=1).reshape(-1)[first % 4 :][
        :count
    ]


def box_muller(word: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from each word, of the given dtype and the word's shape.

    Bits 0-15 give the radius sqrt(-2 log((k + 1/2) / 2**16)), at most 4.86; bits 16-29 the angle in the first quarter,
    (k + 1/2) / 2**14 pi / 2; bits 31 and 30 the signs. The arguments of log, cos and sin are exact on every backend.
    """
    radius = torch.sqrt(-2.0 * torch.log(((word & 0xFFFF).to(dtype) + 0.5) * 2.0**-16))
    angle = ((word >> 16 & 0x3FFF).to(dtype) + 0.5) * (math.pi * 2.0**-15)
    plus = radius * torch.cos(angle)
    minus = radius * torch.sin(angle)
    return torch.where(word >> 31 == 1, -plus, plus), torch.where(word >> 30 & 1 == 1, -minus, minus)


def normal_pair(key: NoiseKey, like: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Independent standard normal tensors (eps+, eps-) with the shape, dtype and device of `like`.

    first: the place that the first element of `like` has in the tensor that the key names, where `like` is a part.
    """
    plus, minus = box_muller(words(key, like.numel(), like.device, first), like.dtype)
    return plus.view(like.shape), minus.view(like.shape)
