"""Tensors as numbers: by first appearance, with layers, and declared alike by all."""

import pytest
from layouts import SIZE, engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import DtypeMismatch, LayoutError, Party, ShapeMismatch, make_plan
from weightsync.orchestrator.planner.names import NO_LAYER, Names
from weightsync.orchestrator.protocol.layout import Layout, Tensor


@pytest.mark.parametrize(
    ("changed", "error", "values"),
    [
        ({"shape": (SIZE, SIZE + 1)}, ShapeMismatch, ["(64, 64)", "(64, 65)"]),
        ({"dtype": "float16"}, DtypeMismatch, ["bfloat16", "float16"]),
    ],
)
def test_disagreements_name_tensor_sides_and_values(changed, error, values):
    (tensor,) = matrices(1)
    other = Tensor(**{"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, **changed})
    sources = [party_of(trainer(0), matrices(3)), party_of(trainer(1), matrices(1))]
    with pytest.raises(error) as raised:
        make_plan(sources, [party_of(engine_rank("e"), [other])])
    assert raised.value.member == engine_rank("e")
    for text in (tensor.name, "trainer/0", "e/0", *values):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("t", "complex64", (2,)),
        Tensor("t", "bfloat16", (1, 1, 1, 1, 1)),
        Tensor("t", "bfloat16", (-1,)),
        Tensor("t", "bfloat16", (1 << 63, 0)),
    ],
)
def test_impossible_tensors_are_refused(tensor):
    good = party_of(trainer(0), matrices(1))
    layout = type(good.layout)((tensor,), good.layout.regions, b"")
    with pytest.raises(LayoutError, match="'t'"):
        make_plan([Party(trainer(0), 1, layout)], [])


def test_numbers_kinds_and_layers():
    names = Names()
    tensors = [
        Tensor("model.layers.3.w", "bfloat16", (2, 2)),
        Tensor("h.12.b", "bfloat16", (2,)),
        Tensor("model.norm.weight", "bfloat16", (2,)),
        Tensor("blocks.1.2.w", "float32", (2, 2)),
        Tensor("x.1234567.y", "bfloat16", (2, 2)),
    ]
    first, _ = names.ids(party_of(trainer(0), tensors[:3]))
    second, _ = names.ids(party_of(trainer(1), [tensors[3], tensors[0], tensors[4]]))
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 0, 4]
    assert names.layers().tolist() == [3, 12, NO_LAYER, 1, NO_LAYER], "seven digits are no layer"
    assert names.kinds().tolist() == [0, 1, 1, 2, 0]
    assert names.kind_shape == [(1, 1, 2, 2), (1, 1, 1, 2), (1, 1, 2, 2)]
    assert names.kind_itemsize == [2, 2, 4]


def test_equal_tables_have_equal_digests():
    names, model = Names(), matrices(3)
    digests = [names.ids(party_of(trainer(i), model))[1] for i in range(2)]
    assert digests[0] == digests[1] != names.ids(party_of(trainer(2), model[::-1]))[1]


def test_one_table_may_not_declare_a_tensor_in_two_ways():
    layout = party_of(trainer(0), matrices(1)).layout
    tensors = (*layout.tensors, Tensor(layout.tensors[0].name, "int8", (1,)))
    with pytest.raises(LayoutError, match="in two ways"):
        make_plan([Party(trainer(0), 1, Layout(tensors, layout.regions, b""))], [])
