"""What a rank leaves out, within limits; names worked out by hand."""

from weightsync.agents.recorder.left_out import NOTHING_NEEDED, OTHER_REASONS, left_out
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.orchestrator.protocol.codec import decode_from_agent, encode
from weightsync.orchestrator.protocol.layout import Layout, LeftOut
from weightsync.orchestrator.protocol.messages import Announce


def survives_the_wire(found: tuple[LeftOut, ...]) -> bool:
    message = Announce(layout=Layout((), (), b"", left_out=found))
    return decode_from_agent(encode(message)) == message


def test_nothing_left_out_is_nothing_said() -> None:
    assert left_out([], [], {}, ["a"]) == ()


def test_each_kind_by_its_reason() -> None:
    unrecorded = [
        Unrecorded("rope.cache", 8, "a buffer"),
        Unrecorded("embed", 4, "padding"),
        Unrecorded("rope2.cache", 8, "a buffer"),
    ]
    assert left_out(unrecorded, ["mtp.fc"], {"conv": "nobody knows"}, ["embed"]) == (
        LeftOut("unwritten", "a buffer", ("rope.cache", "rope2.cache"), 2),
        LeftOut("unwritten", "padding", ("embed",), 1),
        LeftOut("unprobed", "nobody knows", ("conv",), 1),
        LeftOut("unneeded", NOTHING_NEEDED, ("mtp.fc",), 1),
    )


def test_what_other_ranks_hold_comes_last_and_all_is_counted() -> None:
    """Of 3000 experts of other ranks the limit leaves 999 names; the one tensor that no rank has is among them."""
    others = [f"layers.0.experts.{number}.w" for number in range(1, 3001)]
    (found,) = left_out([], [*others, "layers.1.eh_proj"], {}, ["layers.0.experts.0.w"])
    assert (found.names[0], len(found.names), found.count) == ("layers.1.eh_proj", 1000, 3001)
    assert survives_the_wire((found,))


def test_long_texts_and_many_reasons_stay_within_the_protocol() -> None:
    unprobed = {f"layer.{number}" + "x" * 1000: f"error {number} " + "y" * 5000 for number in range(500)}
    found = left_out([], [], unprobed, [])
    assert len(found) == 21
    assert (found[-1].reason, found[-1].count) == (OTHER_REASONS, 480)
    assert {len(entry.reason) for entry in found[:-1]} == {400}
    assert survives_the_wire(found)
