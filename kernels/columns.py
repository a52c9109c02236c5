"""The columns of a strided table and the kinds of elements in it, for those who write one and for the kernels that read
it. Imports nothing.

A row is ``run_bytes, src_region, src_offset, dst_region, dst_offset`` and three loops of ``count, src_stride,
dst_stride``, outermost first; loops that do not loop are (1, 0, 0). All are int64, offsets and strides in bytes. What a
row means is in :mod:`weightsync.kernels.strided`.
"""

from typing import Final, NamedTuple

import numpy as np

RUN_BYTES, SRC_REGION, SRC_OFFSET, DST_REGION, DST_OFFSET = range(5)
LOOPS: Final = 3
"""Loops around the contiguous run."""
LOOP_COLUMNS: Final = 3
"""Columns of one loop."""
COUNTS: Final = (5, 8, 11)
"""The column of each loop's count."""
SRC_STRIDE, DST_STRIDE = 1, 2
"""How far behind its count a loop's strides are."""
COLUMNS: Final = 14
"""Of the whole row."""


class Element(NamedTuple):
    """A format of numbers: ``exponent`` are the bits that are all ones in NaN and infinity, and in nothing finite."""

    itemsize: int
    exponent: int
    signed: bool = True

    @property
    def sign(self) -> int:
        """The sign's bit; 0 without one."""
        return 1 << (8 * self.itemsize - 1) if self.signed else 0


UNSEEN: Final = 0
"""The code of elements that are digested without a look at what they are."""
ELEMENTS: Final = {
    "bfloat16": Element(2, 0x7F80),
    "float16": Element(2, 0x7C00),
    "float32": Element(4, 0x7F80_0000),
    "float8_e5m2": Element(1, 0x7C),
    "float8_e4m3fn": Element(1, 0x7F),  # has no infinity
    "float8_e8m0fnu": Element(1, 0xFF, signed=False),
}
"""By torch's names of their dtypes. (OCP 8-bit Floating Point, 2023; OCP Microscaling Formats, 2023.)"""
KINDS: Final[tuple[Element | None, ...]] = (None, *ELEMENTS.values())
"""By code."""
CODES: Final = {name: code for code, name in enumerate(ELEMENTS, UNSEEN + 1)} | {
    "uint8": 1 + list(ELEMENTS).index("float8_e8m0fnu")  # exponents, where torch has no dtype for them
}
"""What stands for them beside a table, by dtype."""


def _test_of(element: Element) -> tuple[int, int]:
    """Without a sign its place holds one more bit of the exponent."""
    sign = 1 << (8 * element.itemsize - 1)
    exponent = element.exponent & (sign - 1)
    of_a_word = ((1 << 32) - 1) // ((sign << 1) - 1)  # a one for each element
    lowest = exponent & -exponent
    return of_a_word * (lowest << 32 | exponent), (1 << 32) - 1 if element.signed else 0


WORD_TESTS: Final = np.array([(0, 0), *map(_test_of, ELEMENTS.values())], np.int64)
"""By code, of a word of elements: exponent bits and the lowest ones of them (32 bits each), and bits that need not be
set. Words of what is not looked at pass for finite."""
