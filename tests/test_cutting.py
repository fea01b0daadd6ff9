"""Cuts in the module and in the graph: what follows, what survives, what is refused, what the check sees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.cutting.verifying import Verifier
from depgraph.errors import CaptureError, CheckError, CutError, PlanError
from tests.test_end_to_end import random_scores, zeroed
from tests.zoo import MODULES, ZOO


def planned(name: str, keep: float = 0.7, scope: str = "axis") -> depgraph.Plan:
    example = {**ZOO, **MODULES}[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    return graph.plan(random_scores(graph), depgraph.Target(params=keep), scope=scope)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}


def integers(model: nn.Module) -> dict[str, object]:
    return {f"{n}.{k}": v for n, m in model.named_modules() for k, v in vars(m).items() if isinstance(v, (int, tuple))}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
    assert integers(model) == numbers
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_apply_leaves_the_original_as_it_was() -> None:
    plan = planned("llama_8_4")
    before, numbers = state(plan.graph.model), integers(plan.graph.model)
    pruned = plan.apply()
    assert pruned is not plan.graph.model
    assert_unchanged(plan.graph.model, before, numbers)
    shared = {p.data_ptr() for p in pruned.parameters()} & {p.data_ptr() for p in plan.graph.model.parameters()}
    assert not shared


def test_cutting_in_place_keeps_hooks_ties_and_states() -> None:
    plan = planned("llama_8_4")
    model = plan.graph.model
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.layers[0].mlp.down_proj.weight
    frozen.requires_grad_(False)
    calls: list[str] = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append("module"))
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda grad: calls.append("parameter"))
    assert plan.apply_() is model
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert not model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    calls.clear()
    model(**plan.graph.kwargs).logits.sum().backward()
    assert calls == ["module", "parameter"]
    assert model.model.layers[0].mlp.down_proj.in_features == model.model.layers[0].mlp.down_proj.weight.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_survive(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)
    graph = depgraph.trace(model, torch.randn(4, 8, dtype=dtype))
    report = graph.plan(random_scores(graph), depgraph.Target(params=0.5)).apply_with_report()
    assert {p.dtype for p in report.model.parameters()} == {dtype}
    assert report.after.bytes == sum(p.numel() * p.itemsize for p in report.model.parameters())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_failed_cut_leaves_the_model_as_it_was(failure: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("gpt2")
    model = plan.graph.model
    before, numbers = state(model), integers(model)
    kept = dict(model.named_parameters())

    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(Verifier, "check", fail)
    with pytest.raises((failure, CheckError)):
        plan.apply_()
    assert_unchanged(model, before, numbers)
    assert all(p is kept[n] for n, p in model.named_parameters())


def test_what_the_code_cannot_say_is_refused_with_file_and_line_or_cut_as_a_graph() -> None:
    plan = planned("literal_sizes")
    before, numbers = state(plan.graph.model), integers(plan.graph.model)
    with pytest.raises(CutError, match=r"sequential\.py:\d+.*the number \d"):
        plan.apply(form="module")
    with pytest.raises(CutError, match="LiteralSizes"):
        plan.apply_()
    assert_unchanged(plan.graph.model, before, numbers)
    report = plan.apply_with_report(form="auto")
    assert report.form == "graph"
    assert isinstance(report.model, torch.fx.GraphModule)
    assert "LiteralSizes can't express" in report.notes[0]


class Reversed(nn.Module):
    """Columns of the last layer lose their indices in a list that stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)[:, [3, 2, 1, 0]])


def test_a_tensor_that_stands_in_the_code_is_refused_with_file_and_line() -> None:
    graph = depgraph.trace(Reversed().eval(), torch.randn(2, 3))
    plan = graph.cut_plan({"out.weight:1": [0]})
    with pytest.raises(
        CutError, match=r"Reversed can't express this cut, .*test_cutting\.py:\d+: a tensor of shape \[4\]"
    ):
        plan.apply(form="module")
    assert plan.apply_with_report(form="graph").check.error < 1e-5


def test_planning_for_the_module_form_leaves_what_it_cannot_say() -> None:
    example = MODULES["transformer_encoder"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.9), form="module")
    assert plan.apply_with_report(form="module").form == "module"


def test_the_graph_form_trains_and_takes_other_sizes() -> None:
    plan = planned("llama_8_4")
    model = plan.apply(form="graph")
    ids = torch.randint(0, 50, (5, 11))
    mask = torch.ones_like(ids)
    inputs = {k: mask if "mask" in k else ids for k in plan.graph.kwargs}
    assert model(**inputs).logits.shape[:2] == (5, 11)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), ids.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["llama_8_2", "gpt2", "t5"])
def test_generate_works_with_and_without_a_cache(name: str) -> None:
    plan = planned(name)
    model = plan.apply(form="module").eval()
    ids = torch.randint(2, 50, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_attributes_follow() -> None:
    model = planned("gpt2").apply(form="module")
    attention = model.transformer.h[0].attn
    assert attention.split_size == attention.c_proj.weight.shape[0]
    norm = planned("group_norm_cnn").apply(form="module")
    for layer in norm.modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_channels == layer.weight.shape[0]
    cnn = planned("residual_cnn").apply(form="module")
    for layer in cnn.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2])


def test_attention_without_an_explicit_scale_keeps_it() -> None:
    example = MODULES["fused_qkv_unbind"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    width = next(a for a in graph.axes if graph.sizes.solve(graph.widths.at({a.name: [0]})).drifts)
    report = graph.plan(random_scores(graph), depgraph.Target(params=0.9), only=width).apply_with_report(form="module")
    assert report.check is not None
    assert report.check.error < 1e-5


class _Applied(nn.Module):
    """One attention, applied again and again; what makes queries and keys is read once more where it is `read_too`."""

    def __init__(self, times: int, read_too: bool = False, last_scale: float | None = None) -> None:
        super().__init__()
        self.times, self.read_too, self.last_scale = times, read_too, last_scale
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k in range(self.times):
            made = [layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            found = F.scaled_dot_product_attention(*made, scale=self.last_scale if k == self.times - 1 else None)
            x = x + self.out(found.transpose(1, 2).flatten(2))
        return self.head(x + self.q(x).tanh().mean(-1, True) + self.k(x).tanh().mean(-1, True) if self.read_too else x)


def _narrower_heads(model: nn.Module) -> depgraph.Plan:
    torch.manual_seed(0)
    graph = depgraph.trace(model.eval(), torch.randn(2, 5, 6))
    width = next(a for a in graph.axes if graph.sizes.solve(graph.widths.at({a.name: [0]})).drifts)
    return graph.cut_plan({width.name: [0, 2]})


def test_a_weight_of_a_block_that_is_applied_again_makes_up_for_the_scale_once() -> None:
    report = _narrower_heads(_Applied(3)).apply_with_report(form="module")
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


def test_a_weight_that_makes_queries_and_keys_is_left_whole_in_the_module() -> None:
    torch.manual_seed(0)
    model = _Applied(2).eval()
    model.k = model.q
    graph = depgraph.trace(model, torch.randn(2, 5, 6))
    width = next(a for a in graph.axes if graph.sizes.solve(graph.widths.at({a.name: [0]})).drifts)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), scope="axis", form="module")
    report = plan.apply_with_report()
    assert width.name not in plan.removal and report.form == "module"
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


@pytest.mark.parametrize("model", [_Applied(2, read_too=True), _Applied(2, last_scale=0.5)])
def test_a_weight_that_is_to_make_up_for_one_of_its_uses_only_does_not(model: nn.Module) -> None:
    plan = _narrower_heads(model)
    with pytest.raises(CutError, match="no weight that only this reads can make up for it"):
        plan.apply(form="module")
    report = plan.apply_with_report()
    assert report.form == "graph"
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


def test_the_check_sees_a_wrong_cut() -> None:
    plan = planned("resnet_basic")
    pruned = plan.apply()
    with torch.no_grad():
        next(p for p in reversed(list(pruned.parameters())) if p.ndim > 1).mul_(1.01)
    with pytest.raises(CheckError, match="differs from the zeroed original"):
        Verifier(plan).check(pruned)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_check_names_the_first_place_where_a_wrong_cut_is_wrong(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    graph = depgraph.trace(model, torch.randn(2, 4, device=device))
    narrower = graph.cut_plan({graph.axes[0].name: [0, 1, 2]}).apply()
    with pytest.raises(CheckError, match=r"linear at .* gives shape \(2, 5\), predicted was \(2, 6\)"):
        Verifier(graph.cut_plan({graph.axes[0].name: [0, 1]})).check(narrower)


def test_a_vacuous_check_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[:, :2] = 0
    graph = depgraph.trace(model, torch.randn(2, 4))
    check = graph.cut_plan({graph.axes[0].name: [0, 1]}).apply_with_report().check
    assert check is not None
    assert check.vacuous
    assert "VACUOUS" in str(check)


def test_keeping_all_is_the_identity_and_two_cuts_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    inputs = torch.randn(5, 4)
    graph = depgraph.trace(model, inputs)
    first, second = (a.name for a in graph.axes)
    assert torch.equal(graph.cut_plan({}).apply()(inputs), model(inputs))
    once = graph.cut_plan({first: [1, 5], second: [0]}).apply()
    half = graph.cut_plan({first: [1, 5]}).apply()
    twice = depgraph.trace(half, inputs).cut_plan({second: [0]}).apply()
    assert torch.equal(once(inputs), twice(inputs))
    assert len(twice.depgraph_record["earlier"]) == 1


def test_on_the_meta_device_shapes_are_checked() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 4, device="meta"))
    report = graph.plan(random_scores(graph), depgraph.Target(params=0.5)).apply_with_report()
    assert report.check is not None and "meta" in report.check.skipped and report.check.calls
    assert report.after.params == sum(p.numel() for p in report.model.parameters())


def test_a_pruned_model_is_an_ordinary_one() -> None:
    pruned = planned("vit").apply(form="module")
    twin = copy.deepcopy(pruned)
    twin.load_state_dict(pruned.state_dict())
    assert type(pruned).__name__ == "ViTForImageClassification"


def test_gradients_and_their_hooks_are_narrowed_with_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    graph = depgraph.trace(model, torch.randn(2, 4))
    model(torch.randn(5, 4)).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    seen: list[torch.Size] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    graph.cut_plan({graph.axes[0].name: [0, 7]}).apply_()
    keep = [i for i in range(12) if i not in (0, 7)]
    assert torch.equal(model[0].weight.grad, before["0.weight"][keep])
    assert torch.equal(model[0].bias.grad, before["0.bias"][keep])
    assert torch.equal(model[2].weight.grad, before["2.weight"][:, keep])
    assert torch.equal(model[2].bias.grad, before["2.bias"])
    model(torch.randn(5, 4)).sum().backward()
    assert seen == [torch.Size([10, 4])]


@pytest.mark.parametrize("name", ["gpt2", "llama_8_4", "residual_cnn", "tied_weights"])
def test_an_interruption_in_the_middle_of_the_cut_takes_everything_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(name)
    model = plan.graph.model
    before, numbers = state(model), integers(model)
    objects = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}

    def interrupted(cut: nn.Module, _: object) -> None:
        assert {n: id(p) for n, p in cut.named_parameters(remove_duplicate=False)} != objects
        raise KeyboardInterrupt

    monkeypatch.setattr("depgraph.cutting.module.follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.apply_()
    assert_unchanged(model, before, numbers)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == objects
    assert not hasattr(model, "depgraph_record")
    monkeypatch.undo()
    assert plan.apply_() is model


def test_apply_keeps_the_states_of_the_original_in_the_copy() -> None:
    plan = planned("llama_8_4")
    model = plan.graph.model
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    pruned = plan.apply()
    assert {n: m.training for n, m in pruned.named_modules()} == {n: m.training for n, m in model.named_modules()}
    frozen = [n for n, p in pruned.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert pruned.config is not model.config


@pytest.mark.parametrize("name", ["llama_8_4", "resnet_bottleneck", "t5", "transformer_encoder", "used_twice"])
def test_the_module_form_trains(name: str) -> None:
    plan = planned(name)
    model = plan.apply(form="module")
    args, kwargs = plan.graph.args, plan.graph.kwargs
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        made = model(*args, **kwargs)
        loss = (made.logits if hasattr(made, "logits") else made).float().pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_another_batch_and_length_go_through_the_module_form() -> None:
    model = planned("llama_8_4").apply(form="module")
    ids = torch.randint(3, 90, (5, 13))
    with torch.no_grad():
        assert model(ids).logits.shape == (5, 13, 101)
        one_by_one = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(model(ids).logits, one_by_one, rtol=1e-4, atol=1e-4)


def test_sizes_in_every_kind_of_attribute_follow() -> None:
    split = planned("split_sizes").apply(form="module")
    assert sum(split.sizes) == split.fused.out_features == split.fused.weight.shape[0]
    llama = planned("llama_8_2").apply(form="module")
    for layer in llama.model.layers:
        attention = layer.self_attn
        heads = attention.o_proj.in_features // attention.v_proj.out_features
        assert attention.num_key_value_groups == heads
        assert layer.mlp.up_proj.out_features == layer.mlp.down_proj.in_features == layer.mlp.up_proj.weight.shape[0]
    bert = planned("bert_classifier").apply(form="module")
    norms = [m for m in bert.modules() if isinstance(m, nn.LayerNorm)]
    assert all(m.normalized_shape == tuple(m.weight.shape) for m in norms)
    cnn = planned("residual_cnn").apply(form="module")
    grouped = cnn.first.grouped[0]
    assert grouped.groups == grouped.in_channels // grouped.weight.shape[1]
    assert cnn.first.depthwise[0].groups == cnn.first.depthwise[0].out_channels


def test_the_report_says_what_was_cut_and_checked() -> None:
    plan = planned("mlp")
    text = str(plan.apply_with_report(form="module"))
    dense, left = plan.graph.dense_cost, plan.cost()
    assert text.startswith("cut as a module\n")
    assert f"params: {dense.params:,} -> {left.params:,} ({left.params / dense.params:.1%})" in text
    assert "check: equal: error " in text
    assert "where the removal moved it by" in text
    assert "check: left out as asked" in str(plan.apply_with_report(check="none"))


def test_the_record_says_what_went() -> None:
    plan = planned("gpt2")
    model = plan.apply(form="module")
    record = model.depgraph_record
    assert record["form"] == "module"
    assert record["groups"] == {name: list(groups) for name, groups in plan.removal.items()}
    removed = {(r["target"], r["dim"]): r["indices"] for r in record["removed"]}
    assert removed == {(r.target, r.dim): r.indices.tolist() for r in plan.removed()}
    dense = dict(plan.graph.model.named_parameters())
    for name, parameter in model.named_parameters():
        gone = [len(removed.get((name, d), ())) for d in range(parameter.ndim)]
        assert [a + b for a, b in zip(parameter.shape, gone, strict=True)] == list(dense[name].shape)
    for change in record["attributes"]:
        assert change["before"] > change["after"]


def test_unknown_options_of_apply_are_refused() -> None:
    plan = planned("mlp")
    with pytest.raises(depgraph.errors.PlanError, match="no option 'forms'"):
        plan.apply(forms="module")
    with pytest.raises(depgraph.errors.PlanError, match="form='onnx'"):
        plan.apply(form="onnx")
    with pytest.raises(CutError, match="can't be cut in place"):
        plan.apply_(form="graph")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_is_right_in_other_precisions(dtype: torch.dtype) -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model.to(dtype), example.args, example.kwargs)
    report = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope="axis").apply_with_report(
        form="module"
    )
    assert report.check is not None
    assert report.check.error <= {torch.bfloat16: 6e-2, torch.float64: 1e-12}[dtype]
    assert not report.check.vacuous
    assert {p.dtype for p in report.model.parameters()} == {dtype}


def test_a_model_that_was_cut_since_it_was_traced_is_traced_again_or_refused() -> None:
    plan = planned("residual_cnn")
    again = plan.graph.cut_plan(plan.removal)
    plan.apply_()
    for late in (again.apply, again.apply_, lambda: planned_on(plan.graph)):
        with pytest.raises(PlanError, match=r"has changed since it was traced: '.*' was of shape .* trace it again"):
            late()
    assert depgraph.trace(plan.graph.model, plan.graph.args).dense_cost == plan.cost()


def planned_on(graph: depgraph.DependencyGraph) -> depgraph.Plan:
    return graph.plan(random_scores(graph), depgraph.Target(params=0.5))


def test_what_is_not_cut_keeps_its_gradient_hooks_and_attributes_in_a_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 3))
    inputs = torch.randn(2, 6)
    model(inputs).sum().backward()
    whole = model[3].weight
    whole.note = "mine"
    calls: list[str] = []
    whole.register_hook(lambda grad: calls.append("hook"))
    whole.register_post_accumulate_grad_hook(lambda parameter: calls.append("after"))
    pruned = depgraph.trace(model, inputs).cut_plan({"0.weight:0": [1, 3]}).apply()
    copied = pruned[3].weight
    assert copied is not whole
    assert torch.equal(copied.grad, whole.grad)
    assert copied.note == "mine"
    assert torch.equal(pruned[0].weight.grad, model[0].weight.grad[[0, 2, 4, 5, 6, 7]])
    pruned(inputs).sum().backward()
    assert calls == ["hook", "after"]


class Scaled(nn.Module):
    """Attention over one's own heads, whose width reaches the scores by way of `scale`."""

    def __init__(self, scale: Callable[[int], dict[str, float]]) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.scale = [scale]
        self.qkv, self.out = nn.Linear(10, 3 * 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, self.width).transpose(1, 2)
            for part in self.qkv(x).split(self.heads * self.width, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, **self.scale[0](self.width))
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


@pytest.mark.parametrize(
    "scale",
    [lambda w: {}, lambda w: {"scale": 1 / math.sqrt(w)}, lambda w: {"scale": w**-0.5}, lambda w: {"scale": 0.3}],
)
def test_attention_is_scaled_as_before_whatever_the_example_shows(scale: Callable[[int], dict[str, float]]) -> None:
    """With a single token softmax hides the scale; the cut must be right for more."""
    model = Scaled(scale).eval()
    graph = depgraph.trace(model, torch.randn(1, 1, 10))
    within = next(axis for axis in graph.axes if axis.size == 6)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.8), only=within.name)
    pruned = plan.apply(form="module")
    more = torch.randn(2, 9, 10)
    torch.testing.assert_close(pruned(more), zeroed(model, plan)(more), rtol=1e-4, atol=1e-6)


class Numbered(nn.Module):
    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.use = [use]
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.use[0](torch.relu(self.first(x))))


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h / math.sqrt(h.shape[-1]),
        lambda h: h + 1 / math.sqrt(h.shape[-1]),
        lambda h: (h + 1).pow(1 / h.shape[-1]),
        lambda h: h / torch.sqrt(torch.tensor(h.shape[-1], dtype=torch.float32)),
    ],
)
def test_a_number_computed_from_a_size_stays_what_it_was_or_the_module_is_refused(use: Any) -> None:
    model = Numbered(use).to("meta")
    graph = depgraph.trace(model, torch.randn(3, 12, device="meta"))
    with pytest.raises(CutError, match="number"):
        graph.cut_plan({"first.weight:0": [0, 1, 2]}).apply(form="module")


@pytest.mark.parametrize("use", [lambda h: h / (h.norm() + 1), lambda h: h * h.std()])
def test_single_numbers_that_are_computed_from_data_may_change(use: Any) -> None:
    graph = depgraph.trace(Numbered(use), torch.randn(3, 12))
    report = graph.cut_plan({"first.weight:0": [0, 1, 2]}).apply_with_report(form="module")
    assert report.check.error < 1e-5


def test_the_graph_form_trains_and_evaluates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))
    inputs = torch.randn(4, 3, 8, 8)
    pruned = depgraph.trace(model.eval(), inputs).cut_plan({"0.weight:0": [1, 3]}).apply(form="graph")
    assert not pruned.training
    assert torch.equal(pruned(inputs), pruned(inputs))
    mean = dict(pruned.named_buffers())["1.running_mean"].clone()
    pruned.train()
    assert not torch.equal(pruned(inputs), pruned(inputs))
    assert not torch.equal(dict(pruned.named_buffers())["1.running_mean"], mean)
    again = depgraph.trace(model.train(), inputs).cut_plan({"0.weight:0": [1, 3]}).apply(form="graph")
    assert again.training
    again(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


@pytest.mark.parametrize("draw", [lambda h: h + torch.rand(1), lambda h: h + torch.rand(3, 1)])
def test_random_numbers_of_one_shape_are_drawn_alike_in_both(draw: Any) -> None:
    report = depgraph.trace(Numbered(draw), torch.randn(3, 12)).cut_plan({"first.weight:0": [0, 1]}).apply_with_report()
    assert report.check.error < 1e-5


def test_a_model_that_is_random_in_eval_mode_is_said_to_be() -> None:
    """What is drawn by what the model computes isn't taken over: that would hide what is wrong in it."""
    graph = depgraph.trace(Numbered(lambda h: h * torch.bernoulli(h.sigmoid())), torch.randn(3, 12))
    with pytest.raises(CheckError, match="draws random numbers in eval mode"):
        graph.cut_plan({"first.weight:0": [0, 1]}).apply()


class WritesToItsInput(nn.Module):
    """Counts its calls and adds to what it is given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        self.calls += 1
        return self.second(torch.relu(self.first(x))) * self.calls


class WritesToAView(nn.Module):
    """Adds what is cut to a part of a tensor that both sides of the check begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], 8)
        total[:, :4].add_(self.second(torch.relu(self.first(x))))
        return total.mul_(2)


@pytest.mark.parametrize("model", [WritesToItsInput, WritesToAView])
def test_a_model_that_writes_in_place_is_checked_and_left_as_it_was(model: type[nn.Module]) -> None:
    x = torch.randn(2, 4)
    net, given = model().eval(), x.clone()
    report = depgraph.trace(net, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report()
    assert report.check is not None
    assert report.check.sensitivity > 0
    assert torch.equal(x, given)
    assert all(not buffer.any() for module in (net, report.model) for buffer in module.buffers())


class Registers(nn.Module):
    """Learned tokens in front of the others, which attention leaves out of what it does to positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("positions", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 8).unbind(2)
        q = torch.cat([q[:, :4], q[:, 4:] * self.positions], dim=1)
        return self.out(F.scaled_dot_product_attention(q, k, v))[:, 4:]


def test_a_mixed_axis_is_followed_through_operators_of_several_results() -> None:
    graph = depgraph.trace(Registers(), torch.randn(2, 6, 8))
    report = graph.cut_plan({"tokens:1": [1]}).apply_with_report(form="graph")
    assert not graph["tokens:1"].exact
    assert report.check.sensitivity > 1e-3
    assert report.model(torch.randn(2, 6, 8)).shape == (2, 6, 8)


class Conditional(nn.Module):
    """Mixes a kernel of its own for each sample, and convolves the batch as groups of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.route, self.last = nn.Conv2d(3, 16, 1), nn.Linear(16, 4), nn.Conv2d(24, 5, 1)
        self.kernels = nn.Parameter(torch.randn(4, 24, 16, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        batch, channels, height, width = hidden.shape
        mixed = torch.einsum("br,roikl->boikl", self.route(hidden.mean((2, 3))).sigmoid(), self.kernels)
        rows = hidden.reshape(1, batch * channels, height, width)
        made = F.conv2d(rows, mixed.flatten(0, 1), padding=1, groups=batch)
        return self.last(made.view(batch, -1, height, width).relu())


def test_groups_that_the_batch_counts_stay_as_many() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Conditional().eval(), torch.randn(2, 3, 8, 8))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6))
    for form in ("graph", "auto"):
        pruned = plan.apply(form=form)
        assert pruned(torch.randn(5, 3, 8, 8)).shape == (5, 5, 8, 8)


class Winner(nn.Module):
    """Gives a number of a class and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 50))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).argmax(-1)


def test_whole_numbers_are_compared_where_a_model_gives_nothing_else() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Winner().eval(), (torch.randn(200, 8),))
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5)).apply_with_report()
    assert report.check is not None and report.check.error == 0 and 0.1 < report.check.sensitivity <= 1


DRAWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "randn_like": lambda mean, spread: mean + torch.randn_like(mean) * spread.exp(),
    "randn": lambda mean, spread: mean + torch.randn(mean.shape) * spread.exp(),
    "distribution": lambda mean, spread: torch.distributions.Normal(mean, spread.exp()).rsample(),
    "in place": lambda mean, spread: mean + torch.empty_like(mean).normal_() * spread.exp(),
    "bernoulli": lambda mean, spread: mean * torch.empty_like(spread).bernoulli_(0.3),
    "dropout": lambda mean, spread: F.dropout(mean + spread, 0.3, training=True),
    "dropout by one operator": lambda mean, spread: torch.native_dropout(mean + spread, 0.3, True)[0],
    "dropout once values have decided": lambda mean, spread: F.dropout(
        mean + spread if mean.sum().item() < 1e6 else mean, 0.3, training=True
    ),
    "gumbel": lambda mean, spread: F.gumbel_softmax(mean + spread),
    "heavy tails": lambda mean, spread: mean + spread * torch.empty_like(mean).cauchy_().clamp(-2, 2).exp(),
    "logarithms": lambda mean, spread: mean + spread * torch.empty_like(mean).log_normal_(0, 0.5),
    "one number": lambda mean, spread: mean * torch.randn_like(mean) + spread * torch.rand(()),
}


class Sampling(nn.Module):
    """A variational autoencoder: its code is drawn, so that cutting it changes how much is drawn."""

    def __init__(self, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Linear(8, 32), nn.Linear(32, 12), nn.Linear(32, 12)
        self.head, self.draw = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(x))
        return self.head(self.draw(self.mean(x), self.spread(x)))


@pytest.mark.parametrize("name", DRAWN)
def test_a_sampling_model_is_compared_on_the_same_draws(name: str) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Sampling(DRAWN[name]).eval(), (torch.randn(4, 8),))
    plan = graph.plan(importance.Random(seed=0), depgraph.Target(params=0.5))
    assert graph["mean.weight:0"].name in plan.removal
    report = plan.apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    assert report.model.mean.out_features < 12


def test_a_wrong_cut_of_a_sampling_model_is_noticed() -> None:
    model, x = Sampling(DRAWN["randn_like"]).eval(), torch.randn(4, 8)
    plan = depgraph.trace(model, (x,)).plan(importance.Random(seed=0), depgraph.Target(params=0.5))
    pruned = plan.apply()
    with torch.no_grad():
        pruned.spread.bias[0] += 1.0
    with pytest.raises(CheckError, match="differs from the zeroed original"):
        Verifier(plan).check(pruned)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_makes_up_for_its_scale_unless_another_layer_reads_it(tied: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
            if tied:
                self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.words(ids) * math.sqrt(self.words.embedding_dim)).tanh())

    model, ids = Scaled().eval(), torch.randint(0, 40, (2, 7))
    graph = depgraph.trace(model, (ids,))
    (axis,) = (axis for axis in graph.axes if axis.size == 16)
    plan = graph.cut_plan({axis.name: [1, 2, 5]})
    report = plan.apply_with_report()
    assert report.form == ("graph" if tied else "module")
    torch.testing.assert_close(report.model(ids), zeroed(model, plan)(ids))


def test_outputs_that_are_not_numbers_prove_nothing() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x))) + x.abs().sum() / 0

    graph = depgraph.trace(Broken().eval(), torch.randn(2, 4))
    with pytest.raises(CheckError, match="nothing but NaN and infinity on the example inputs"):
        graph.cut_plan({"first.weight:0": [0]}).apply()


def test_a_model_that_fails_after_its_cut_says_whether_the_original_does() -> None:
    def plan_of(fails: Callable[[nn.Linear], bool]) -> depgraph.Plan:
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
        plan = depgraph.trace(model, torch.randn(2, 4)).cut_plan({"0.weight:0": [0]})

        def fail(module: Any, args: Any) -> None:
            if fails(module):
                raise RuntimeError("out of order")

        model[0].register_forward_pre_hook(fail)
        return plan

    broken, too_small = plan_of(lambda module: True), plan_of(lambda module: module.out_features < 16)
    with pytest.raises(
        CaptureError, match=r"Sequential doesn't run on these example inputs .*: RuntimeError: out of order;"
    ):
        broken.apply(form="module")
    for cut in (
        broken.apply_,
        lambda: too_small.apply(form="module"),
        too_small.apply_,
    ):  # in place the original is gone
        with pytest.raises(CheckError, match="the pruned Sequential doesn't run: RuntimeError: out of order$"):
            cut()
    assert too_small.graph.model[0].out_features == 16


def test_a_part_of_a_packed_weight_makes_up_for_the_scale_of_its_heads() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe, self.attention = (
                nn.Parameter(torch.randn(1, 1, 32)),
                nn.MultiheadAttention(32, 4, batch_first=True),
            )
            self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            made, _ = self.attention(self.probe.expand(len(x), -1, -1), x, x)
            return self.head(made[:, 0])

    torch.manual_seed(0)
    model, x = Pooling().eval(), torch.randn(3, 6, 8)
    graph = depgraph.trace(model, (x,))
    widths = {axis.name: list(range(axis.size // 4)) for axis in graph.axes if axis.size in (8, 32)}
    plan = graph.cut_plan(widths)
    report = plan.apply_with_report()
    assert report.form == "module" and report.model.attention.out_proj.in_features == 24
    torch.testing.assert_close(report.model(x), zeroed(model, plan)(x), rtol=1e-4, atol=1e-5)


class _Settings:
    def __init__(self) -> None:
        self.width, self.inner = 6, _Inner()


class _Inner:
    def __init__(self) -> None:
        self.width = 8


class _Configured(nn.Module):
    """Reshapes by what a config says that may be another model's too."""

    def __init__(self, config: _Settings) -> None:
        super().__init__()
        self.config, self.part = config, nn.Module()
        self.part.config = config.inner  # type: ignore[assignment]
        self.up, self.down = nn.Linear(4, 2 * config.inner.width), nn.Linear(2 * config.inner.width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.up(x).reshape(x.shape[0], 2, self.config.inner.width)
        return self.down(torch.relu(made).reshape(x.shape[0], 2 * self.part.config.width))  # type: ignore[union-attr,operator]


def test_a_config_that_another_model_holds_stays_as_it_is(tmp_path: Path) -> None:
    config, x = _Settings(), torch.randn(3, 4)
    model, other, third = (_Configured(config).eval() for _ in range(3))
    before = other(x)
    graph = depgraph.trace(model, x)
    axis = next(a for a in graph.axes if a.size == 8 and a.prunable.all())
    plan = graph.cut_plan({axis.name: [0, 5]})
    assert plan.apply_() is model
    assert model.config.inner.width == model.part.config.width == 6  # type: ignore[union-attr]
    assert model.config.inner is model.part.config and config.inner.width == 8
    assert other.config is config and torch.equal(other(x), before)
    depgraph.save(model, tmp_path / "small")
    loaded = depgraph.load(tmp_path / "small", model=third)
    assert torch.equal(loaded(x), model(x)) and torch.equal(other(x), before)


def test_a_cut_that_fails_gives_the_config_back() -> None:
    config, x = _Settings(), torch.randn(3, 4)
    model = _Configured(config).eval()
    graph = depgraph.trace(model, x)
    axis = next(a for a in graph.axes if a.size == 8 and a.prunable.all())
    model.down.register_forward_hook(lambda module, args, output: output * args[0].shape[1])
    with pytest.raises(CheckError):
        graph.cut_plan({axis.name: [0]}).apply_()
    assert model.config is config and model.part.config is config.inner and config.inner.width == 8


class _TwoRoles(nn.Module):
    """`width` is the size of heads, and in code behind a flag the longest sequence, and a place to slice at."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads, self.clips = 8, 2, False
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.up(x).shape[-1] == self.heads * self.width
        made = self.up(x).reshape(*x.shape[:-1], self.heads, self.width)
        if self.clips and x.shape[1] > self.width:
            x = x[:, : self.width]
        return self.down(torch.relu(made).flatten(-2))


def test_another_role_of_an_integer_in_code_that_the_example_passes_by_is_noted() -> None:
    graph = depgraph.trace(_TwoRoles().eval(), torch.randn(2, 5, 4))
    axis = next(a for a in graph.axes if a.size == 8 and a.prunable.all())
    report = graph.cut_plan({axis.name: [0, 5]}).apply_with_report(form="module")
    notes = [note for note in report.notes if "width" in note]
    assert [note.split(" at ")[0] for note in notes] == ["_TwoRoles compares by width", "_TwoRoles slices by width"]
    assert all("test_cutting.py:" in note and "it is 6 now" in note for note in notes)
    neurons = graph.cut_plan({a.name: [0] for a in graph.axes if a.size == 2}).apply_with_report(form="module")
    assert not any("width" in note for note in neurons.notes)


class Blocks(nn.Module):
    """Sees its channels as so many blocks of four, which an attribute counts."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.first, self.second = 3, nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, self.count, 4).relu().flatten(1))


def test_what_is_solved_once_is_given_to_each_who_asks_as_their_own() -> None:
    graph = depgraph.trace(Blocks(), (torch.randn(2, 8),))
    for gone in ([0], [0, 1], [0]):
        for _ in range(2):
            solution = graph.sizes.solve(graph.widths.at({"first.weight:0/blocks": gone}))
            assert list(solution.attributes.values()) == [3 - len(gone)] and not solution.conflicts
            solution.attributes.clear()
