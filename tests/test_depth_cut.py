"""Plans that leave branches and blocks out: what is left computes what the captured program computes without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import depgraph
import exporters
import importance
from depgraph.cutting.bypassing import bypassed
from depgraph.cutting.entries import seats, uncounted
from depgraph.cutting.passing import Nothing, Passed, of
from depgraph.errors import CheckpointError, CutError, PlanError
from tests.zoo import MODULES, ZOO, Example

DECODERS = ["llama_8_4", "gemma2", "gpt2"]


def built(name: str) -> tuple[Example, depgraph.DependencyGraph]:
    example = {**ZOO, **MODULES}[name]()
    example.model = copy.deepcopy(example.model)  # builders share configs
    return example, depgraph.trace(example.model, example.args, example.kwargs)


def floats(model: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        out = model(*example.args, **example.kwargs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def elements(model: nn.Module) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


@pytest.mark.parametrize(
    "name",
    ["llama_8_4", "gptj", "gemma2", "gpt2", "mixtral", "mamba", "vit", "dinov2", "swin", "convnext", "resnet_basic"]
    + ["mobilenet_v2", "bert_classifier", "transformer_encoder", "transformer_layer_norm_first"],
)
def test_without_a_branch_or_block_it_computes_what_the_program_does(name: str) -> None:
    example, graph = built(name)
    for part in [graph.branches[0].name, graph.branches[-1].name, *(b.name for b in graph.blocks[:1])]:
        report = graph.cut_plan(branches=[part]).apply_with_report()
        assert report.check is not None and report.check.error <= report.check.tolerance and not report.check.vacuous
        assert elements(report.model) == report.after.params < report.before.params
        expected = bypassed(graph, [part]).run(graph.args, graph.kwargs)
        got = floats(report.model, example)
        for a, b in zip(got, [t for t in expected if t.is_floating_point()], strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_equals_that_without(name: str) -> None:
    example, _ = built(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(5, 60, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    graph = depgraph.trace(example.model, (), {"input_ids": ids})
    attentions = [b.name for b in graph.branches if b.kind == "attention"]
    for part in (attentions[0], attentions[-1], graph.blocks[0].name):
        model: Any = graph.cut_plan(branches=[part]).apply()
        for given in ({}, {"attention_mask": mask}, {"num_beams": 3}):
            with_cache, without = (
                model.generate(
                    input_ids=ids,
                    max_new_tokens=6,
                    use_cache=cache,
                    pad_token_id=0,
                    eos_token_id=None,
                    do_sample=False,
                    **given,
                )
                for cache in (True, False)
            )
            assert torch.equal(with_cache, without), (part, given)


@pytest.mark.parametrize("name", ["llama_8_4", "gemma2", "bert_classifier", "mixtral"])
def test_without_whole_blocks_it_is_a_plain_directory(name: str, tmp_path: Path) -> None:
    example, graph = built(name)
    model: Any = graph.cut_plan(branches=[graph.blocks[0].name]).apply()
    assert depgraph.save(model, tmp_path / "saved").format == "plain"
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.num_hidden_layers == example.model.config.num_hidden_layers - 1
    for a, b in zip(floats(loaded, example), floats(model, example), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_8_4", "vit"])
def test_depth_and_width_are_one_plan(name: str, tmp_path: Path) -> None:
    example, graph = built(name)
    width = graph.plan(importance.Random(), depgraph.Target(params=0.85), scope="axis", form="module")
    for part in (graph.branches[0].name, graph.blocks[0].name):
        plan = width.with_branches(part)
        plan.save(tmp_path / "plan.json")
        assert depgraph.Plan.load(graph, tmp_path / "plan.json").branches == plan.branches == (part,)
        report = plan.apply_with_report()
        assert report.check is not None and not report.check.vacuous
        assert elements(report.model) == plan.cost().params
        folder = tmp_path / part.replace(":", "_")
        depgraph.save(report.model, folder)
        loaded = depgraph.load(folder, built(name)[0].model)
        for a, b in zip(floats(loaded, example), floats(report.model, example), strict=True):
            assert torch.equal(a, b)
        other, again = built(name)
        depgraph.Plan.from_json(again, plan.to_json()).apply_()
        for a, b in zip(floats(other.model, example), floats(report.model, example), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_block_whose_branches_all_go_leaves_its_list() -> None:
    _, graph = built("llama_8_4")
    model: Any = graph.cut_plan(branches=graph.blocks[1].branches).apply()
    assert len(model.model.layers) == 1 and model.config.num_hidden_layers == 1
    assert not any(isinstance(module, Passed) for module in model.modules())


def test_a_shorter_model_trains_and_keeps_its_class() -> None:
    example, graph = built("llama_8_4")
    model = graph.cut_plan(branches=["model.layers.0.self_attn"]).apply()
    assert type(model) is type(example.model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=example.kwargs["input_ids"], labels=example.kwargs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_nothing_of_a_sublayer_is_exported(tmp_path: Path) -> None:
    example, _ = built("llama_8_4")
    inputs = {"input_ids": example.kwargs["input_ids"]}
    graph = depgraph.trace(example.model, (), inputs)
    counts = {}
    for what, model in {
        "dense": example.model,
        "cut": graph.cut_plan(branches=["model.layers.1.mlp", "model.layers.0.self_attn"]).apply(),
    }.items():
        exporters.to_onnx(model, (), tmp_path / f"{what}.onnx", kwargs=inputs)
        nodes = [node.op_type for node in onnx_ir.load(tmp_path / f"{what}.onnx").graph]
        counts[what] = {kind: nodes.count(kind) for kind in ("MatMul", "Add", "Reciprocal", "Softmax")}
    gone = {kind: counts["dense"][kind] - counts["cut"][kind] for kind in counts["dense"]}
    assert gone["Softmax"] == 1 and gone["Reciprocal"] == 2  # its norm went as well
    assert gone["MatMul"] == 3 + 4 + 2 and gone["Add"] >= 2


def test_a_planted_identity_block_changes_nothing() -> None:
    example, _ = built("llama_8_4")
    with torch.no_grad():
        example.model.model.layers[1].self_attn.o_proj.weight.zero_()
        example.model.model.layers[1].mlp.down_proj.weight.zero_()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    report = graph.cut_plan(branches=["model.layers.1"]).apply_with_report()
    for a, b in zip(floats(report.model, example), floats(example.model, example), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert report.check is not None and report.check.vacuous


def test_what_cannot_go_is_refused_and_leaves_the_model_whole() -> None:
    example, graph = built("llama_8_4")
    before = {name: tensor.clone() for name, tensor in example.model.state_dict().items()}
    with pytest.raises(PlanError, match=r"'model.layers.7' is no branch or block"):
        graph.cut_plan(branches=["model.layers.7"])
    with pytest.raises(PlanError, match="removes all 2 entries of model.layers"):
        graph.cut_plan(branches=[b.name for b in graph.blocks]).apply_()
    with pytest.raises(PlanError, match="is a single name"):
        graph.cut_plan(branches="model.layers.0")
    _, twice = built("used_twice")
    with pytest.raises(CutError, match="does other things too"):
        twice.cut_plan(branches=[twice.branches[0].name]).apply(form="module")
    assert all(torch.equal(before[name], tensor) for name, tensor in example.model.state_dict().items())


@pytest.mark.parametrize("name", ["used_twice", "transformer_layer_norm_first"])
def test_what_a_module_cannot_express_is_left_out_of_its_graph(name: str, tmp_path: Path) -> None:
    example, graph = built(name)
    part = graph.branches[-1].name
    width = graph.plan(importance.Random(), depgraph.Target(params=0.8), scope="axis", branches=[part])
    for plan in (graph.cut_plan(branches=[part]), width):
        report = plan.apply_with_report(form="auto" if name == "used_twice" else "graph")
        assert report.form == "graph" and report.check is not None and not report.check.vacuous
        assert elements(report.model) == plan.cost().params and plan.cost().macs < graph.dense_cost.macs
        shared = {id(p) for p in report.model.parameters()} & {id(p) for p in example.model.parameters()}
        assert not shared
        folder = tmp_path / ("both" if plan is width else "depth")
        depgraph.save(report.model, folder)
        again = depgraph.load(folder, built(name)[0].model)
        for a, b in zip(floats(again, example), floats(report.model, example), strict=True):
            assert torch.equal(a, b)
    expected = bypassed(graph, [part]).run(graph.args, graph.kwargs)
    for a, b in zip(floats(graph.cut_plan(branches=[part]).apply(form="graph"), example), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    ["encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"]
    + ["encoder.block.0", "decoder.block.0"],
)
def test_a_bias_that_later_attentions_share_is_made_without_the_first(part: str) -> None:
    example, graph = built("t5")
    report = graph.cut_plan(branches=[part]).apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    ids = example.kwargs["input_ids"]
    given = [
        report.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*given)


def test_what_is_made_where_nothing_lies_is_made_where_its_stream_does() -> None:
    nothing = of(torch.empty(2, 3, 4, device="meta"), torch.device("cpu"))
    query, *_ = (nothing * 2).unflatten(-1, (2, 2)).transpose(1, 2).unbind(0)
    assert query.device == torch.device("cpu") and query.shape == (2, 3, 2)


def test_nothing_disappears_in_a_sum_and_keeps_its_shape() -> None:
    stream = torch.randn(2, 3, 4)
    nothing = of(torch.empty(2, 3, 4, device="meta"))
    assert stream + nothing is stream and nothing + stream is stream and torch.add(stream, nothing) is stream
    assert nothing.view(2, 12).shape == (2, 12) and (nothing * 2).transpose(1, 2).shape == (2, 4, 3)
    first, second = nothing.chunk(2, dim=-1)
    assert isinstance(first, Nothing) and second.shape == (2, 3, 2)
    assert isinstance(nn.functional.dropout(nothing, 0.1), Nothing)


def test_torch_fx_traces_a_module_without_a_sublayer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.scale * self.first(x)
            return x + self.second(x)

    inputs = torch.randn(3, 8)
    graph = depgraph.trace(nn.Sequential(nn.Linear(8, 8), Twice()), inputs)
    pruned = graph.cut_plan(branches=[graph.branches[0].name]).apply(form="module")
    assert torch.equal(torch.fx.symbolic_trace(pruned)(inputs), pruned(inputs))


def test_what_is_taken_from_nothing_is_no_stream() -> None:
    stream = torch.randn(2, 3)
    nothing = of(torch.empty(2, 3, device="meta"))
    assert stream - nothing is stream and torch.sub(stream, nothing) is stream
    with pytest.raises(TypeError, match="what is left out"):
        nothing - stream
    with pytest.raises(TypeError, match="what is left out"):
        torch.addmm(nothing, torch.randn(2, 4), torch.randn(4, 3))


def test_a_shorter_checkpoint_is_refused_by_another_model(tmp_path: Path) -> None:
    _, graph = built("transformer_encoder")
    depgraph.save(graph.cut_plan(branches=[graph.blocks[0].name]).apply(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="pass the model that was cut"):
        depgraph.load(tmp_path / "saved", nn.Linear(2, 2))


class Residual(nn.Module):
    """An entry with its addition within."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, function: Any) -> Tensor:
        return x + self.down(function(self.up(self.norm(x))))


class Listed(nn.Module):
    """Entries with plain lists beside them: an item for each, which can't be written as JSON, and as many sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.entries = nn.ModuleList(Residual() for _ in range(3))
        self.after = [torch.tanh, torch.sigmoid, torch.relu]
        self.shape = (2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for entry, function in zip(self.entries, self.after, strict=True):
            h = entry(h, function)
        return h.reshape(len(h), *self.shape)


def test_lists_beside_a_container_follow_and_are_saved(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Listed(), torch.randn(3, 5)
    graph = depgraph.trace(model, x)
    assert [block.name for block in graph.blocks] == ["entries.0", "entries.1", "entries.2"]
    pruned: Any = graph.cut_plan(branches=["entries.1"]).apply()
    assert pruned.after == [torch.tanh, torch.relu] and pruned.shape == (2, 2, 2)
    depgraph.save(pruned, tmp_path / "saved")
    assert torch.equal(depgraph.load(tmp_path / "saved", Listed())(x), pruned(x))


@pytest.mark.parametrize("number", [4, 11])
def test_names_move_up_with_their_entries(number: int) -> None:
    """Beside a block and a sublayer of another that go, the axes of all later ones are cut as planned."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=number,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 32, (2, 5))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    graph = depgraph.trace(model, (), {"input_ids": ids})
    last = f"model.layers.{number - 1}"
    removal = {"model.layers.2.mlp.gate_proj.weight:0": [0], f"{last}.mlp.gate_proj.weight:0": [1, 5]}
    plan = graph.cut_plan(removal, ["model.layers.0", "model.layers.1.mlp"])
    report = plan.apply_with_report(form="module")
    pruned: Any = report.model
    layers = pruned.model.layers
    assert len(layers) == number - 1 and layers[-1].mlp.up_proj.out_features == 10
    assert layers[1].mlp.up_proj.out_features == 11 and elements(pruned) == plan.cost().params


def hybrid(types: list[str]) -> Any:
    """A decoder of which some layers see a window of 4 tokens only."""
    config = Gemma2Config(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=len(types),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=64,
        sliding_window=4,
        layer_types=types,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("types", "gone"),
    [
        ([SLIDING, FULL, SLIDING, FULL], [0]),
        ([SLIDING, FULL, SLIDING, FULL], [3]),
        ([SLIDING, FULL, SLIDING, FULL], [0, 2]),  # none that slides is left
        ([FULL, SLIDING, SLIDING], [0]),
    ],
)
def test_a_cache_of_several_kinds_of_layers_follows(types: list[str], gone: list[int]) -> None:
    model = hybrid(types)
    ids = torch.arange(5, 17).reshape(2, 6)
    graph = depgraph.trace(model, (), {"input_ids": ids})
    short: Any = graph.cut_plan(branches=[f"model.layers.{k}.self_attn" for k in gone]).apply()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    for given in ({}, {"attention_mask": mask}, {"num_beams": 2}):
        found = [short.generate(input_ids=ids, use_cache=cache, **options, **given) for cache in (True, False)]
        assert torch.equal(*found), given


def test_a_block_that_goes_too_moves_the_places_of_a_cache() -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    graph = depgraph.trace(hybrid([SLIDING, FULL, SLIDING, FULL]), (), {"input_ids": ids})
    short: Any = graph.cut_plan(branches=["model.layers.1", "model.layers.2.self_attn"]).apply()
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    found = [short.generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False)]
    assert short.config.layer_types == [SLIDING, SLIDING, FULL] and torch.equal(*found)


def test_seats_keep_the_first_and_the_last_of_a_kind_in_use() -> None:
    assert seats(["a", "b", "a", "a", "b"], [0]) == [2, 1, 0, 3, 4]
    assert seats(["a", "a", "a", "a"], [3, 1]) == [0, 1, 3, 2]
    assert uncounted(["a", "b", "a"], [0, 2]) == [0] and uncounted(["a", "b", "a"], [0]) == []


def test_a_model_without_sublayers_is_copied_compiled_and_adapted() -> None:
    import peft

    example, graph = built("llama_8_4")
    short: Any = graph.cut_plan(branches=["model.layers.0.self_attn", "model.layers.1.mlp"]).apply()
    expected = floats(short, example)[0]
    assert torch.equal(floats(copy.deepcopy(short), example)[0], expected)
    compiled = torch.compile(short, backend="eager", fullgraph=True)
    assert torch.allclose(floats(compiled, example)[0], expected, atol=1e-5)
    adapted: Any = peft.get_peft_model(
        copy.deepcopy(short), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    touched = {n.split("base_model.model.")[-1] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert {".".join(n.split(".")[:4]) for n in touched} == {"model.layers.0.mlp", "model.layers.1.self_attn"}
    ids = example.kwargs["input_ids"]
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in adapted.named_parameters() if "lora_B" in n
    )
    merged = adapted.merge_and_unload().eval()
    assert isinstance(merged.model.layers[0].self_attn, Passed)
    assert torch.isfinite(floats(merged, example)[0]).all()


class Handing(nn.Module):
    """Hands something on beside what it computes, as attentions do that share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.up(x) + bias), bias


class Handed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Handing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = x.mean(dim=-1, keepdim=True)
        for step in self.steps:
            y, bias = step(x, bias)
            x = x + y
        return x


def test_what_a_module_hands_on_is_handed_on_without_it(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Handed(), torch.randn(3, 6)
    graph = depgraph.trace(model, x)
    (middle,) = [b.name for b in graph.branches if b.name.startswith("steps.1")]
    report = graph.cut_plan(branches=[middle]).apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    depgraph.save(report.model, tmp_path / "saved")
    assert torch.equal(depgraph.load(tmp_path / "saved", Handed())(x), report.model(x))
