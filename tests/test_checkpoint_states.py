"""What else must survive saving and loading (ties, dtypes, flags, several cuts), and what must leave nothing behind."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

import depgraph
from depgraph.capture.capturing import quiet
from depgraph.errors import CheckpointError
from tests.test_checkpoint import recorded
from tests.zoo import MODULES, ZOO, Example

KEEP = depgraph.Target(params=0.7)


def scores(graph: depgraph.DependencyGraph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {axis.name: rng.random(axis.size) for axis in graph.axes}


def cut(example: Example, model: nn.Module | None = None, form: str = "auto", scope: str = "axis") -> nn.Module:
    graph = depgraph.trace(model or example.model, example.args, example.kwargs)
    return graph.plan(scores(graph), KEEP, scope=scope).apply(form=form)


def assert_same(example: Example, a: nn.Module, b: nn.Module) -> None:
    found = []
    for model in (a, b):
        with torch.no_grad(), quiet(model):
            leaves = tree_leaves(model(*example.args, **example.kwargs))
        found.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    assert found[0]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def there_and_back(model: nn.Module, folder: Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    depgraph.save(model, folder)
    return depgraph.load(folder, model=build)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 2 kB, as if the disk were full: within a test only, as pytest writes a log between them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_half_precision_ties_and_frozen_parameters_survive(form: str, tmp_path: Path) -> None:
    example = ZOO["llama_8_4"]()
    for parameter in example.model.parameters():
        parameter.data = parameter.data.bfloat16()
    example.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    pruned = cut(example, form=form)
    loaded = there_and_back(pruned, tmp_path / "saved")
    names = dict(loaded.named_parameters(remove_duplicate=False))
    assert names["lm_head.weight"] is names["model.embed_tokens.weight"]
    frozen = {n for n, p in names.items() if not p.requires_grad}
    assert frozen == {"model.layers.0.mlp.up_proj.weight"}
    assert {p.dtype for p in names.values()} == {torch.bfloat16}
    buffers = dict(pruned.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype
    assert_same(example, pruned, loaded)


def small_vit() -> tuple[nn.Module, torch.Tensor]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 8, 8)


def test_a_scale_that_a_config_decides_is_seen_where_the_outputs_hardly_show_it(tmp_path: Path) -> None:
    model, pixels = small_vit()  # attention of a fresh model is nearly even, whatever its scale
    graph = depgraph.trace(model, kwargs={"pixel_values": pixels})
    within = {axis.name: [0] for axis in graph.axes if axis.name.endswith("/within")}
    pruned = graph.cut_plan({graph.axes[0].name: [0, 1], **within}).apply(form="module")
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "depgraph" and "scales that the config decides differ" in report.why
    assert torch.equal(depgraph.load(tmp_path / "saved")(pixels).logits, pruned(pixels).logits)


def test_what_was_loaded_from_a_plain_folder_is_cut_again_unevenly(tmp_path: Path) -> None:
    model, pixels = small_vit()
    for step, neurons in enumerate([[range(8), range(8)], [range(4), range(2)]]):
        graph = depgraph.trace(model, kwargs={"pixel_values": pixels})
        mlps = [axis.name for axis in graph.axes if axis.name.endswith("fc1.weight:0")]
        pruned = graph.cut_plan(dict(zip(mlps, neurons, strict=True))).apply(form="module")
        assert depgraph.save(pruned, tmp_path / str(step)).format == ("plain", "depgraph")[step]
        model = depgraph.load(tmp_path / str(step))
        assert torch.equal(model(pixels).logits, pruned(pixels).logits)


def test_what_an_earlier_cut_changed_may_have_left_with_a_sublayer(tmp_path: Path) -> None:
    model, pixels = small_vit()
    for step in range(2):
        graph = depgraph.trace(model, kwargs={"pixel_values": pixels})
        plan = graph.plan(scores(graph), KEEP) if step == 0 else graph.cut_plan(branches=[graph.branches[-1].name])
        model = there_and_back(plan.apply(form="module"), tmp_path / str(step))
    assert len(model.depgraph_record["earlier"]) == 1  # type: ignore[arg-type, index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_picture_model_may_be_in_another_precision_than_when_it_was_cut(dtype: torch.dtype, tmp_path: Path) -> None:
    model, pixels = small_vit()
    graph = depgraph.trace(model, kwargs={"pixel_values": pixels})
    pruned = graph.cut_plan(branches=[graph.blocks[-1].name]).apply().to(dtype)
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "plain", report.why
    loaded = depgraph.load(tmp_path / "saved")
    assert torch.equal(loaded(pixels.to(dtype)).logits, pruned(pixels.to(dtype)).logits)


def test_weights_in_a_precision_of_their_own_keep_it_in_a_plain_folder(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    ids = torch.arange(8).reshape(2, 4)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    graph = depgraph.trace(transformers.T5ForConditionalGeneration(config).eval(), kwargs=inputs)
    pruned = graph.cut_plan(branches=["encoder.block.1"]).apply().half()
    whole = [module.float() for name, module in pruned.named_modules() if name.endswith(".wo")]
    for module in whole:  # as transformers loads them
        torch.nn.init.normal_(module.weight)
    assert depgraph.save(pruned, tmp_path / "saved").format == "plain"
    loaded = depgraph.load(tmp_path / "saved").state_dict()
    assert whole and all(torch.equal(tensor, loaded[name]) for name, tensor in pruned.state_dict().items())


@pytest.mark.ci
@pytest.mark.parametrize("forms", [("module", "module"), ("module", "graph"), ("graph", "graph")])
def test_two_cuts_are_made_again(forms: tuple[str, str], tmp_path: Path) -> None:
    example = ZOO["bert_classifier"]()
    once = cut(example, form=forms[0])
    twice = cut(example, once, form=forms[1])
    loaded = there_and_back(twice, tmp_path / "saved")
    assert len(loaded.depgraph_record["earlier"]) == 1
    assert_same(example, twice, loaded)


@pytest.mark.parametrize("name", ["multihead_attention", "tied_weights", "residual_cnn"])
def test_a_graph_form_is_cut_again_from_a_fresh_module(name: str, tmp_path: Path) -> None:
    example = MODULES[name]()
    pruned = cut(example, form="graph")
    for build in (lambda: MODULES[name]().model, lambda: MODULES[name]().model.to("meta")):
        loaded = there_and_back(pruned, tmp_path / f"saved{len(list(tmp_path.iterdir()))}", build)
        assert_same(example, pruned, loaded)


def test_a_loaded_model_can_be_traced_cut_and_saved_again(tmp_path: Path) -> None:
    example = ZOO["llama_8_4"]()
    loaded = there_and_back(cut(example), tmp_path / "first")
    again = cut(example, loaded)
    assert_same(example, again, there_and_back(again, tmp_path / "second"))


def test_train_and_eval_survive_part_by_part(tmp_path: Path) -> None:
    pruned = cut(MODULES["residual_cnn"]()).train()
    norm = next(name for name, m in pruned.named_modules() if isinstance(m, nn.BatchNorm2d))
    pruned.get_submodule(norm).eval()
    loaded = there_and_back(pruned, tmp_path / "saved", lambda: MODULES["residual_cnn"]().model)
    assert [n for n, m in loaded.named_modules() if not m.training] == [norm]


def test_an_untouched_module_is_saved_too(tmp_path: Path) -> None:
    example = MODULES["tied_weights"]()
    fresh = MODULES["tied_weights"]().model
    with torch.no_grad():
        fresh.embed.weight.zero_()
    loaded = there_and_back(example.model, tmp_path / "saved", lambda: fresh)
    assert loaded is fresh
    assert not hasattr(loaded, "depgraph_record")
    assert_same(example, example.model, loaded)


def test_the_config_is_the_one_from_before_the_cut(tmp_path: Path) -> None:
    example = ZOO["t5"]()
    before = json.loads(example.model.config.to_json_string(use_diff=False))
    pruned = cut(example)
    live = pruned.config.to_json_string(use_diff=False)
    assert depgraph.save(pruned, tmp_path / "saved").format == "depgraph"
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    sizes = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size")
    assert {k: after[k] for k in sizes} == {k: before[k] for k in sizes}
    assert pruned.config.to_json_string(use_diff=False) == live


def test_cut_rotary_pairs_are_never_saved_as_plain(tmp_path: Path) -> None:
    example = ZOO["qwen3"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    rotary = next(a for a in graph.axes if any("inv_freq" in m.target for m in a.members))
    width = {a.name: [1, 3] for a in graph.axes if "v_proj" in a.name and "within" in a.name}
    pruned = graph.cut_plan({rotary.name: [1], **width}).apply(form="module")
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "depgraph" and report.why
    assert_same(example, pruned, depgraph.load(tmp_path / "saved"))


def test_replace_lets_only_a_saved_model_go(tmp_path: Path) -> None:
    example = MODULES["mlp"]()
    there_and_back(example.model, tmp_path / "saved", lambda: MODULES["mlp"]().model)
    pruned = cut(example)
    depgraph.save(pruned, tmp_path / "saved", overwrite="replace")
    assert_same(example, pruned, depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no saved model"):
        depgraph.save(pruned, tmp_path / "mine", overwrite="replace")
    with pytest.raises(CheckpointError, match="overwrite='always'"):
        depgraph.save(pruned, tmp_path / "other", overwrite="always")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "saved"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_nothing_and_an_earlier_save_whole(tmp_path: Path) -> None:
    example = MODULES["mlp"]()
    with small_files(), pytest.raises(CheckpointError, match="can't be written"):
        depgraph.save(example.model, tmp_path / "new" / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_earlier_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = MODULES["mlp"]()
    depgraph.save(example.model, tmp_path / "saved")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depgraph.checkpoint.write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        depgraph.save(cut(example), tmp_path / "saved", overwrite="replace")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert_same(example, example.model, depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model))


def test_a_place_that_cannot_hold_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError):
            depgraph.save(MODULES["mlp"]().model, place)


def test_values_that_do_not_exist_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'0.weight' is on the meta device"):
        depgraph.save(MODULES["mlp"]().model.to("meta"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_is_named_and_left_as_it_was(tmp_path: Path) -> None:
    example = MODULES["residual_cnn"]()
    depgraph.save(cut(example), tmp_path / "saved")
    wrong = MODULES["residual_cnn"]().model
    name, parameter = next((n, p) for n, p in wrong.named_parameters() if p.ndim == 4)
    holder, last = wrong.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(holder, last, nn.Parameter(torch.zeros(parameter.shape[0] + 1, *parameter.shape[1:])))
    before = {n: (id(t), t.shape) for n, t in wrong.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError, match=name):
        depgraph.load(tmp_path / "saved", model=wrong)
    assert {n: (id(t), t.shape) for n, t in wrong.state_dict(keep_vars=True).items()} == before
    with pytest.raises(CheckpointError, match="model= must be a module"):
        depgraph.load(tmp_path / "saved", model=lambda: "a module")


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    depgraph.save(cut(MODULES["mlp"]()), tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "stranger": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="unexpected tensor 'stranger'"):
        depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model)
    save_file({n: t for n, t in tensors.items() if n != "0.weight"}, file)
    with pytest.raises(CheckpointError, match="lacks the tensor '0.weight'"):
        depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    depgraph.save(MODULES["mlp"]().model, tmp_path / "saved")
    (tmp_path / "saved" / "depgraph.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"depgraph\.json"):
        depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model)


def test_a_plain_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    report = depgraph.save(ZOO["qwen3"]().model, tmp_path / "saved")
    assert report.format == "plain", report.why
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="norm"):
        depgraph.load(tmp_path / "saved")


def test_a_plain_folder_keeps_flags_and_record(tmp_path: Path) -> None:
    example = ZOO["qwen3"]()
    example.model.model.norm.weight.requires_grad_(False)
    pruned = cut(example, scope="uniform")
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "plain", report.why
    loaded = depgraph.load(tmp_path / "saved")
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    assert recorded(loaded) == recorded(pruned) and not loaded.training
    assert_same(example, pruned, loaded)


def test_query_and_kv_heads_both_follow_in_a_plain_config(tmp_path: Path) -> None:
    """6 heads of 12 on 3 KV heads have the shapes of 8 heads of 9 on 4, which transformers would refuse."""
    example = ZOO["llama_8_4"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    kv_heads = {a.name: [2] for a in graph.axes if a.name.endswith("k_proj.weight:0/blocks") or a.size == 4}
    hidden = {a.name: range(8) for a in graph.axes if a.size == 56}
    pruned = graph.cut_plan({**kv_heads, **hidden}).apply(form="module")
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "plain", report.why
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    heads = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in heads] == [48, 6, 3, 12]
    assert_same(example, pruned, depgraph.load(tmp_path / "saved"))


def test_modules_that_a_forward_replaces_are_replaced_before_they_are_filled(tmp_path: Path) -> None:
    """A short input makes this one take another class of attention, for good."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BigBirdConfig(vocab_size=50, max_position_embeddings=64, **sizes)
    model, x = transformers.BigBirdModel(config).eval(), torch.arange(24).reshape(2, 12)
    model(x)
    graph = depgraph.trace(model, (x,))
    pruned = graph.plan(scores(graph), KEEP, scope="axis").apply()
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(loaded(x)[0], pruned(x)[0], atol=1e-6)


def test_a_lazy_module_is_initialised_before_it_is_filled(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 3)).eval()

    model, x = build(), torch.randn(2, 5)
    model(x)
    pruned = depgraph.trace(model, (x,)).cut_plan({"0.weight:0": [0, 2]}).apply()
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved", model=build)
    torch.testing.assert_close(loaded(x), pruned(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": 5},
        {"form": "other"},
        {"removed": 5},
        {"removed": [{"target": "inner.weight"}]},
        {"attributes": 5},
        {"inputs": None},
        {"earlier": 5},
        {"earlier": [{}]},
    ],
)
def test_a_record_with_a_damaged_cut_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    example = MODULES["residual_cnn"]()
    depgraph.save(cut(example), tmp_path / "saved")
    file = tmp_path / "saved" / "depgraph.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"record": data["record"] | changes}))
    with pytest.raises(CheckpointError, match=r"depgraph\.json is not the record of a saved model, or is damaged"):
        depgraph.load(tmp_path / "saved", model=example.model)
    file.write_text(json.dumps({name: entry for name, entry in data.items() if name != "record"}))
    with pytest.raises(CheckpointError, match=r"depgraph\.json is not the record"):
        depgraph.load(tmp_path / "saved", model=example.model)


@pytest.mark.parametrize("device", ["nowhere", "meta", 1.5])
def test_a_device_that_is_none_is_said(device: str, tmp_path: Path) -> None:
    depgraph.save(nn.Linear(2, 2), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="device"):
        depgraph.load(tmp_path / "saved", model=nn.Linear(2, 2), device=device)
    with pytest.raises(CheckpointError, match="a function that builds one, not int"):
        depgraph.load(tmp_path / "saved", model=5)  # type: ignore[arg-type]
