"""Which of the sources that hold a piece sends it: the least loaded, without spreading a target over all of them."""

import numpy as np
from weightsync.orchestrator.planner.arrays import Ints, boundaries, starts
from weightsync.orchestrator.planner.catalogue import Catalogue


def choose(catalogue: Catalogue, shard: Ints, size: Ints, load: Ints) -> Ints:
    """Choose the source of each piece.

    Pieces that one source alone holds are its own. The others are pooled by the set of sources that hold them, small
    sets first; each pool is poured over its sources so that the least loaded fill up first (water filling), as
    consecutive stretches: a target then talks to few sources and its small pieces can share descriptors.

    Args:
        shard: of each piece ``[n]``, in the order of targets.
        size: bytes of each piece ``[n]``.
        load: bytes that each source sends already ``[sources]``; updated in place.

    Returns:
        For each piece ``[n]`` the row of ``catalogue.held`` that it is read from.
    """
    # A shard's rows in ``held`` are its holders in ascending order: the first is the answer where there is only one.
    held_row = catalogue.shard_first[shard]
    sets = catalogue.shard_holders[shard]
    set_sizes = np.array([len(s) for s in catalogue.holder_sets], np.int64)
    shared = set_sizes[sets] > 1
    np.add.at(load, catalogue.held.source[held_row[~shared]], size[~shared])
    of_set = np.flatnonzero(shared)
    of_set = of_set[np.argsort(sets[of_set], kind="stable")]
    limits = boundaries(sets[of_set])
    for start, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
        pool = of_set[start:end]
        holders = catalogue.holder_sets[sets[pool[0]]]
        chosen = pour(size[pool], load[holders])
        held_row[pool] += chosen
        load[holders] += np.bincount(chosen, weights=size[pool], minlength=len(holders)).astype(np.int64)
    return held_row


def pour(size: Ints, load: Ints) -> Ints:
    """For each piece ``[n]`` of ``size`` bytes the vessel it goes to, in stretches, levelling ``load + received``.

    A piece goes where its middle falls, so that no vessel is off by more than half a piece at either end.
    """
    filled = starts(water_fill(load, int(size.sum())))
    middle = np.cumsum(size) - size // 2
    return np.clip(np.searchsorted(filled[1:], middle, side="left"), 0, len(load) - 1)


def water_fill(load: Ints, amount: int) -> Ints:
    """How much of ``amount`` each vessel gets so that the lowest levels rise first and together.

    Args:
        load: level of each vessel ``[m]``, at least one.
        amount: what to pour, not negative.

    Returns:
        Integers ``[m]`` that sum to ``amount``.
    """
    ordered = np.sort(load)
    below = np.cumsum(ordered)
    vessels = np.arange(1, len(load) + 1)
    # Filling the k lowest up to the level of the k-th takes the sum of their gaps. The largest k for which ``amount``
    # suffices is the number of vessels that get anything.
    wet = int(np.flatnonzero(ordered * vessels - below <= amount)[-1]) + 1
    level, rest = divmod(amount + int(below[wet - 1]), wet)
    share = np.maximum(level - load, 0)
    # Integers do not divide evenly: the rest goes to the first of those that are filled, one each.
    lowest = np.flatnonzero(load <= level)[:rest]
    share[lowest] += 1
    return share
