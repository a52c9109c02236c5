"""What a stream declares: pieces as torch.chunk cuts them, and contradictions refused by name."""

import itertools

import pytest
import torch
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError


def chunked(full: torch.Tensor, placements: tuple[int | None, ...], mesh: tuple[int, ...], at: tuple[int, ...]):
    """The piece at coordinate ``at``: torch.chunk axis by axis, the outer one first."""
    for dim, parts, index in zip(placements, mesh, at, strict=True):
        if dim is None:
            continue
        pieces = torch.chunk(full, parts, dim)
        full = pieces[index] if index < len(pieces) else full.narrow(dim, 0, 0)
    return full


@pytest.mark.parametrize("shape", [(7, 5), (8, 6), (3, 4)])
@pytest.mark.parametrize("placements", [(0, None), (None, 1), (0, 0), (0, 1), (1, 0), (None, None)])
def test_pieces_are_those_of_torch_chunk(shape: tuple[int, int], placements: tuple[int | None, int | None]) -> None:
    full = torch.arange(shape[0] * shape[1]).view(shape)
    owners, mesh = (4, 9, 2, 3, 0, 7), (2, 3)
    declared = StreamedTensor("w", torch.bfloat16, shape, owners, mesh, placements)
    for owner, at in zip(owners, itertools.product(range(2), range(3)), strict=True):
        share = declared.share(owner)
        assert share is not None
        piece = chunked(full, placements, mesh, at)
        held = [full[box.box.slices] for box in share.boxes]
        assert sum(box.numel() for box in held) == piece.numel()
        for box, source in zip(share.boxes, held, strict=True):
            assert torch.equal(piece[box.local], source)
    assert declared.share(1) is None


def test_without_owners_every_rank_has_it_whole() -> None:
    share = StreamedTensor("w", torch.float32, (3, 2)).share(5)
    assert share is not None
    assert (share.local_shape, share.grid) == ((3, 2), None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": torch.int8}, "torch.int8 is no weight of floating point"),
        ({"shape": (0,)}, "has no elements"),
        ({"mesh_shape": (1,)}, "without owners"),
        ({"placements": (0,)}, "without owners"),
        ({"owners": ()}, "are not distinct ranks"),
        ({"owners": (1, 1)}, "are not distinct ranks"),
        ({"owners": (-1,)}, "are not distinct ranks"),
        ({"owners": (0, 1), "mesh_shape": (3,)}, "does not cover its 2 owners"),
        ({"owners": (0, 1), "placements": (0, 1)}, "2 placements for a mesh of 1 axes"),
        ({"owners": (0, 1), "placements": (2,)}, "dimension 2 of a tensor of shape"),
    ],
)
def test_contradictions_are_refused_by_name(fields: dict[str, object], says: str) -> None:
    plain: dict[str, object] = {"dtype": torch.float32, "shape": (4, 4)}
    with pytest.raises(StreamError, match=r"metadata of 'layer\.w'.*" + says):
        StreamedTensor("layer.w", **{**plain, **fields})  # type: ignore[arg-type]
