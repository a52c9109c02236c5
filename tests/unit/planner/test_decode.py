"""Layouts in columns, and layouts that contradict themselves."""

import pytest
from layouts import SIZE, Builder, engine_rank, matrices, party_of, trainer, whole
from weightsync.orchestrator.planner import LayoutError, Party, make_plan
from weightsync.orchestrator.planner.decode import Decoder
from weightsync.orchestrator.protocol.layout import ROW_COLUMNS, Layout, Region


def broken(party, column, value):
    rows = party.layout.matrix().copy()
    rows[0, column] = value
    layout = party.layout
    return Party(party.member, 1, type(layout)(layout.tensors, layout.regions, rows.tobytes(), layout.staging))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, 9, "points to tensor"),
        (0, -1, "points to tensor"),
        (1, 7, "points to region"),
        (2, 1 << 62, "outside of its region"),
        (2, -1, "outside of its region"),
        (9, -1, "outside of the tensor's shape"),
        (10, SIZE + 1, "outside of the tensor's shape"),
        (10, -1, "outside of the tensor's shape"),
        (11, 1 << 60, "stride"),
        (11, -8, "stride"),
    ],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_layouts_that_contradict_themselves_are_refused(column, value, said, side):
    model = matrices(1)
    source, target = party_of(trainer(0), model), party_of(engine_rank("e"), model)
    guilty = source if side == "source" else target
    bad = broken(guilty, column, value)
    with pytest.raises(LayoutError, match=said) as error:
        make_plan([bad if side == "source" else source], [bad if side == "target" else target])
    assert error.value.member == guilty.member


def test_empty_boxes_are_ignored():
    (one,) = matrices(1)
    builder = Builder(trainer(0))
    builder.dense((one, ((SIZE, 0), (0, SIZE))))
    builder.dense(whole(one))
    target = Builder(engine_rank("e"))
    target.dense(whole(one))
    target.dense((one, ((0, 0), (0, SIZE))))
    plan = make_plan([builder.party()], [target.party()])
    assert plan.bytes == SIZE * SIZE * 2
    assert len(builder.party().layout.rows) == 2 * ROW_COLUMNS * 8


def test_ragged_rows_and_staging_outside_of_the_regions_are_refused():
    layout = party_of(trainer(0), matrices(1)).layout
    ragged = Party(trainer(0), 1, Layout(layout.tensors, layout.regions, layout.rows[:-8]))
    with pytest.raises(LayoutError, match="whole number of rows"):
        make_plan([ragged], [])
    staged = Party(trainer(0), 1, Layout(layout.tensors, layout.regions, layout.rows, 5))
    with pytest.raises(LayoutError, match="staging is region 5"):
        make_plan([staged], [])


def test_rows_and_forms_of_two_layers_that_are_alike():
    """Rows 1:3 of two matrices of 4 by 6, two bytes each; the second row of each box lies 12 bytes behind the first."""
    builder = Builder(trainer(0))
    for tensor in matrices(2, (4, 6)):
        builder.dense((tensor, ((1, 0), (2, 6))), gap=10)
    decoder = Decoder()
    rows, forms = decoder.decode(builder.party()).rows, decoder.form_table()
    assert rows.tensor.tolist() == [0, 1]
    assert rows.form.tolist() == [0, 0], "one form for both"
    assert rows.region.tolist() == [0, 0]
    assert rows.offset.tolist() == [10, 44]
    assert forms.offset.tolist() == [[0, 0, 1, 0]]
    assert forms.extent.tolist() == [[1, 1, 2, 6]]
    assert forms.stride[0, 2:].tolist() == [12, 2]
    assert forms.itemsize.tolist() == [2]
    assert forms.elements.tolist() == [12]
    assert forms.span.tolist() == [24]


def test_the_last_byte_of_a_region_is_inside_and_the_next_is_not():
    layout = party_of(trainer(0), matrices(1)).layout
    Decoder().decode(Party(trainer(0), 1, layout))
    shorter = Layout(layout.tensors, (Region(0, layout.regions[0].length - 1),), layout.rows)
    with pytest.raises(LayoutError, match="outside of its region"):
        Decoder().decode(Party(trainer(0), 1, shorter))
