"""The multipliers of the digest: what the digest is, and how often it can be wrong.

Definition
    The bytes of a logical tensor are read as little-endian 32-bit words; byte ``b`` of the tensor counts as its value
    plus one (so that zeros count as well), a byte that is not there as nothing. With ``w`` the index of a word,
    ``t, j = divmod(w, TILE_WORDS)`` and ``c(w)`` the word's count (0 … 256·0x01010101)::

        D(t)  = Σ_j g[j]·c(w)      D'(t) = Σ_j g'[j]·c(w)                    (mod 2**64)
        digest_s = Σ_keys Σ_t  H_s(key, t)·D(t) + H'_s(key, t)·D'(t)         (mod 2**64),  s = 0, 1

    ``g`` and ``g'`` are two fixed tables of random 32-bit numbers; ``H_0, H'_0, H_1, H'_1`` are four 32-bit hashes of
    the tensor's key and of the tile. Everything is linear in the counted bytes. So the digest of disjoint boxes, cut
    at any byte, adds up to that of their union, whatever memory they lie in.

Collision probability
    Take any difference that does not depend on the weights: flipped bits, swapped words, rows or regions, something
    stale, missing or doubled. Let ``δ_j`` be the differences of the counts in one tile that has any, and ``2**k`` the
    largest power of two in all of them; ``k <= 32``. Modelling tables and hashes as independent and uniform:

    * ``2**m`` divides ``D`` with probability at most ``2**-min(m-k, 32)``, since one ``g[j]`` is fixed modulo
      ``2**(m-k)`` by the others; ``D'`` is independent. So ``V = min(v2(D), v2(D'))`` reaches ``m`` with probability
      at most ``4**-min(m-k, 32)``.
    * Given ``V = m < 64`` a sum vanishes with probability at most ``2**-min(64-m, 32)``, both with
      ``4**-min(64-m, 32)``, because the two sums have their own ``H``.

    Summed over ``m`` with ``k = 32``, the worst case, that is at most ``34 · 2**-64``, **below 2**-58**; for a
    difference with an odd count (``k = 0``) below ``2**-62``. (The multiplication is that of multilinear hashing:
    Carter and Wegman 1979; Lemire and Kaser, "Strongly universal string hashing is fast", 2014.) The digest is a check
    against faults; it is no defence against someone who chooses the bytes with the weights in hand.
"""

import hashlib
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

TILE_WORDS: Final = 2048
"""Words under one outer multiplier: the inner tables (16 KiB) stay in registers or L1, a hash is paid per 8 KiB."""
TILE_BYTES: Final = 4 * TILE_WORDS
PRESENT: Final = 0x01010101
"""The plus one of each of a word's four bytes."""

_GOLDEN: Final = 0x9E3779B97F4A7C15
"""SplitMix64's step: 2**64 divided by the golden ratio, made odd."""
_INNER_SEED: Final = 0x6A09E667F3BCC908
_OUTER_SEEDS: Final = (0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B)
"""Nothing up the sleeve: 64 fractional bits of the square roots of 2, 3 and 5, as SHA-512 begins with."""
FMIX_A: Final = 0x85EBCA6B
FMIX_B: Final = 0xC2B2AE35
"""The factors of MurmurHash3's 32-bit finaliser (Appleby, 2011)."""


def tensor_key(name: str) -> int:
    """The key of a logical tensor: 64 bits of BLAKE2b of its name, as a signed int64 that fits a table."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _mix64(value: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@cache
def inner_multipliers() -> Words:
    """``g`` and ``g'`` as uint64[TILE_WORDS, 2], each below 2**32. Read-only."""
    counter = np.arange(1, TILE_WORDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(_INNER_SEED)
    both = _mix64(counter)
    table = np.stack([both & np.uint64(0xFFFFFFFF), both >> np.uint64(32)], axis=1)
    table.setflags(write=False)
    return table


def outer_keys(keys: npt.NDArray[np.int64]) -> Words:
    """Two 64-bit words per key, uint64[n, 2]: the four 32-bit keys of the outer hashes, low half first."""
    pattern = keys.astype(np.int64).view(np.uint64)
    return np.stack([_mix64(_mix64(pattern + np.uint64(seed))) for seed in _OUTER_SEEDS], axis=1)


def outer_multipliers(packed: Words, tiles: npt.NDArray[np.int64]) -> Words:
    """``H_0, H'_0, H_1, H'_1`` of each tile as uint64[n, 4], each below 2**32.

    Args:
        packed: uint64[n, 2] (or [1, 2]) of :func:`outer_keys`.
        tiles: int64[n] tile indices, below 2**32.
    """
    keys = np.stack([packed & np.uint64(0xFFFFFFFF), packed >> np.uint64(32)], axis=2).reshape(-1, 4)
    state = (keys ^ tiles.astype(np.uint64)[:, None]).astype(np.uint32)
    state = (state ^ (state >> np.uint32(16))) * np.uint32(FMIX_A)  # MurmurHash3's 32-bit finaliser
    state = (state ^ (state >> np.uint32(13))) * np.uint32(FMIX_B)
    return (state ^ (state >> np.uint32(16))).astype(np.uint64)
