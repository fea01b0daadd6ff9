"""Taylor scoring holds one gradient at a time, leaves the model as it was and says what is wrong with its input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import DataError, ScoreError
from tests.importance.toys import Weights, axis, hand_graph, member, regression
from tests.zoo import ZOO

W = [[1.0, -2.0], [3.0, 1.0]]
ONE = torch.tensor(1.0)


def test_only_one_gradient_lives_at_a_time() -> None:
    """Our hooks are registered before the estimator's, so each sees the gradients while its own is still there."""
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    parameters = list(example.model.parameters())
    alive: list[int] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    importance.Taylor([example.kwargs, example.kwargs])(graph)
    assert alive == [1] * (2 * len(parameters))
    alive.clear()
    importance.Taylor([example.kwargs], accumulate="signed")(graph)
    assert max(alive) == len(parameters)


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def broken(output: Tensor, batch: Any) -> Tensor:
    raise ZeroDivisionError("in the loss")


class Interrupted(torch.autograd.Function):
    """The identity, but for Ctrl-C half-way through the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyboardInterrupt


class Interruptible(nn.Module):
    """A network whose backward pass is interrupted when `armed`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        return self.two(self.drop(Interrupted.apply(x) if self.armed else x))


def failing_scores() -> dict[str, tuple[type[BaseException] | None, list[Any], Any]]:
    x, loss = torch.randn(4, 5), lambda output, batch: output.square().mean() + 0 * torch.rand(())
    return {
        "nothing fails": (None, [x, x], loss),
        "the loss": (ZeroDivisionError, [x, x], broken),
        "Ctrl-C": (KeyboardInterrupt, [x, x], loss),
        "the second batch": (DataError, [x, torch.randn(4, 6)], loss),
        "no batches": (DataError, [], loss),
        "no loss": (ScoreError, [x], None),
    }


@pytest.mark.parametrize("case", failing_scores())
@pytest.mark.parametrize("accumulate", ["abs", "signed"])
def test_the_model_is_left_as_it_was(case: str, accumulate: str) -> None:
    error, batches, loss = failing_scores()[case]
    model = Interruptible()
    graph = depgraph.trace(model, torch.randn(4, 5))
    model.armed = case == "Ctrl-C"
    model.train()
    model.two.eval()
    model.one.weight.requires_grad_(False)
    mine = torch.randn_like(model.two.weight)
    model.two.weight.grad = mine
    weights = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    scorer = importance.Taylor(batches, loss, accumulate=accumulate)
    if error is None:
        assert scorer(graph)["one.weight:0"].min() > 0
    else:
        with pytest.raises(error):
            scorer(graph)
    assert model.two.weight.grad is mine
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["two.weight"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["one.weight"]
    assert (model.training, model.one.training, model.two.training) == (True, True, False)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0


def test_frozen_parameters_and_callers_without_gradients_make_no_difference() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    expected = importance.Taylor(batches, loss)(graph)
    model.requires_grad_(False)
    with torch.no_grad():
        found = importance.Taylor(batches, loss)(graph)
    np.testing.assert_array_equal(found["0.weight:0"], expected["0.weight:0"])
    assert not any(p.requires_grad for p in model.parameters())


def test_half_precision_is_summed_in_float32() -> None:
    model = Weights(w=[[0.0]])
    model.w = nn.Parameter(torch.full((3000, 1), 0.01, dtype=torch.bfloat16))
    graph = hand_graph(model, axis("columns", member("w", 1, [0])))
    found = importance.Taylor([torch.tensor(1.0, dtype=torch.bfloat16)], lambda output, _: output["w"].sum())(graph)
    np.testing.assert_allclose(found["columns"], [3000 * float(torch.tensor(0.01, dtype=torch.bfloat16))], rtol=1e-5)


def test_sparse_gradients_and_complex_weights_are_scored() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    graph = hand_graph(model, axis("hidden", member("0.weight", 1, [0, 1, 2, 3])))
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    sparse = importance.Taylor([torch.tensor([1, 5])], loss)(graph)["hidden"]
    model[0].sparse = False
    np.testing.assert_allclose(importance.Taylor([torch.tensor([1, 5])], loss)(graph)["hidden"], sparse, rtol=1e-5)
    turned = Weights(w=[1 + 1j, 2j])
    graph = hand_graph(turned, axis("a", member("w", 0, [0, 1])))
    found = importance.Taylor([ONE], lambda output, _: output["w"].abs().square().sum())(graph)["a"]
    np.testing.assert_allclose(found, [4, 8], rtol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        (iter(()), "a generator gives its batches only once"),
        (["text"], "a batch is a str"),
        ([{"nonsense": ONE}], "'nonsense', which the forward of Sequential doesn't take, and not 'input'"),
        ([torch.randn(4, 9)], "doesn't fit Sequential.*RuntimeError"),
    ],
)
def test_batches_that_cant_be_used_are_data_errors(batches: Any, message: str) -> None:
    model, _, _ = regression()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(DataError, match=message):
        importance.Taylor(batches)(graph)


@pytest.mark.parametrize("batches", [torch.randn(3, 5), {"input_ids": ONE}, "text.txt", 3])
def test_what_is_one_batch_or_none_is_refused_at_once(batches: Any) -> None:
    with pytest.raises(DataError, match="give an iterable of batches"):
        importance.Taylor(batches)


def constant(output: Tensor, batch: Any) -> Tensor:
    return output.detach().sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "pass loss=callable"),
        (constant, "doesn't depend on the model's parameters"),
        (lambda output, batch: output, r"scalar tensor, it is \[2, 3\]"),
        (lambda output, batch: 1.0, "scalar tensor, it is float"),
        (lambda output, batch: output.sum() * float("nan"), "loss of a batch is nan: all weights are finite"),
    ],
)
def test_losses_that_cant_be_used_are_score_errors(loss: Any, message: str) -> None:
    model, _, _ = regression()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(ScoreError, match=message):
        importance.Taylor([torch.randn(2, 5)], loss)(graph)


def test_weights_and_gradients_that_are_not_finite_are_named() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    with torch.no_grad():
        model[3].weight[1, 2] = float("nan")
    with pytest.raises(ScoreError, match=r"parameter '3.weight' holds NaN or infinite values"):
        importance.Taylor(batches, loss)(graph)
    weights = Weights(w=W)
    graph = hand_graph(weights, axis("out", member("w", 0, [0, 1])))
    with pytest.raises(ScoreError, match="parameter 'w' .* finite weights, but NaN or infinite scores"):
        importance.Taylor([ONE], lambda output, _: (output["w"] - 1).sqrt().nansum())(graph)


@pytest.mark.parametrize(
    ("ids", "message"), [(torch.randint(0, 101, (2, 1)), "no next token"), (torch.full((2, 7), 100), "5 classes")]
)
def test_tokens_that_cant_be_predicted_are_score_errors(ids: Tensor, message: str) -> None:
    logits = torch.zeros(*ids.shape, 5)
    with pytest.raises(ScoreError, match=message):
        importance.next_token(logits, ids)


def test_next_tokens_of_even_logits_cost_the_log_of_the_vocabulary() -> None:
    ids = torch.randint(0, 5, (2, 7))
    assert float(importance.next_token(torch.zeros(2, 7, 5, dtype=torch.bfloat16), ids)) == pytest.approx(np.log(5))


def test_unknown_choices_are_refused_at_once() -> None:
    with pytest.raises(ScoreError, match="did you mean 'element'"):
        importance.Taylor([], form="elements")
    with pytest.raises(ScoreError, match="did you mean 'signed'"):
        importance.Taylor([], accumulate="sign")
    with pytest.raises(ScoreError, match="did you mean 'gaussian'"):
        importance.Taylor([], normalise="gausian")


def test_progress_goes_to_stderr_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    shown = importance.Taylor(batches, loss, progress=True)(graph)
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(shown["0.weight:0"], importance.Taylor(batches, loss)(graph)["0.weight:0"])
    endless = importance.Taylor((batch for batch in batches), loss, progress=True)(graph)
    np.testing.assert_array_equal(endless["0.weight:0"], shown["0.weight:0"])
