"""The least squares fit to a wider matrix's outputs, and the damping that is chosen for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from depgraph.errors import DataError
from importance.ridge import DAMPINGS, Fit, Parted, Sums


def noisy(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Fit]:
    """Wide inputs x, narrow ones z that say half of what x does and half something else, and a fit of 4 outputs, held near zero."""
    made = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(rows, 20, generator=made, dtype=torch.float64) for _ in range(2))
    wanted = torch.randn(4, 20, generator=made, dtype=torch.float64)
    return x, (x + 3 * other)[:, :16] + 1, Fit(wanted, torch.zeros(4, 16, dtype=torch.float64), centred=True)


@pytest.mark.parametrize("centred", [True, False])
def test_without_damping_it_is_least_squares(centred: bool) -> None:
    x, z, fit = noisy(200)
    fit = Fit(fit.wanted, fit.now, centred)
    inputs = torch.cat([z, torch.ones(200, 1)], dim=1) if centred else z
    best = torch.linalg.lstsq(inputs, x @ fit.wanted.T + (torch.ones(4) if centred else 0)).solution[:16].T
    assert torch.allclose(fit.solved(Sums.of(x, z), 0.0), best)


def test_the_more_damping_the_nearer_to_what_it_was() -> None:
    x, z, fit = noisy(200)
    now = torch.ones(4, 16, dtype=torch.float64)
    held = Fit(fit.wanted, now, centred=True)
    sums = Sums.of(x, z)
    far = [float((held.solved(sums, damping) - now).norm()) for damping in (0.0, 0.1, 10.0, 1e6)]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-4


def test_the_error_on_other_rows_is_the_one_measured_there() -> None:
    x, z, fit = noisy(120)
    parted = Parted.of([(x, z)], parted=True)
    assert parted.back is not None and (parted.fit.rows, parted.back.rows) == (90, 30)

    def left(matrix: Tensor) -> Tensor:
        wide, narrow = x[:90].mean(0), z[:90].mean(0)
        return ((x[90:] - wide) @ fit.wanted.T - (z[90:] - narrow) @ matrix.T).square().sum(1).mean()

    matrix = fit.solved(parted.fit, 0.1)
    error = fit.error(matrix, parted.fit, parted.back)
    assert error == pytest.approx(float(left(matrix) - left(torch.zeros_like(matrix))))


def test_few_rows_for_many_columns_take_more_damping_than_many() -> None:
    few, many = (noisy(rows) for rows in (24, 5000))
    chosen = [fit.damping(Parted.of([(x, z)], parted=True), DAMPINGS) for x, z, fit in (few, many)]
    assert chosen[0] > chosen[1] and chosen[1] <= 0.1


def test_it_fits_other_rows_better_than_little_damping() -> None:
    x, z, fit = noisy(24)
    parted, other = Parted.of([(x, z)], parted=True), Sums.of(*noisy(5000, seed=1)[:2])
    errors = [
        fit.error(fit.solved(parted.all, one), parted.all, other)
        for one in (DAMPINGS[0], fit.damping(parted, DAMPINGS))
    ]
    assert errors[1] < errors[0]


def test_batches_make_no_difference_and_nothing_is_kept_back_from_too_few_rows() -> None:
    x, z, fit = noisy(40)
    apart = Parted.of([(x[:20], z[:20]), (x[20:], z[20:])], parted=True)
    assert torch.allclose(fit.solved(apart.all, 0.1), fit.solved(Sums.of(x, z), 0.1))
    alone = Parted.of([(x[:3], z[:3])], parted=True)
    assert alone.back is None and fit.damping(alone, (0.3, 0.1)) == 0.3
    with pytest.raises(DataError, match="no batches to fit with"):
        Parted.of([], parted=True)
