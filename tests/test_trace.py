"""Tracing: what is found, what is refused, and that the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depgraph
import importance
from depgraph.errors import CaptureError, PlanError, ScoreError, UnsupportedOperator, UnsupportedParameter
from depgraph.rules import registry
from tests.zoo import ZOO


@torch.library.custom_op("depgraph_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return x + by


@shifted.register_fake
def _(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Shifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.by = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(shifted(self.up(x), self.by))


def test_an_operator_without_a_rule_is_fixed_and_reported_or_an_error_and_can_be_given_a_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    model, inputs = Shifting(), torch.randn(2, 4)
    graph = depgraph.trace(model, inputs)
    assert list(graph.unknown) == ["depgraph_tests.shifted.default"]
    assert not any(axis.prunable.any() for axis in graph.axes)
    with pytest.raises(UnsupportedOperator, match=r"depgraph_tests\.shifted.* at tests/test_trace\.py:\d+ has no rule"):
        depgraph.trace(model, inputs, strict=True)
    depgraph.rule("depgraph_tests.shifted", equation="... c, c -> ... c")
    (axis,) = depgraph.trace(model, inputs, strict=True).axes
    assert axis.size == 8 and axis.prunable.all()


def test_inputs_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(CaptureError, match="Linear doesn't run on these example inputs"):
        depgraph.trace(nn.Linear(4, 3), torch.randn(2, 5))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("layer", [nn.Linear(4, 5), nn.Conv1d(4, 5, 1), nn.LayerNorm(4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_inputs_of_another_dtype_are_refused_where_the_model_does_not_run_on_them(
    layer: nn.Module, dtype: torch.dtype
) -> None:
    x = torch.ones(2, 4, 4, dtype=dtype)
    try:
        layer(x)
    except RuntimeError:
        with pytest.raises(CaptureError, match=r"doesn't run on these example inputs \(\w+ \[2, 4, 4\]\)"):
            depgraph.trace(layer, x)
    else:
        depgraph.trace(layer, x)


@pytest.mark.parametrize("option", ["free", "fixed"])
def test_names_and_keyword_inputs_that_are_none_are_said(option: str) -> None:
    model, x = nn.Linear(4, 5), torch.randn(2, 4)
    with pytest.raises(PlanError, match=f"{option}='output 0' is a single name"):
        depgraph.trace(model, x, **{option: "output 0"})  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="keyword example inputs are a list"):
        depgraph.trace(model, (), [x])  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="the loss is a str, which can't be called: pass loss="):
        graph = depgraph.trace(nn.Sequential(model, nn.Linear(5, 2)), x)
        graph.plan(importance.Taylor([x], loss="mse"), depgraph.Target(params=0.8))  # type: ignore[arg-type]


def test_a_lazy_module_is_to_be_run_first() -> None:
    model, x = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3)), torch.randn(2, 4)
    with pytest.raises(UnsupportedParameter, match=r"'0\.weight' has no shape yet.*run the model once"):
        depgraph.trace(model, x)
    model(x)
    assert [axis.size for axis in depgraph.trace(model, x).axes] == [6]


def test_data_dependent_control_flow_is_named_with_its_place() -> None:
    with pytest.raises(CaptureError, match=r"depends on the values of a tensor at tests/test_trace\.py:\d+"):
        depgraph.trace(Branching(), torch.randn(2, 5), strict=True)


class Choosing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[x[:, 0] > 0]


def test_sizes_that_depend_on_values_are_named_with_their_place() -> None:
    with pytest.raises(
        CaptureError, match=r"depends on the values of a tensor at tests/test_trace\.py:\d+ .*torch\.where"
    ):
        depgraph.trace(Choosing(4, 3), torch.randn(6, 4), strict=True)


def test_sparse_and_packed_parameters_are_refused_by_name() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.eye(3, 4).to_sparse(), requires_grad=False)
    with pytest.raises(UnsupportedParameter, match="'weight' is sparse"):
        depgraph.trace(model, torch.randn(2, 4))
    model.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedParameter, match="'weight' is quantised"):
        depgraph.trace(model, torch.randn(2, 4))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_quantised_modules_and_buffers_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedParameter, match="module '0' is quantised and can't be sliced: prune the model in dense"
    ):
        depgraph.trace(quantised(), torch.randn(2, 4))
    model = Shifting()
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(UnsupportedParameter, match="buffer 'table' is quantised"):
        depgraph.trace(model, torch.randn(2, 4))


class Sparsely(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 8)
        self.register_buffer("adjacency", torch.eye(2).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.adjacency, super().forward(x))


def test_a_sparse_buffer_is_no_parameter() -> None:
    graph = depgraph.trace(Sparsely(), torch.randn(2, 4))
    assert not graph.unknown
    assert {member.target for axis in graph.axes for member in axis.members} <= {"weight", "bias"}


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"trace takes a torch\.nn\.Module, not a function"):
        depgraph.trace(lambda x: x, torch.randn(2, 4))  # type: ignore[arg-type]


def test_the_model_is_left_as_it_was() -> None:
    example = ZOO["llama_8_4"]()
    model = example.model
    model.config.use_cache = True
    model.train()
    model.model.layers[0].eval()
    held = {n: dict(vars(m)) for n, m in model.named_modules()}
    depgraph.trace(model, example.args, example.kwargs)
    assert model.config.use_cache is True
    assert model.training and not model.model.layers[0].training
    for name, module in model.named_modules():
        for key, value in held[name].items():
            assert type(vars(module)[key]) is type(value), (name, key)


def test_a_large_model_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 8, dtype=torch.long)
    graph = depgraph.trace(model, kwargs={"input_ids": ids})
    sizes = sorted({(axis.size, len(axis.members)) for axis in graph.axes}, reverse=True)
    assert sizes[0] == (14336, 3)
    assert {4096, 14336, 128, 64, 8, 4} == {axis.size for axis in graph.axes}


def test_llama_has_just_the_axes_of_the_design() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    described = {
        (axis.size, axis.exact, tuple(m.target.split(".")[-2] for m in axis.members if ".0." in m.target))
        for axis in graph.axes
    }
    layer = {d for d in described if d[2]}
    assert (2, True, ("q_proj", "k_proj", "v_proj", "o_proj")) in layer
    assert (4, True, ("q_proj", "o_proj")) in layer
    assert (6, True, ("q_proj", "k_proj")) in layer
    assert (12, True, ("v_proj", "o_proj")) in layer
    assert any(set(d[2]) >= {"gate_proj", "up_proj", "down_proj"} and d[1] for d in layer)


def test_an_output_can_be_lifted() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(2, 4)
    assert len(depgraph.trace(model, inputs).axes) == 1
    lifted = depgraph.trace(model, inputs, free=["output 0"])
    assert [axis.size for axis in lifted.axes] == [6, 5]


class ByProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.never = nn.Linear(4, 6), nn.Linear(6, 5), nn.Parameter(torch.rand(7))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.up(x)
        return {"logits": self.down(hidden), "hidden": hidden}


def test_by_products_do_not_fix_and_unread_parameters_make_no_axis() -> None:
    graph = depgraph.trace(ByProduct(), torch.randn(2, 4))
    assert [(axis.size, bool(axis.prunable.all())) for axis in graph.axes] == [(6, True)]
    report = graph.cut_plan({graph.axes[0].name: [0, 1]}).apply_with_report()
    assert report.model(torch.randn(2, 4))["hidden"].shape == (2, 4)
    assert report.notes == (
        "output 1 now has shape (2, 4), it had (2, 6) (keep it with trace(..., fixed=['output 1']))",
        "left as they were, since the traced forward doesn't read them: never; code that reads them with what was cut (in "
        "training, say) fails until they are cut by hand",
    )


class Encoder(nn.Module):
    """Gives its states, and a pooled one that weights compute from them, as bare encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.second(torch.relu(self.first(x)))
        return states, self.pool(states[:, 0])


def test_the_first_output_stays_whatever_is_computed_from_it() -> None:
    graph = depgraph.trace(Encoder(), torch.randn(2, 3, 4))
    assert [axis.size for axis in graph.axes if axis.prunable.any()] == [12]
    free = depgraph.trace(Encoder(), torch.randn(2, 3, 4), free=["output 0"])
    assert [axis.size for axis in free.axes if axis.prunable.any()] == [12, 6]


class Policy(nn.Module):
    """Gives its logits, and what is computed from them without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.relu(self.body(x)))
        shares = logits.softmax(-1)
        return {"logits": logits, "entropy": -(shares * shares.log()).sum(-1), "best": shares.amax(-1)}


def test_outputs_beside_what_is_computed_from_them_without_a_weight_stay() -> None:
    graph = depgraph.trace(Policy(), torch.randn(2, 4))
    assert [axis.size for axis in graph.axes] == [16]
    assert graph.capture.program.by_products == set()


def test_buffers_that_the_example_does_not_reach_are_noted_where_their_module_was_cut() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 5), nn.BatchNorm1d(6)
            self.register_buffer("codes", torch.rand(9, 6))
            self.register_buffer("average", torch.rand(9, 6))
            self.register_buffer("counts", torch.zeros(9))

        def forward(self, x: torch.Tensor, update: bool = False) -> torch.Tensor:
            if update:
                self.average.mul_(0.9)
                self.counts.add_(1)
            hidden = self.norm(self.first(x))
            return self.second(hidden + self.codes[(hidden @ self.codes.mT).argmax(-1)])

    graph = depgraph.trace(Averaged().eval(), torch.randn(2, 4))
    (note,) = graph.cut_plan({"first.weight:0": [1]}).apply_with_report().notes
    assert "doesn't read them: average; code that reads them with what was cut" in note


def test_a_tied_parameter_is_read_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    graph = depgraph.trace(model, torch.randn(2, 5), free=["output 0"])
    assert graph.cut_plan({"3.weight:0": [1]}).apply_with_report().notes == (
        "output 0 now has shape (2, 2), it had (2, 3)",
    )


def test_a_by_product_can_be_kept_by_name() -> None:
    graph = depgraph.trace(ByProduct(), torch.randn(2, 4), fixed=["output 1"])
    assert not any(axis.prunable.any() for axis in graph.axes)
    assert "output 1" in graph.show()
    with pytest.raises(PlanError, match=r"the model has no output 7; it has output 0, output 1"):
        depgraph.trace(ByProduct(), torch.randn(2, 4), fixed=["output 7"])
    with pytest.raises(PlanError, match="no output 0 logits"):
        depgraph.trace(ByProduct(), torch.randn(2, 4), free=["output 0 logits"])


def test_networkx_and_dot() -> None:
    graph = depgraph.trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), torch.randn(2, 4))
    network = graph.to_networkx()
    assert set(network["0.weight:0"]) == {"0.weight[0]", "0.bias[0]", "1.weight[1]"}
    assert '"0.weight:0" -- "1.weight[1]"' in graph.to_dot()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedParameter, match=r"'1.weight' is quantised \(torch.float8"):
        depgraph.trace(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_tensors_are_refused_by_name() -> None:
    model = nn.Linear(4, 3)
    packed = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)
    model.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UnsupportedParameter, match="'weight' is quantised"):
        depgraph.trace(model, torch.randn(2, 4))


class Tied(nn.Module):
    """The decoder is the encoder's matrix, under a second name and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.output = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.inner(self.embed(ids))))


def test_tied_parameters_are_one() -> None:
    model, ids = Tied(), torch.randint(0, 11, (2, 5))
    graph = depgraph.trace(model, ids)
    assert graph.dense_cost.params == sum(p.numel() for p in model.parameters()) == 11 * 6 + 6 * 6 + 6
    (axis,) = [a for a in graph.axes if a.prunable.any()]
    reached = {(m.target, m.dim) for m in axis.members}
    assert reached >= {("embed.weight", 1), ("output.weight", 1), ("inner.weight", 0), ("inner.weight", 1)}
    pruned = graph.cut_plan({axis.name: [0, 4]}).apply()
    assert pruned.output.weight is pruned.embed.weight
    assert pruned.embed.weight.shape == (11, 4)
    assert graph.cut_plan({axis.name: [0, 4]}).cost().params == sum(p.numel() for p in pruned.parameters())


def test_a_vocabulary_is_fixed_and_says_so() -> None:
    graph = depgraph.trace(Tied(), torch.randint(0, 11, (2, 5)))
    assert not any(axis.size == 11 and axis.prunable.any() for axis in graph.axes)
    assert "embed.weight" in graph.show()


class Changing(nn.Module):
    """A batch norm (with statistics that training would move) and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_tracing_a_model_in_training_moves_no_statistics_and_no_random_state() -> None:
    model = Changing().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.random.get_rng_state()
    graph = depgraph.trace(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    graph.cut_plan({graph.axes[0].name: [1]}).apply()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_refused_trace_leaves_the_model_as_it_was() -> None:
    example = ZOO["gpt2"]()
    model = example.model.train()
    model.config.use_cache = True
    held = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(CaptureError):
        depgraph.trace(model, (torch.randn(3, 3),))
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True
    for name, module in model.named_modules():
        assert {k: type(v) for k, v in vars(module).items()} == {k: type(v) for k, v in held[name].items()}


def test_every_index_that_cannot_go_says_why() -> None:
    example = ZOO["bloom"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    fixed = [axis for axis in graph.axes if axis.reasons]
    assert fixed
    for axis in fixed:
        assert all(str(reason) for reason in axis.reasons.values())
        assert set(axis.reasons) == set((~axis.prunable).nonzero()[0].tolist())
        assert axis.group(next(iter(axis.reasons))).fixed is not None


def test_groups_partition_what_an_axis_reaches() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    for axis in graph.axes:
        assert graph[axis.name] is axis
        for member in axis.members:
            indices = [i for group in axis.groups for t, d, ix in group.members if (t, d) == (member.target, member.dim)
                       for i in ix.tolist()]  # fmt: skip
            assert len(indices) == len(set(indices))
            assert sorted(indices) == (member.labels >= 0).nonzero()[0].tolist()
    with pytest.raises(IndexError, match="there is no group"):
        graph.axes[0].group(graph.axes[0].size)
    with pytest.raises(KeyError):
        graph["nothing"]


class Looking(nn.Module):
    """Looks at the shape of what it picks, or at the numbers."""

    def __init__(self, look: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.look = [look]
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(torch.relu(h) + self.look[0](h))


@pytest.mark.parametrize(
    ("look", "free"),
    [
        (lambda h: h[..., -1].shape[0], 8),
        (lambda h: h[..., 5].shape[0], 8),
        (lambda h: torch.zeros_like(h.cumsum(-1)), 8),
        (lambda h: h.sort(-1)[0].shape[0], 8),
        (lambda h: h[..., -1:], 0),
        (lambda h: h[..., 5].unsqueeze(-1), 0),
    ],
)
def test_what_is_read_for_its_shape_alone_fixes_nothing(look: Any, free: int) -> None:
    x = torch.randn(2, 4)
    graph = depgraph.trace(Looking(look).eval(), x)
    found = [int(axis.prunable.sum()) for axis in graph.axes if axis.size == 8]
    assert sum(found) == free
    if free:
        axis = next(axis for axis in graph.axes if axis.size == 8)
        groups = [0, 3]
        report = graph.cut_plan({axis.name: groups}).apply_with_report(form="module")
        assert report.check is not None and report.check.error < 1e-6 and not report.check.vacuous


class ShapedBy(nn.Module):
    """A convolution of which the code reads the shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.extra, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.up(x)
        height = self.extra(made).shape[-2]
        return self.head(made.mean((2, 3))) + torch.arange(height).sum()


def test_the_kernel_of_what_is_read_for_its_shape_stays() -> None:
    graph = depgraph.trace(ShapedBy().eval(), torch.randn(1, 3, 6, 6))
    assert not [axis.name for axis in graph.axes if axis.size == 3 and axis.prunable.any()]
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report(form="module")
    assert report.model.extra.kernel_size == (3, 3) and report.model.extra.weight.shape[2:] == (3, 3)


def test_the_windows_of_what_is_read_for_its_shape_stay() -> None:
    """How many there are follows from the channels in a way that no relation says."""
    look = Looking(lambda h: F.avg_pool1d(h.unsqueeze(0), 2).shape[-1])
    graph = depgraph.trace(look.eval(), torch.randn(2, 4))
    assert not any(axis.prunable.any() for axis in graph.axes if axis.size == 8)


def test_what_is_picked_for_its_shape_must_be_there() -> None:
    graph = depgraph.trace(Looking(lambda h: h[..., 5].shape[0]).eval(), torch.randn(2, 4))
    axis = next(axis for axis in graph.axes if axis.size == 8)
    assert graph.widths.least(axis.name) == 6
    with pytest.raises(PlanError, match="index 5 of it is looked at, for its shape"):
        graph.cut_plan({axis.name: [0, 1, 2]})


class ChannelMax(nn.Module):
    def __init__(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.pick = [pick]
        self.up, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(h * torch.sigmoid(self.pick[0](h)))


@pytest.mark.parametrize(
    ("pick", "prunable"),
    [
        (lambda h: h.max(1, keepdim=True)[0], True),
        (lambda h: torch.max(h, dim=1, keepdim=True).values, True),
        (lambda h: h.amax(1, keepdim=True), True),
        (lambda h: h.max(1, keepdim=True)[1].float(), False),
        (lambda h: sum(h.max(1, keepdim=True)), False),
    ],
)
def test_where_a_maximum_stands_counts_only_if_it_is_read(pick: Any, prunable: bool) -> None:
    graph = depgraph.trace(ChannelMax(pick).eval(), torch.randn(2, 3, 5, 5))
    assert any(axis.prunable.any() for axis in graph.axes) == prunable
