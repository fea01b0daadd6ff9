"""Sweeps: what is kept of them, how they go on, how many work at a time, and which points are worth having."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from depgraph.errors import SweepError
from depgraph.widths import Cost
from importance.side_by_side import made, room
from importance.sweeping import DENSE, Figure, Log, Outcome, Point, on_front, sweep, trade_off

SETTINGS = {"--seed": "0", "data of content": "ab12"}
FIGURE = Figure("perplexity", "text")
POINTS = [Point(DENSE, "params", 1.0), Point("obs", "params", 0.5), Point("obs", "params", 0.25)]


def outcome(point: Point, quality: float | None = 5.0) -> Outcome:
    return Outcome(point, Cost(int(1000 * point.share), 10, 4000), quality, FIGURE, 1e-7, 0.5, 1 << 20)


class Makes:
    """Makes points, notes them, and is interrupted at one."""

    def __init__(self, stop: Point | None = None) -> None:
        self.made: list[Point] = []
        self.stop = stop

    def __call__(self, point: Point) -> Outcome:
        if point == self.stop:
            raise KeyboardInterrupt
        self.made.append(point)
        return outcome(point)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "points.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(POINTS, Makes(stop=POINTS[2]), Log(path, SETTINGS))
    later = Makes()
    found = sweep([*POINTS, Point("best", "params", 0.5)], later, Log(path, SETTINGS))
    assert later.made == [POINTS[2], Point("best", "params", 0.5)]
    assert found[:3] == [outcome(point) for point in POINTS]
    assert sweep(POINTS, Makes(stop=POINTS[0]), Log(path, SETTINGS)) == found[:3]


def test_a_line_cut_short_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    sweep(POINTS[:2], Makes(), Log(path, SETTINGS))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    later = Makes()
    sweep(POINTS[:2], later, Log(path, SETTINGS))
    assert later.made == [POINTS[1]]
    assert path.read_bytes() == whole


def test_a_changed_setting_is_noticed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    sweep(POINTS[:1], Makes(), Log(path, SETTINGS))
    with pytest.raises(SweepError, match="made with --seed 0, which is 1 now"):
        Log(path, {**SETTINGS, "--seed": "1"})
    with pytest.raises(SweepError, match="made with --floor nothing, which is 0.1 now"):
        Log(path, {**SETTINGS, "--floor": "0.1"})


@pytest.mark.parametrize("line", ["no json", "[]", '{"point": 3}', '{"poem": 1}'])
def test_a_line_that_is_none_of_a_sweep_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    sweep(POINTS[:1], Makes(), Log(path, SETTINGS))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SweepError, match=r"line 3 of .*points\.jsonl is none of a sweep"):
        Log(path, SETTINGS)
    path.write_text(line + "\n")
    with pytest.raises(SweepError, match="line 1 of"):
        Log(path, SETTINGS)


def test_nothing_is_left_where_nothing_was_made_or_can_be(tmp_path: Path) -> None:
    path = tmp_path / "new" / "points.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(POINTS, Makes(stop=POINTS[0]), Log(path, SETTINGS))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(SweepError, match="can't be used for a sweep"):
        sweep(POINTS, Makes(), Log(tmp_path / "file" / "points.jsonl", SETTINGS))


def test_what_may_pass_is_tried_again_and_what_is_refused_is_not(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    refused, passing = (Outcome(point, refused="no", again=k == 1) for k, point in enumerate(POINTS[:2]))
    sweep(POINTS[:2], lambda point: refused if point == POINTS[0] else passing, Log(path, SETTINGS))
    later = Makes()
    found = sweep(POINTS[:2], later, Log(path, SETTINGS))
    assert later.made == [POINTS[1]]
    assert found == [refused, outcome(POINTS[1])]


def test_outcomes_that_are_not_finite_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    sweep(POINTS[:1], lambda point: outcome(point, float("inf")), Log(path, SETTINGS))
    assert Log(path, SETTINGS).outcomes[POINTS[0]].quality is None
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_as_many_work_at_a_time_as_memory_allows() -> None:
    assert room(0, 100, 8) == 1
    assert room(10, 100, 8) == 8
    assert room(30, 100, 8) == 2
    assert room(300, 100, 8) == 1
    assert room(10, None, 8) == 8


@dataclass(frozen=True)
class Process:
    """Says which process worked, and dies where it is told to."""

    dies_at: int = -1

    def __call__(self, number: int) -> tuple[int, int]:
        if number == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return number, os.getpid()


@pytest.mark.slow
def test_a_process_that_dies_is_said_with_what_it_worked_on() -> None:
    working = made(range(5), Process(dies_at=1), lambda result: 1, 2)
    assert next(working)[0] == 0
    with pytest.raises(SweepError, match="died, perhaps for want of memory: run it again with fewer jobs"):
        list(working)


def test_one_job_is_done_by_this_process() -> None:
    assert {process for _, process in made(range(3), Process(), lambda result: 1, 1)} == {os.getpid()}


def test_the_front_is_what_no_other_beats() -> None:
    pairs = [(0.5, 10.0), (0.5, 9.0), (0.7, 8.0), (0.9, 8.5), (0.3, 30.0), (0.498, 10.5)]
    assert on_front(pairs) == [False, True, True, False, True, False]
    assert on_front(pairs, near=0.0) == [False, True, True, False, True, True]
    assert on_front([(0.5, 0.9), (0.6, 0.8), (0.7, 0.95)], higher_is_better=True) == [True, False, True]
    assert on_front([(0.5, 9.0), (0.5, 9.0)]) == [True, True]
    assert on_front([]) == []


def test_a_trade_off_has_shares_of_the_dense_cost() -> None:
    found = trade_off(
        [outcome(POINTS[0], 4.0), outcome(POINTS[1]), outcome(POINTS[2], None), Outcome(Point("owl", "params", 0.5), refused="no")],
        "params",
        chosen=POINTS[1],
    )  # fmt: skip
    assert (found.dense, found.quality, found.chosen) == (4.0, "perplexity", 0)
    assert [(t.name, t.share, t.quality, t.on_front) for t in found.trials] == [("obs", 0.5, 5.0, True)]
    with pytest.raises(SweepError, match="needs the dense model"):
        trade_off([outcome(POINTS[1])], "params")


def test_what_is_no_better_than_guessing_is_said_so() -> None:
    accuracy = Figure("accuracy", "pictures", True, guessing=0.1, luck=0.03)
    assert accuracy.warning(0.11) == "accuracy 0.11 is no better than guessing, which gets 0.1, give or take 0.03"
    assert not accuracy.warning(0.2) and not accuracy.warning(None)
    perplexity = Figure("perplexity", "text", guessing=512)
    assert perplexity.is_guessing(600.0) and not perplexity.is_guessing(500.0)
    assert not FIGURE.is_guessing(1e9)
