"""Scores of members become scores of groups, and scores of axes become comparable."""

from __future__ import annotations

import numpy as np
import pytest

from depgraph.errors import ScoreError
from importance import Normalisation, Reduction
from importance.normalisation import PARTS

EACH = np.array([0, 1, 2])
TWO = [(EACH, np.array([1.0, 2.0, 3.0])), (EACH, np.array([4.0, 0.5, 3.0]))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", [5, 2.5, 6]),
        ("mean", [2.5, 1.25, 3]),
        ("max", [4, 2, 3]),
        ("prod", [4, 1, 9]),
        ("geomean", [2, 1, 3]),
        ("first", [1, 2, 3]),
        ("last", [4, 0.5, 3]),
    ],
)
def test_reductions_over_members(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(Reduction.of(name)(TWO, 3), expected)


def test_indices_of_a_grouped_query_unit_are_summed() -> None:
    """METHODS.md 2.1: four query heads on two KV heads, contiguous, give [3, 30] and not the folded [11, 22]."""
    queries = (np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 10.0, 20.0]))
    np.testing.assert_array_equal(Reduction()([queries], 2), [3, 30])
    np.testing.assert_array_equal(Reduction(within="mean")([queries], 2), [1.5, 15])
    np.testing.assert_array_equal(Reduction(within="max")([queries], 2), [2, 20])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sum", [1, 7, 6, 0]), ("mean", [1, 3.5, 6, 0]), ("max", [1, 5, 6, 0]), ("prod", [1, 10, 6, 0])]
    + [("geomean", [1, 10**0.5, 6, 0]), ("first", [1, 2, 6, 0]), ("last", [1, 5, 6, 0])],
)
def test_a_member_without_an_index_in_a_group_has_no_say_in_it(name: str, expected: list[float]) -> None:
    parts = [(np.array([0, 1, -1]), np.array([1.0, 2.0, 99.0])), (np.array([-1, 1, 2]), np.array([99.0, 5.0, 6.0]))]
    np.testing.assert_allclose(Reduction.of(name)(parts, 4), expected)


def test_members_can_be_normalised_before_they_are_joined() -> None:
    joined = Reduction("sum", each="max")(TWO, 3)
    np.testing.assert_allclose(joined, [1 / 3 + 1, 2 / 3 + 0.125, 1 + 0.75])


def test_a_function_may_stand_for_a_reduction() -> None:
    least = Reduction.of(lambda table, present: np.where(present, table, np.inf).min(axis=0))
    np.testing.assert_array_equal(least(TWO, 3), [1, 0.5, 3])


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_product_out_of_range_is_an_error_and_the_geometric_mean_isnt(factor: float) -> None:
    many = [(EACH, factor * np.array([1.0, 2.0, 3.0]))] * 200
    with pytest.raises(ScoreError, match="geomean"):
        Reduction("prod")(many, 3)
    np.testing.assert_allclose(Reduction("geomean")(many, 3), factor * np.array([1, 2, 3]))


def test_a_product_with_a_true_zero_is_zero() -> None:
    np.testing.assert_array_equal(Reduction("prod")([(EACH, np.array([0.0, 1.0, 2.0]))], 3), [0, 1, 2])


def test_an_axis_without_scored_members_is_worth_nothing() -> None:
    np.testing.assert_array_equal(Reduction("mean")([], 2), [0, 0])


SCORES = np.array([1.0, 2.0, 6.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1, 2, 6]),
        ("mean", [1 / 3, 2 / 3, 2]),
        ("sum", [1 / 9, 2 / 9, 6 / 9]),
        ("max", [1 / 6, 1 / 3, 1]),
        ("gaussian", [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]),
        ("min-max", [0, 0.2, 1]),
        ("lamp", [1 / 9, 2 / 8, 1]),
    ],
)
def test_normalisations(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(Normalisation.of(name)(SCORES), expected)


def test_lamp_gives_the_largest_one_and_never_empties_an_axis() -> None:
    """METHODS.md 2.4: [9, 1, 4] -> [1, .071429, .307692]; of equal ones, all get what the last of them would."""
    lamp = Normalisation.of("lamp")
    np.testing.assert_allclose(lamp(np.array([9.0, 1.0, 4.0])), [1, 1 / 14, 4 / 13])
    np.testing.assert_allclose(lamp(np.array([0.0, 2.0, 1.0, 2.0])), [0, 1, 1 / 5, 1])
    with pytest.raises(ScoreError, match="LAMP needs scores of at least zero"):
        lamp(np.array([1.0, -1.0]))


def test_normalisations_are_applied_one_after_the_other() -> None:
    both = Normalisation.of(("max", np.sqrt, "sum"))(np.array([1.0, 4.0, 16.0]))
    np.testing.assert_allclose(both, [1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(Normalisation.of(["max", "min-max"])(SCORES), [0, 0.2, 1])


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("scores", [[0.0, 0.0], [3.0], [0.1 + 0.2, 0.3], []])
def test_scores_that_are_all_equal_stay_finite_and_equal(name: str, scores: list[float]) -> None:
    found = Normalisation.of(name)(np.array(scores))
    assert found.shape == (len(scores),)
    assert np.isfinite(found).all()
    assert np.ptp(found) < 1e-9 if len(scores) else True


@pytest.mark.parametrize("name", ["gaussian", "min-max"])
def test_equal_scores_normalise_to_zero(name: str) -> None:
    np.testing.assert_array_equal(Normalisation.of(name)(np.array([0.1 + 0.2, 0.3])), [0, 0])


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ScoreError, match="unknown reduction 'men': did you mean 'mean'"):
        Reduction.of("men")
    with pytest.raises(ScoreError, match="unknown normalisation 'minmax': did you mean 'min-max'"):
        Normalisation.of("minmax")
    with pytest.raises(ScoreError, match="unknown reduction within a member 'summ'"):
        Reduction(within="summ")


def test_a_function_that_gives_another_number_of_scores_is_refused() -> None:
    with pytest.raises(ScoreError, match=r"gave shape \(2,\) for 3 groups: one number for each"):
        Reduction.of(lambda table, present: table.sum(axis=0)[:2])(TWO, 3)
