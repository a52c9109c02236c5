"""Strided views as boxes: every element of a view, exactly once, at its place in both memories."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weightsync.agents.recorder import boxes as recorder_boxes
from weightsync.agents.recorder.boxes import (
    BoxPiece,
    StridedView,
    TooManyPieces,
    decompose,
    dense_strides,
    intersection,
)


def geometry(tensor: torch.Tensor) -> StridedView:
    return StridedView(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())


def elements(pieces: list[BoxPiece], base: StridedView) -> list[tuple[int, int]]:
    """(offset in the base's memory, offset in the far memory) of every element of every piece."""
    pairs = []
    for piece in pieces:
        indices = torch.cartesian_prod(*(torch.arange(n) for n in piece.extent)).reshape(-1, len(piece.extent))
        for index in indices.tolist():
            near = sum((c + i) * s for c, i, s in zip(piece.corner, index, base.strides, strict=True))
            pairs.append((near, piece.offset + sum(i * s for i, s in zip(index, piece.strides, strict=True))))
    return sorted(pairs)


def expected(near: StridedView, far: StridedView) -> list[tuple[int, int]]:
    indices = torch.cartesian_prod(*(torch.arange(n) for n in near.sizes)).reshape(-1, len(near.sizes)).tolist()
    at = lambda view, index: view.offset + sum(i * s for i, s in zip(index, view.strides, strict=True))  # noqa: E731
    return sorted((at(near, index), at(far, index)) for index in indices)


STEPS = st.sampled_from(("narrow", "transpose", "flatten", "select", "chunk", "split heads", "unsqueeze", "step"))


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor and some view of it, made the ways weight loaders make them."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    base = torch.arange(int(torch.Size(shape).numel())).reshape(shape)
    view = base
    for step in draw(st.lists(STEPS, max_size=4)):
        dim = draw(st.integers(0, view.dim() - 1)) if view.dim() else 0
        if step == "narrow" and view.dim():
            start = draw(st.integers(0, view.size(dim) - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.size(dim) - start)))
        elif step == "transpose" and view.dim() > 1:
            view = view.transpose(0, dim)
        elif step == "flatten" and view.is_contiguous():
            view = view.view(-1)
        elif step == "select" and view.dim() > 1:
            view = view.select(dim, draw(st.integers(0, view.size(dim) - 1)))
        elif step == "chunk" and view.dim():
            view = draw(st.sampled_from(view.chunk(2, dim)))
        elif step == "split heads" and view.dim() and view.dim() < 4 and view.size(dim) % 2 == 0:
            view = view.unflatten(dim, (2, -1))
        elif step == "unsqueeze" and view.dim() < 4:
            view = view.unsqueeze(0)
        elif step == "step" and view.dim():
            view = view[(slice(None),) * dim + (slice(None, None, 2),)]
    return base, view


@given(views(), st.booleans())
def test_boxes_hold_each_element_of_a_view_once_and_at_its_place(
    pair: tuple[torch.Tensor, torch.Tensor], reversed_far: bool
) -> None:
    base, view = pair
    order = tuple(reversed(range(view.dim()))) if reversed_far else tuple(range(view.dim()))
    far = torch.empty(tuple(view.size(d) for d in order)).permute(tuple(order.index(d) for d in range(view.dim())))
    pieces = decompose(geometry(base), geometry(view), geometry(far))
    assert elements(pieces, geometry(base)) == expected(geometry(view), geometry(far))


@given(views())
def test_whole_views_of_a_permuted_base_are_found_too(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, view = pair
    turned = base.permute(tuple(reversed(range(base.dim()))))
    pieces = decompose(geometry(turned), geometry(view), geometry(view.contiguous()))
    assert elements(pieces, geometry(turned)) == expected(geometry(view), geometry(view.contiguous()))


def test_a_narrowed_matrix_is_one_box() -> None:
    base = torch.empty(8, 6)
    view = base.narrow(0, 2, 4).narrow(1, 3, 3)
    (piece,) = decompose(geometry(base), geometry(view), StridedView((4, 3), (3, 1)))
    assert piece == BoxPiece((2, 3), (4, 3), 0, (3, 1))


def test_a_transposed_copy_is_one_box_with_swapped_strides() -> None:
    base = torch.empty(4, 6)
    (piece,) = decompose(geometry(base), geometry(base.t()), StridedView((6, 4), (4, 1)))
    assert piece == BoxPiece((0, 0), (4, 6), 0, (1, 4))


def test_a_flat_range_is_a_rest_whole_rows_and_a_part() -> None:
    base = torch.empty(5, 4)
    flat = StridedView((15,), (1,), 3)
    pieces = decompose(geometry(base), flat, StridedView((15,), (1,)))
    assert pieces == [
        BoxPiece((0, 3), (1, 1), 0, (0, 0)),
        BoxPiece((1, 0), (3, 4), 1, (4, 1)),
        BoxPiece((4, 0), (1, 2), 13, (0, 1)),
    ]


def test_a_scalar_is_one_box_without_dimensions() -> None:
    assert decompose(StridedView((), ()), StridedView((), ()), StridedView((), (), 7)) == [BoxPiece((), (), 7, ())]


def test_an_empty_view_is_no_box() -> None:
    assert decompose(StridedView((4, 4), (4, 1)), StridedView((0, 4), (4, 1)), StridedView((0, 4), (4, 1))) == []


def test_a_broadcast_repeats_its_box() -> None:
    pieces = decompose(StridedView((3,), (1,)), StridedView((2, 3), (0, 1)), StridedView((2, 3), (3, 1)))
    assert pieces == [BoxPiece((0,), (3,), 0, (1,)), BoxPiece((0,), (3,), 3, (1,))]


def test_a_shuffle_of_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_boxes, "MAX_PIECES", 7)
    with pytest.raises(TooManyPieces, match="more than 7 boxes"):
        decompose(StridedView((16,), (1,)), StridedView((8,), (2,)), StridedView((8,), (1,)))


def test_dense_strides_are_those_of_a_contiguous_tensor() -> None:
    assert dense_strides((2, 3, 4)) == torch.empty(2, 3, 4).stride()
    assert dense_strides(()) == ()


def test_intersections_of_boxes() -> None:
    assert intersection((0, 2), (4, 4), (2, 0), (4, 4)) == ((2, 2), (2, 2))
    assert intersection((0,), (4,), (4,), (4,)) is None
