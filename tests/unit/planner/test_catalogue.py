"""Shards, patterns and holders, worked out by hand."""

import pytest
from layouts import Builder, matrices, party_of, trainer, whole
from weightsync.orchestrator.planner import TooComplex
from weightsync.orchestrator.planner import catalogue as catalogue_module
from weightsync.orchestrator.planner.catalogue import make_catalogue
from weightsync.orchestrator.protocol.layout import Tensor


def rows_of(tensor, first, count):
    return tensor, ((first, *(0 for _ in tensor.shape[1:])), (count, *tensor.shape[1:]))


def test_shards_patterns_and_holders():
    """Two ranks share the rows of w; both hold b."""
    w, b = Tensor("w", "bfloat16", (4, 4)), Tensor("b", "bfloat16", (4,))
    sources = []
    for rank in range(2):
        builder = Builder(trainer(rank))
        builder.dense(rows_of(w, 2 * rank, 2))
        builder.dense(whole(b))
        sources.append(builder.party())
    found = make_catalogue(sources)
    assert found.held.source.tolist() == [0, 1, 0, 1]
    assert found.held.index.tolist() == [0, 0, 1, 1]
    assert found.held.offset.tolist() == [0, 0, 16, 16]
    assert found.shard_first.tolist() == [0, 1, 2, 4]
    assert [found.holder_sets[i].tolist() for i in found.shard_holders] == [[0], [1], [0, 1]]
    assert found.tensor_first.tolist() == [0, 2]
    first = found.pattern_first[found.pattern[0]]
    assert found.box_offset[first : first + 2, 2].tolist() == [0, 2]
    assert found.box_extent[first : first + 2].tolist() == [[1, 1, 2, 4]] * 2
    assert found.pattern[0] != found.pattern[1]


def test_layers_that_are_sharded_alike_share_a_pattern():
    sources = [party_of(trainer(r), matrices(6)[3 * r : 3 * r + 3]) for r in range(2)]
    found = make_catalogue(sources)
    assert found.pattern.tolist() == [0] * 6
    assert [found.holder_sets[i].tolist() for i in found.shard_holders] == [[0]] * 3 + [[1]] * 3


def test_boxes_that_overlap_are_cut_where_they_differ():
    """Rank 0 holds four elements of four bytes, rank 1 the last three: cut into 0:1 and 1:4."""
    tensor = Tensor("t", "float32", (4,))
    builders = [Builder(trainer(0)), Builder(trainer(1))]
    builders[0].dense(whole(tensor), gap=8)
    builders[1].dense(rows_of(tensor, 1, 3))
    found = make_catalogue([b.party() for b in builders])
    boxes = zip(found.box_offset[:, 3].tolist(), found.box_extent[:, 3].tolist(), strict=True)
    holders = [found.holder_sets[i].tolist() for i in found.shard_holders]
    assert dict(zip(boxes, holders, strict=True)) == {(0, 1): [0], (1, 3): [0, 1]}
    assert list(zip(found.held.source.tolist(), found.held.offset.tolist(), strict=True)) == [(0, 12), (1, 0), (0, 8)]
    assert found.held.index.tolist() == [0, 0, 0]


def test_a_shard_that_a_source_has_twice_is_held_once():
    (tensor,) = matrices(1)
    found = make_catalogue([party_of(trainer(0), [tensor, tensor])])
    assert found.held.index.tolist() == [0]
    assert found.shard_first.tolist() == [0, 1]


def test_too_many_cells_are_refused(monkeypatch):
    monkeypatch.setattr(catalogue_module, "MAX_CELLS", 1)
    tensor = Tensor("t", "float32", (4,))
    builders = [Builder(trainer(0)), Builder(trainer(1))]
    builders[0].dense(whole(tensor))
    builders[1].dense(rows_of(tensor, 1, 3))
    with pytest.raises(TooComplex, match="2 overlapping shards of one tensor would make 2 boxes; limit 1"):
        make_catalogue([b.party() for b in builders])
