"""Models whose parts are functions: hooks and lambdas that speak of the model, derivatives by torch.func, TorchScript."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import grad, vmap
from torch.nn import functional as F

import depgraph
import exporters
import importance
from depgraph.capture.validating import unvalidated
from depgraph.cutting.report import CutReport
from depgraph.errors import CaptureError


def cut(model: nn.Module, example: Tensor, share: float = 0.6) -> CutReport:
    graph = depgraph.trace(model.eval(), example)
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=share)).apply_with_report()
    assert report.check is not None and not report.check.vacuous
    assert report.form == "module" and type(report.model) is type(model)
    return report


class Hooked(nn.Module):
    """A hook that scales what a layer gives by a parameter of the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
        self.scale = nn.Parameter(torch.rand(24) + 0.5)
        self.body[1].register_forward_hook(lambda module, given, made: made * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Calls(nn.Module):
    """A layer that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OfLambdas(nn.Module):
    """Layers by functions: of the model's methods, of a function within, of a default."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 24)
        mixed = self._mixed
        self.gain = nn.Parameter(torch.rand(24) + 0.5)

        def scaled(x: Tensor, *, gain: Tensor = self.gain) -> Tensor:
            return x * gain

        self.body = nn.Sequential(
            nn.Linear(8, 24), Calls(lambda x: x + mixed(x)), Calls(lambda x, inner=scaled: inner(x)), nn.Linear(24, 4)
        )

    def _mixed(self, x: Tensor) -> Tensor:
        return F.relu(self.mix(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("kind", [Hooked, OfLambdas])
def test_functions_that_speak_of_the_model_speak_of_the_narrow_one(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = kind(), torch.randn(3, 8)
    before = model(example)
    small = cut(model, example).model
    for changed in (n for n, p in small.named_parameters() if n in ("scale", "mix.weight")):
        made = small(example)
        with torch.no_grad():
            small.get_parameter(changed).mul_(2)
        assert not torch.equal(small(example), made)  # it is the copy's own that is read
    assert torch.equal(model(example), before)
    small(example).sum().backward()
    assert all(p.grad is None for p in model.parameters())


class Force(nn.Module):
    """The derivative of an energy, for each of many points."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 24), nn.Softplus(), nn.Linear(24, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return -vmap(grad(lambda point: self.energy(point).squeeze(-1)))(x)


def test_derivatives_within_a_forward_are_cut_as_a_module() -> None:
    torch.manual_seed(0)
    example = torch.randn(5, 3)
    report = cut(Force(), example)
    assert report.model.energy[0].out_features < 24
    assert report.model(torch.randn(9, 3)).shape == (9, 3)


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * torch.sigmoid(x)


class WithScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 4)
        self.gate: Any = torch.jit.script(Gate(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x)))


def test_layers_of_torchscript_are_narrowed(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, example = WithScript(), torch.randn(3, 8)
    dense = copy.deepcopy(model)
    small = cut(model, example).model
    assert small.gate.inner.weight.shape[0] < 24 == model.gate.inner.weight.shape[0]
    depgraph.save(small, tmp_path / "small")
    assert torch.equal(depgraph.load(tmp_path / "small", model=dense)(example), small(example))
    narrow = depgraph.trace(model, example).plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_()
    assert torch.equal(narrow(example), small(example))


class Ensemble(nn.Module):
    """Several small networks at once, as one by vmap."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, 16, 6) * 0.3)
        self.last = nn.Parameter(torch.randn(members, 4, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        one = vmap(lambda first, last: F.linear(F.linear(x, first).relu(), last))
        return one(self.first, self.last).mean(0)


def test_a_failed_export_leaves_no_transform_at_work(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, example = Ensemble().eval(), torch.randn(2, 6)
    report = exporters.to_onnx(model, example, tmp_path / "m.onnx")  # torch can't run what it captured here by itself
    assert report.max_rel_error < 1e-4
    assert not torch._C._functorch.get_interpreter_stack()
    model(example).sum().backward()


class Coarse(nn.Module):
    """Groups of a convolution, of which one is a quarter of all, beside axes of many small steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.third, self.last = nn.Conv2d(64, 64, 4, groups=64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(x).relu()).relu()).flatten(1))


def test_what_a_coarse_axis_takes_too_much_comes_back_elsewhere() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Coarse().eval(), torch.randn(2, 3, 4, 4))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    assert 0.63 < plan.cost().params / graph.dense_cost.params <= 0.7


class Correlated(nn.Module):
    """Weighs lags by how a sequence agrees with itself that much later, which it finds by Fourier transforms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).transpose(1, 2) for p in (self.q, self.k, self.v))
        agree = torch.fft.irfft(torch.fft.rfft(q) * torch.conj(torch.fft.rfft(k)), n=x.shape[1])
        weights = agree.mean(1).softmax(-1)
        later = torch.stack([v.roll(-lag, -1) * weights[:, None, lag : lag + 1] for lag in range(3)]).sum(0)
        return self.out(later.transpose(1, 2))


def test_conjugates_stay_in_their_place() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Correlated().eval(), torch.randn(2, 9, 16))
    assert not graph.unknown
    inner = {
        name: a
        for name in ("q.weight", "v.weight")
        for a in graph.axes
        if any(m.target == name and m.dim == 0 for m in a.members)
    }
    assert len(inner["q.weight"].reasons) == len(inner["v.weight"].reasons) == 0
    assert any(m.target == "k.weight" for m in inner["q.weight"].members)


Found = Callable[[Tensor, Tensor], Tensor]
DISTRIBUTIONS: dict[str, Found] = {
    "density": lambda mean, spread: torch.distributions.Normal(mean, spread.exp()).log_prob(spread),
    "divergence": lambda mean, spread: torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, spread.exp()), torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    ),
    "choice": lambda mean, spread: torch.distributions.Categorical(logits=mean).log_prob(spread.argmax(-1)),
}


class Distributed(nn.Module):
    """Its output is told by a distribution of torch, which checks what it is given, and by one that is made before."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.found, self.prior = found, torch.distributions.Normal(torch.zeros(4), torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        return self.found(self.mean(x), self.spread(x)), self.prior.log_prob(self.mean(x))


@pytest.fixture
def checking() -> Iterator[None]:
    """Distributions check what they are given, as they do until something is compiled in a process."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("checking")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_what_distributions_check_is_no_decision_of_the_model(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, example = Distributed(DISTRIBUTIONS[name]).eval(), torch.randn(4, 8)
    graph = depgraph.trace(model, example)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6))
    assert not graph.note and plan.apply_with_report(form="graph").check.error < 1e-4
    exporters.to_onnx(plan.apply(), (example,), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="to satisfy the constraint|to be within the support"):
        model(example * float("nan"))


class CopiesDeeply(nn.Module):
    """Keeps what it was given, and what it made, apart from what it goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kept = copy.deepcopy({"given": x})
        hidden = copy.deepcopy(torch.relu(self.body(x)))
        return self.head(hidden), kept


def test_deep_copies_in_a_forward_are_captured(tmp_path: Any) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 8)
    with torch.no_grad():
        report = cut(CopiesDeeply(), example)
        exporters.to_onnx(report.model, (example,), tmp_path / "m.onnx")
    assert report.model.body.out_features < 32


class Counted(tuple[int, ...]):
    """A tuple whose length is nobody's business, as those of irreducible representations."""

    def __len__(self) -> int:
        raise NotImplementedError


class HoldsCounted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.body, self.head = Counted((2, 3)), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x))) * sum(self.parts)


def test_tuples_that_tell_no_length_are_held() -> None:
    torch.manual_seed(0)
    assert cut(HoldsCounted(), torch.randn(4, 8)).model.parts == (2, 3)


class Sparse(nn.Module):
    """Neighbours are gathered by a sparse matrix that the forward makes, of numbers that it branches on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges if (edges >= 0).all() else edges.abs()
        matrix = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (len(x), len(x)))
        return self.head(torch.sparse.mm(matrix.to_sparse_csr(), torch.relu(self.body(x))))


def test_a_sparse_matrix_that_a_forward_makes_is_what_is_named() -> None:
    with pytest.raises(CaptureError, match=r"test_unseen_functions.py:\d+ the forward makes a sparse tensor"):
        depgraph.trace(Sparse(), (torch.randn(5, 8), torch.randint(5, (2, 7))))


@pytest.mark.usefixtures("checking")
def test_checks_of_distributions_come_back_whatever_ends_first() -> None:
    first, second = unvalidated(), unvalidated()
    for each in (first, second):
        each.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="Expected parameter"):
        second.__exit__(None, None, None)
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))
