"""Counter-based normal noise: Philox4x32-7 words and Box-Muller.

Every word is a function of (seed, parameter index, step, draw, element index) and of nothing else: no generator
state, so the noise can be drawn again instead of stored, and does not depend on device, thread count or on what was
drawn before. Philox4x32 is the generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
3" (SC 2011); seven rounds are the fewest that the authors found to pass BigCrush.
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
    """Names one noise tensor pair. `seed`: 64 bits; the others: 32 bits each."""

    seed: int
    parameter: int = 0
    step: int = 0
    draw: int = 0


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = ROUNDS) -> Words:
    """The four 32-bit output words of a counter and a key.

    A word is a Python int or an int64 tensor holding 0 .. 2**32 - 1 (broadcast against the others). The 64-bit
    products wrap in int64, which leaves both 32-bit halves right.
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


def words(key: NoiseKey, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two words for each of `count` elements, as int64 tensors of shape (count,).

    Counter (block, draw, step, parameter) serves the elements 2 * block (its words 0 and 1) and 2 * block + 1 (words
    2 and 3).
    """
    block = torch.arange((count + 1) // 2, dtype=torch.int64, device=device)
    w0, w1, w2, w3 = philox4x32((block, key.draw, key.step, key.parameter), (key.seed & MASK, key.seed >> 32))
    first = torch.stack((torch.as_tensor(w0), torch.as_tensor(w2)), dim=1).reshape(-1)[:count]
    second = torch.stack((torch.as_tensor(w1), torch.as_tensor(w3)), dim=1).reshape(-1)[:count]
    return first, second


def box_muller(first: Tensor, second: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two independent standard normals for each pair of words.

    radius = sqrt(-2 log((first + 1/2) / 2**32)), at most 6.77; angle = 2 pi second / 2**32, `second` read as a signed
    integer so that small angles keep their precision. (first + 1/2) / 2**32 rounds to at most 1, so the radius is
    never NaN.
    """
    radius = torch.sqrt(-2.0 * torch.log((first.to(dtype) + 0.5) * 2.0**-32))
    signed = torch.where(second >= 2**31, second - 2**32, second)
    angle = signed.to(dtype) * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal_pair(key: NoiseKey, like: Tensor) -> tuple[Tensor, Tensor]:
    """Independent standard normal tensors (eps_plus, eps_minus) with the shape, dtype and device of `like`."""
    first, second = words(key, like.numel(), like.device)
    plus, minus = box_muller(first, second, like.dtype)
    return plus.view(like.shape), minus.view(like.shape)
