"""The digest's multipliers: fixed for ever, because two versions of the code must agree on every byte."""

import numpy as np
from weightsync.kernels.digest_multipliers import (
    TILE_WORDS,
    inner_multipliers,
    outer_keys,
    outer_multipliers,
    tensor_key,
)

MASK = (1 << 64) - 1


def splitmix(value: int) -> int:
    """SplitMix64's finaliser in Python's own integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def murmur(value: int) -> int:
    """MurmurHash3's 32-bit finaliser in Python's own integers."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)


def test_keys_of_tensors_are_signed_and_fixed() -> None:
    assert tensor_key("") == -5426141060434712860
    assert tensor_key("model.norm.weight") == 4304603226505007698


def test_inner_multipliers_are_those_of_the_generator() -> None:
    table = inner_multipliers()
    assert table.shape == (TILE_WORDS, 2)
    assert not table.flags.writeable
    assert int(table.max()) < 1 << 32
    for word in (0, 1, TILE_WORDS - 1):
        both = splitmix(((word + 1) * 0x9E3779B97F4A7C15 + 0x6A09E667F3BCC908) & MASK)
        assert table[word].tolist() == [both & 0xFFFFFFFF, both >> 32]
    assert len(np.unique(table)) > 2 * TILE_WORDS - 8, "32-bit numbers drawn at random hardly ever meet"


def test_outer_multipliers_are_hashes_of_key_and_tile() -> None:
    keys = np.array([tensor_key("a"), -1, 0], dtype=np.int64)
    packed = outer_keys(keys)
    tiles = np.array([0, 5, (1 << 32) - 1], dtype=np.int64)
    for key, words, tile, found in zip(keys, packed, tiles, outer_multipliers(packed, tiles), strict=True):
        seeds = (0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B)
        expected = [splitmix(splitmix((int(key) + seed) & MASK)) for seed in seeds]
        assert words.tolist() == expected
        halves = [half for word in expected for half in (word & 0xFFFFFFFF, word >> 32)]
        assert found.tolist() == [murmur(half ^ int(tile)) for half in halves]


def test_one_key_serves_many_tiles() -> None:
    packed = outer_keys(np.array([7], dtype=np.int64))
    tiles = np.arange(4, dtype=np.int64)
    assert outer_multipliers(packed, tiles).tolist() == outer_multipliers(packed.repeat(4, axis=0), tiles).tolist()
