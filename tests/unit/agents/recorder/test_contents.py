"""What a memory holds after edits, read back element by element and compared with a tensor that was edited alike."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from weightsync.agents.recorder import contents
from weightsync.agents.recorder.chains import Cast
from weightsync.agents.recorder.contents import Checkpoint, Contents, base_of, view_of

F32 = torch.float32
SOURCES = {name: Checkpoint(name, (4, 6), F32) for name in ("x", "y")}
VALUES = {"x": torch.arange(24.0).reshape(4, 6) + 100, "y": torch.arange(24.0).reshape(4, 6) + 200}
Edit = tuple[tuple[slice, slice], str]
spans = st.tuples(st.integers(0, 5), st.integers(0, 6)).map(lambda p: slice(min(p), max(p)))
edits = st.lists(st.tuples(st.tuples(spans, spans), st.sampled_from(["x", "y", ""])), max_size=6)


def read(memory: Contents, tensor: torch.Tensor) -> torch.Tensor:
    """Values of ``tensor``, by what ``memory`` says; constants are 0."""
    out = torch.zeros(tensor.shape)
    for found in memory.read(tensor, view_of(out)):
        assert found.source is not None
        values = VALUES[found.source.name].flatten()
        there = torch.as_strided(values, found.near.sizes, found.near.strides, found.near.offset)
        torch.as_strided(out, found.far.sizes, found.far.strides, found.far.offset).copy_(there)
    return out


@given(edits, st.booleans())
def test_the_last_write_to_each_element_counts(history: list[Edit], turned: bool) -> None:
    real = VALUES["x"].clone()
    stand_in = torch.empty(4, 6, device="meta")
    memory = Contents.of(SOURCES["x"], stand_in)
    sources = {name: (Contents.of(entry, t := torch.empty(4, 6, device="meta")), t) for name, entry in SOURCES.items()}
    for box, name in history:
        real[box] = VALUES[name][box] if name else 0
        view = stand_in[box]
        if not view.numel():
            continue
        other = sources[name] if name else None
        founds = other[0].read(other[1][box], view_of(view)) if other else []
        memory.write(view, [found.then(Cast(F32, F32)) for found in founds])
    view, expected = (stand_in.t(), real.t()) if turned else (stand_in[1:, ::2], real[1:, ::2])
    assert torch.equal(read(memory, view), expected)


def test_a_write_of_another_size_spoils_everything_by_name() -> None:
    stand_in = torch.empty(4, 6, device="meta")
    memory = Contents.of(SOURCES["x"], stand_in)
    memory.write(stand_in.view(torch.int16)[:, :1], [])
    (found,) = memory.read(stand_in, view_of(stand_in))
    assert found.source is None
    assert found.opaque == "x: written as torch.int16, of another size"


def test_too_many_edits_are_given_up_by_name(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(contents, "MAX_PARTS", 2)
    stand_in = torch.empty(4, 6, device="meta")
    memory = Contents.of(SOURCES["x"], stand_in)
    memory.write(stand_in[1:2, 1:2], [])
    assert memory.names() == ["x: edited into more than 2 boxes"]


def test_a_base_is_the_tensor_s_own_where_it_is_the_whole_storage() -> None:
    tensor = torch.empty(4, 6)
    assert base_of(tensor.t()).sizes == (6, 4)
    assert base_of(tensor[1:]).sizes == (24,)
    assert base_of(tensor.expand(2, 4, 6)).sizes == (24,)
