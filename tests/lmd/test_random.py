"""The laws of LMD's noise: published answers, one word per element on every path, and standard normals out of them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lmd.random import MASK, NoiseKey, box_muller, normal_pair, philox4x32, words

# Random123's known-answer vectors (Salmon et al. 2011): rounds, counter, key, output.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (MASK,) * 4, (MASK, MASK), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
KEYS = [NoiseKey(0), NoiseKey(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), NoiseKey(12345678901234567890, 3, 7, 1)]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(rounds, counter, key, expected):
    assert philox4x32(counter, key, rounds) == expected
    as_tensors = philox4x32(tuple(torch.tensor([word]) for word in counter), key, rounds)
    assert tuple(int(word) for word in as_tensors) == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 4097])
def test_words_are_the_same_from_python_torch_and_numba(key, count):
    from lmd import cpu, kernels

    drawn = words(key, count)
    for i in range(count):
        counter = (i // 4, key.draw, key.step, key.parameter)
        assert int(drawn[i]) == philox4x32(counter, (key.seed & MASK, key.seed >> 32))[i % 4]
    group = {"seed": key.seed, "step": key.step, "noise_scale": 0.1}
    compiled = np.zeros(count + 3, np.uint32)
    kernels.fill_words(compiled.ctypes.data, 0, count, key.parameter, cpu._noise(group, key.draw))
    assert compiled[:count].tolist() == drawn.tolist()


def test_a_word_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(words(KEYS[2], 1000), words(KEYS[2], 5000)[:1000])


def test_keys_that_differ_in_one_field_share_no_noise():
    key = NoiseKey(5, 5, 5, 5)
    others = [
        NoiseKey(6, 5, 5, 5),
        NoiseKey(5, 6, 5, 5),
        NoiseKey(5, 5, 6, 5),
        NoiseKey(5, 5, 5, 6),
        NoiseKey(5 + 2**32, 5, 5, 5),
    ]
    base = words(key, 1000)
    for other in others:
        # two independent streams of 1000 words agree somewhere with probability 1000 / 2**32
        assert not (words(other, 1000) == base).any()


def test_normals_reach_the_ends_of_the_word_without_a_nan():
    ends = torch.tensor([0, MASK, 0xFFFF, 0x3FFF0000, 1 << 31, 1 << 30])
    plus, minus = box_muller(ends)
    assert torch.isfinite(plus).all() and torch.isfinite(minus).all()
    longest = math.sqrt(-2.0 * math.log(2.0**-17))
    assert plus.abs().max() <= longest * (1 + 1e-6) and plus.abs().max() > 4.8


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_normals_pass_tests_of_normality_and_independence(path):
    """Fixed keys, so each p-value is one number; a bound of 1e-3 on eight of them is passed by 99.2% of correct
    generators.
    """
    count = 1 << 20
    if path == "plain":
        plus, minus = (x.double().numpy() for x in normal_pair(NoiseKey(1, 2, 3), torch.empty(count)))
    else:
        from lmd import cpu, kernels

        factors = np.zeros((2, count), np.float32)
        group = {"seed": 1, "step": 3, "noise_scale": 1.0}
        kernels.fill_noise(factors[0].ctypes.data, factors[1].ctypes.data, 0, count, 2, cpu._noise(group, 0))
        plus, minus = np.log(factors.astype(np.float64))
    for sample in (plus, minus):
        assert stats.kstest(sample, "norm").pvalue > 1e-3
        assert abs(sample.mean()) < 3.3 / math.sqrt(count)
        assert abs(sample.var() - 1.0) < 3.3 * math.sqrt(2.0 / count)
        assert abs((sample**4).mean() - 3.0) < 3.3 * math.sqrt(96.0 / count)
    for a, b in ((plus, minus), (plus[1:], plus[:-1]), (plus[4:], minus[:-4]), (plus**2, minus**2)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 3.3 / math.sqrt(count)
