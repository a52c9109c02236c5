"""What came last is kept, in the order in which it came last."""

from weightsync.orchestrator.core.newest import keep_newest


def test_the_oldest_make_room() -> None:
    kept: dict[str, int] = {}
    assert [keep_newest(kept, key, number, 3) for number, key in enumerate("abcd")] == [[], [], [], ["a"]]
    assert list(kept.items()) == [("b", 1), ("c", 2), ("d", 3)]


def test_what_comes_again_is_the_newest() -> None:
    kept = {"a": 0, "b": 1}
    assert keep_newest(kept, "a", 5, 2) == []
    assert list(kept.items()) == [("b", 1), ("a", 5)]
    assert keep_newest(kept, "c", 6, 1) == ["b", "a"]
