"""Estimators by name."""

from __future__ import annotations

import pytest

import importance
from depgraph.errors import ScoreError


def test_every_name_makes_an_estimator() -> None:
    for name in importance.names():
        made = importance.named(name, batches=[1], loss=None, seed=7, progress=False)
        assert callable(made)
    assert importance.named("random", seed=7) == importance.Random(7)
    assert importance.named("magnitude-l1") == importance.Magnitude(1)
    assert importance.named("magnitude-l1", p=3) == importance.Magnitude(3)
    assert importance.named("taylor", batches=[1], reduction="mean") == importance.Taylor([1], reduction="mean")
    assert importance.named("taylor-vector", batches=[1]) == importance.Taylor([1], form="vector")


def test_names_say_whether_they_need_data() -> None:
    assert [importance.needs_data(n) for n in ("random", "magnitude", "mag-sp", "taylor", "taylor-vector")] == [
        False
    ] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tailor", "'taylor'"), ("Taylor", "'taylor'"), ("magnitud", "'magnitude'"), ("rndom", "'random'")]
    + [("taylor_vector", "'taylor-vector'")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    for ask in (importance.named, importance.needs_data):
        with pytest.raises(ScoreError, match=f"unknown score '{name}': did you mean {nearest}"):
            ask(name)


def test_a_name_near_to_none_is_refused_with_all() -> None:
    with pytest.raises(ScoreError, match="[Cc]hoose one of random, magnitude, .*taylor, taylor-vector.*"):
        importance.named("xyz")


def test_options_are_checked() -> None:
    with pytest.raises(ScoreError, match="score 'magnitude' has no option 'power': it takes normalise, p, reduction"):
        importance.named("magnitude", power=2)
    for given in ({}, {"batches": None}):
        with pytest.raises(ScoreError, match="score 'taylor' needs calibration data"):
            importance.named("taylor", **given)


@pytest.mark.parametrize(("option", "value"), [("rounds", 2.5), ("rounds", 0), ("damping", "little"), ("damping", -1)])
@pytest.mark.parametrize("name", ["obs", "fisher-obs"])
def test_options_of_greedy_scores_that_are_no_such_numbers_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(ScoreError, match=r"damping must be a number of at least 0 and rounds a whole one"):
        importance.named(name, batches=[1], **{option: value})


def test_a_power_that_is_no_number_is_refused() -> None:
    with pytest.raises(ScoreError, match="finite number above 0, it is '2'"):
        importance.named("magnitude", p="2")


def test_missing_data_are_asked_for_as_the_command_takes_them_too() -> None:
    for ask in (importance.named, importance.recipes.named):
        with pytest.raises(ScoreError, match="needs calibration data: .*--data"):
            ask("flap")
