"""What is wrong is said once, and many things of one kind in one line."""

from weightsync.orchestrator.daemon.run_directory.problems import SHOWN, MarkerProblem, Problems


def wrong(number: int, fix: str = "name it otherwise") -> MarkerProblem:
    return MarkerProblem(f"broadcasts/x{number}", "wrongly named", fix)


def test_each_is_news_once_and_again_after_it_was_gone() -> None:
    problems = Problems()
    problems.put(1, (wrong(1),))
    assert problems.news() == (wrong(1),)
    assert problems.news() == ()
    assert problems.shown() == (wrong(1),)
    problems.put(1, ())
    assert (problems.news(), problems.shown()) == ((), ())
    problems.put(1, (wrong(1),))
    assert problems.news() == (wrong(1),)


def test_the_place_that_has_another_problem_now_has_lost_the_one_before() -> None:
    problems = Problems()
    problems.put(None, (wrong(1), wrong(2)))
    problems.put(None, (wrong(2), wrong(3)))
    assert problems.shown() == (wrong(2), wrong(3))


def test_many_of_one_kind_are_one_line_and_others_are_not_hidden_by_it() -> None:
    problems = Problems()
    for number in range(1000):
        problems.put(number, (wrong(number),))
    problems.put(None, (wrong(1, "remove it"),))
    other, line = problems.news()
    assert other == wrong(1, "remove it")
    assert line.what == "1000 places have the same remedy, one of them broadcasts/x0, wrongly named"
    assert (line.path, line.fix) == ("broadcasts", "name it otherwise")
    problems.put(2000, (wrong(2000),))
    assert problems.news() == (), "one more is no news"
    assert problems.shown()[1].what.startswith("1001 places")


def test_one_that_comes_and_goes_is_no_news_each_time() -> None:
    problems = Problems()
    for number in range(SHOWN):
        problems.put(number, (wrong(number),))
    assert len(problems.news()) == SHOWN
    for _ in range(3):
        problems.put(99, (wrong(99),))
        told = problems.news()
        problems.put(99, ())
        assert problems.news() == ()
    assert told == ()


def test_nothing_is_wrong_after_all() -> None:
    problems = Problems()
    problems.put(1, (wrong(1),))
    problems.clear()
    assert problems.shown() == ()
    problems.put(1, ())
