"""Small models around one operator each: both forms of the cut compute what the zeroed original computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import importance
from tests.test_end_to_end import random_scores

Body = Callable[[Tensor], Tensor]
PLACES = torch.tensor([0, 2, 3, 1])


class Around(nn.Module):
    """``first``, the operator, ``last``."""

    def __init__(self, body: Body, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.body = first, last, body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def written_rows(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, PLACES] = y[:, :4]
    return z


def masked_rows(y: Tensor) -> Tensor:
    z = y.clone()
    z[y.sum(-1) > 0] = y[0, 0]
    return z


def scattered(y: Tensor) -> Tensor:
    mask = (y.sum(-1) > 0).unsqueeze(-1).expand_as(y)
    return y.masked_scatter(mask, y.flip(1))


def self_form(y: Tensor) -> Tensor:
    """An axis that is contracted twice in one operator."""
    return torch.einsum("bni,nij,bmj->bnm", y, y.transpose(0, 1).transpose(1, 2) @ y.transpose(0, 1), y)


ROWS: dict[str, tuple[Body, int]] = {
    "index_put": (written_rows, 8),
    "index_put of a mask": (masked_rows, 8),
    "masked_scatter": (scattered, 8),
    "solve": (lambda y: torch.linalg.solve(torch.eye(5) * 2 + torch.ones(5, 5), y), 8),
    "pdist": (lambda y: F.pdist(y[0]), 10),
    "cdist": (lambda y: torch.cdist(y, y.flip(1)), 5),
    "cosine_similarity": (lambda y: F.cosine_similarity(y[:, :, None], y[:, None], dim=-1), 5),
    "vecdot over features": (lambda y: torch.linalg.vecdot(y.mT, y.flip(1).mT, dim=1), 5),
    "twice in one product": (self_form, 5),
    "hsplit": (lambda y: y.hsplit(5)[1] + y, 8),
}
PICTURES: dict[str, Body] = {
    "affine_grid": lambda y: F.grid_sample(
        y, F.affine_grid(torch.tensor([[[1.0, 0.2, 0.1], [0, 1.0, 0]]] * 2), y.shape, align_corners=False)
    ),
    "rfft": lambda y: torch.fft.irfft2(torch.fft.rfft2(y, norm="ortho") * 0.5, s=y.shape[-2:], norm="ortho"),
}


def check(model: nn.Module, inputs: Tensor) -> None:
    graph = depgraph.trace(model.eval(), inputs, strict=True)
    assert graph.axes[0].prunable.all()
    for form in ("module", "graph"):
        plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), form=form)
        report = plan.apply_with_report(form=form)
        assert report.check is not None
        assert report.check.error <= 1e-5
        assert report.check.sensitivity > 1e-3 or not report.check.exact_axes


@pytest.mark.parametrize("name", ROWS)
def test_features_beside_what_an_operator_works_on_may_go(name: str) -> None:
    body, width = ROWS[name]
    check(Around(body, nn.Linear(6, 8), nn.Linear(width, 3)), torch.randn(2, 5, 6))


@pytest.mark.parametrize("name", PICTURES)
def test_channels_may_go_where_space_is_moved(name: str) -> None:
    check(Around(PICTURES[name], nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 8, 8))


class AddedRows(nn.Module):
    """A product to which a matrix is added, with a row for each of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 3)
        self.rows, self.down = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.addmm(self.rows, self.first(x), self.down).relu())


def test_what_is_added_to_a_product_may_have_rows() -> None:
    check(AddedRows(), torch.randn(3, 6))


class Forgetful(nn.Module):
    """Attention over as many tokens as its heads are wide when cut; it drops weights whether the model is trained or not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).transpose(1, 2).flatten(2))


def test_attention_that_drops_weights_in_eval_mode_drops_the_same_in_the_reference() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Forgetful().eval(), torch.randn(2, 3, 16))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), scope="axis", only=["*/within"])
    assert len(plan.removal) == 2
    report = plan.apply_with_report()
    assert report.check.error < 1e-5 < report.check.sensitivity


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_width_of_a_bag_of_embeddings_may_go(mode: str) -> None:
    check(nn.Sequential(nn.EmbeddingBag(10, 8, mode=mode), nn.Linear(8, 3)), torch.randint(0, 10, (4, 5)))


def test_a_number_that_only_an_assertion_reads_binds_nothing() -> None:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._assert_async((torch.ones(()) * y.shape[-1] == y.shape[-1]).all())
            return self.last(y)

    check(Asserting(), torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_learns_to_be_quantised_is_cut() -> None:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver

    of_rows = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )  # fmt: skip

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
            self.rows, self.whole = of_rows(), FusedMovingAvgObsFakeQuantize()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.whole(F.linear(x, self.rows(self.first.weight), self.first.bias).relu())
            return self.second(hidden)

    torch.manual_seed(0)
    model, x = Learned(), torch.randn(8, 6)
    model(x)
    graph = depgraph.trace(model.eval(), (x,))
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report()
    assert report.model.first.out_features < 16 and not graph.unknown
    assert report.model.rows.scale.shape == (report.model.first.out_features,)
