"""Random bits for stochastic rounding: the words that `reference.random_word` defines, many at a time.

They come from the block cipher Philox4x32, here in vector lanes.
"""

# mypy: disable-error-code="no-untyped-def, call-arg"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lpsim.formats import reference
from lpsim.quantization.cpu_kernels.simd import I64, Lanes, Memory, splat

_LOW = 0xFFFFFFFF


def _philox(counter: list[Lanes], key: tuple[Lanes, Lanes]) -> list[Lanes]:
    """reference.philox4x32 with PHILOX_ROUNDS rounds, on 32-bit words in 64-bit lanes: nothing is packed in between.

    What lies above the lower 32 bits of a lane is left there; only they are multiplied.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(reference.PHILOX_ROUNDS):
        p0, p1 = (c0 & _LOW) * 0xD2511F53, (c2 & _LOW) * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1, (p0 >> 32) ^ c3 ^ k1, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return [c0, c1, c2, c3]


@intrinsic
def _random_chunk(typingctx: Any, at: Any, low: Any, high: Any, key: Any) -> Any:
    """Writes the halves of 128 random words, those of 16 Philox groups, to the address `at`: 16 bits each.

    low, high: the counter words of the first group. key: a tuple of the words of the seed, the stream and the step.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = Memory.at(builder, ir.IntType(16), args[0])
        key_words = [splat(builder, builder.extract_value(args[3], place), 8) for place in range(4)]
        halves = []
        for first in (0, 8):
            lane = Lanes(builder, ir.Constant(ir.VectorType(I64, 8), list(range(first, first + 8))))
            begin, top = (splat(builder, value, 8) for value in (args[1], args[2]))
            halves.append(_philox([begin + lane, top, *key_words[2:]], (key_words[0], key_words[1])))
        places = [4 * lane + half for half in (0, 1) for lane in range(16)]  # a word's halves are neighbouring slots
        for word, (lower, upper) in enumerate(zip(*halves, strict=True)):
            slots = lower.halfwords().shuffled(upper.halfwords(), places)
            target.store(ir.Constant(I64, 32 * word), slots)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, key), codegen


@njit(nogil=True)
def fill_random(address, start, count, selector, key):
    """Writes the 16-bit halves of random words for the elements start .. start + count to an address.

    Element i stands at place i − (start & ~127). selector: 0 for the upper halves, 1 for the lower.
    key: the words of the seed, the stream and the step.
    """
    first = start >> 7
    for chunk in range(((start + count + 127) >> 7) - first):
        group = (first + chunk) * 16
        _random_chunk(address + 256 * chunk, group, (group >> 32) | (selector << 31), key)
