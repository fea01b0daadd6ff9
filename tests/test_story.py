"""The report of a pruning: what it says of layers, axes and blocks, its page, and its JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depgraph
import importance
from depgraph.errors import CheckpointError
from depgraph.layers import Anatomy
from depgraph.story import (
    Curve,
    MadeFile,
    Making,
    Quality,
    Sensitivity,
    Story,
    Timing,
    TradeOff,
    Trial,
    story_page,
    tell,
    versions,
    write_story,
)
from depgraph.story.svg import apart, plot, scale, strip

from .onnx_door.building import loaded, mlp
from .test_page import Reader, graph_of


def llama(layers: int = 4) -> depgraph.DependencyGraph:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return depgraph.trace(LlamaForCausalLM(config).eval(), (), {"input_ids": torch.randint(0, 40, (2, 6))})


@pytest.fixture(scope="module")
def told() -> Story:
    graph = llama()
    scores = importance.Magnitude()(graph)
    plan = graph.plan(scores, depgraph.Target(params=0.7)).with_branches("model.layers.2", "model.layers.1.mlp")
    return tell(plan, plan.apply_with_report(), scores)


@pytest.fixture(scope="module")
def full(told: Story) -> Story:
    """A story with every part."""
    trials = (Trial("obs", 0.5, 9.0), Trial("best", 0.5, 8.0, True), Trial("best", 0.8, 6.0, True))
    curves = tuple(Curve(axis.name, (0.25, 0.5), (0.1, None)) for axis in told.axes)
    return told.with_(
        quality=(Quality("perplexity", 5.0, 6.0, data="held-out <text>"),),
        sensitivity=Sensitivity(3.5, 2, curves),
        tradeoff=TradeOff("params", "perplexity", trials, dense=5.0, chosen=1),
        timings=(Timing("model.onnx", "predicted", 20.0, 10.0), Timing("model.onnx", "measured", 20.0, 8.0)),
        files=(MadeFile("model.onnx", "float32", 50, 200),),
        making=Making("depgraph build M", "best", "params=0.7", {"scope": "global"}, {"text": 3}, versions(), "today"),
        notes=("a note & more",),
    )


def size_of(anatomy: Anatomy, dim: int | None) -> int | None:
    return None if dim is None else anatomy.size(dim)


def test_layers_have_the_widths_of_the_pruned_model() -> None:
    graph = llama()
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    report = plan.apply_with_report()
    cut = Anatomy(depgraph.trace(report.model, (), graph.kwargs))
    story = tell(plan, report)
    found = [(y.name, y.out and y.out[1], y.into and y.into[1], y.params[1]) for y in story.layers]
    assert found == [(y.name, size_of(cut, y.out), size_of(cut, y.into), y.params) for y in cut.layers]
    assert all(y.out is None or y.out[0] == y.out[1] for y in story.layers if y.out_family is None)


def test_what_was_left_out_is_gone_and_nothing_else(told: Story) -> None:
    gone = {layer.name for layer in told.layers if layer.gone}
    assert gone == {y.name for y in told.layers if y.name.startswith(("model.layers.2.", "model.layers.1.mlp."))}
    assert {part.name for part in told.dropped if part.gone} == {"model.layers.2", "model.layers.1.mlp"}
    assert all(y.params[1] == 0 for y in told.layers if y.gone)
    assert sum(y.params[1] for y in told.layers) <= told.after.params


def test_axes_say_which_groups_went_and_what_they_scored() -> None:
    graph = llama()
    scores = importance.Magnitude()(graph)
    plan = graph.plan(scores, depgraph.Target(params=0.6))
    for axis in tell(plan, None, scores).axes:
        gone = set(plan.removal.get(axis.name, ()))
        assert axis.removed == len(gone)
        assert axis.map == tuple(float(k in gone) for k in range(axis.groups))
        assert list(axis.scores) == pytest.approx(sorted(scores[axis.name]), rel=1e-5)
        assert sum(axis.gone) == len(gone)
    assert all(not axis.scores for axis in tell(plan).axes)


def test_a_wide_axis_is_told_in_few_numbers() -> None:
    graph = depgraph.trace(torch.nn.Sequential(torch.nn.Linear(3, 1000), torch.nn.Linear(1000, 2)), torch.ones(1, 3))
    (axis,) = tell(graph.cut_plan({graph.axes[0].name: range(500)}), None, {graph.axes[0].name: range(1000)}).axes
    assert len(axis.map) == len(axis.scores) == 64
    assert (axis.map[0], axis.map[-1]) == (1.0, 0.0)
    assert list(axis.scores) == sorted(axis.scores)


def test_json_gives_the_same_story_back(full: Story, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(full.to_json(), allow_nan=False))
    assert Story.load(path) == full


def test_numbers_that_are_not_finite_become_none(full: Story) -> None:
    diverged = full.with_(quality=(Quality("perplexity", 5.0, float("inf")),))
    again = Story.from_json(json.loads(json.dumps(diverged.to_json(), allow_nan=False)))
    assert again.quality[0].after is None
    assert "5.000 → –" in story_page(again)


def test_the_page_and_its_data_are_written_side_by_side(full: Story, tmp_path: Path) -> None:
    page, data = write_story(full, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([page, data])
    assert page.read_text() == story_page(full) and Story.load(data) == full
    with pytest.raises(CheckpointError, match="nowhere"):
        write_story(full, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "broken", [{}, {"format": 99}, {"format": 1}, [], {"format": 1, "model": "x", "before": 3, "after": 4}]
)
def test_what_is_no_report_is_refused_in_a_sentence(broken: object, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match="not a report"):
        Story.load(path)


def test_wrong_and_unknown_parts_are_named(full: Story) -> None:
    with pytest.raises(CheckpointError, match="'poem'"):
        Story.from_json({**full.to_json(), "poem": 1})
    with pytest.raises(CheckpointError, match="'three' stands where str belongs|stands where"):
        Story.from_json({**full.to_json(), "model": 3})


def test_the_page_is_alone_and_has_every_part(full: Story) -> None:
    text = story_page(full)
    page = Reader(text)
    assert text.startswith("<!DOCTYPE html>") and "{{" not in text
    assert not re.search(r"https?:|url\(|@import|<script", text)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    links = [attributes["href"].removeprefix("#") for tag, attributes in page.found if tag == "a"]
    assert links == ids == [
        "tradeoff", "latency", "widths", "map", "scores", "sensitivity", "check", "files", "making", "notes",
    ]  # fmt: skip
    assert len(page.of_class("layer")) == len(full.layers)
    assert sum("gone" in e["class"].split() for e in page.of_class("layer")) == sum(y.gone for y in full.layers)
    assert "held-out &lt;text&gt;" in text and "a note &amp; more" in text
    assert "the speed-up predicted is 20.0% less than that measured" in text
    assert "<b>25.0%</b> of the bytes of model.onnx" in text and "200 → 50" in text
    assert full.check is not None and str(full.check) in text


def test_an_empty_story_has_a_page_without_sections(told: Story) -> None:
    page = Reader(story_page(Story("Model", told.before, told.before)))
    assert not [e for tag, e in page.found if tag == "section"]
    assert any("100.0%" in text for text in page.texts)


def test_a_vacuous_check_is_said_in_words(full: Story) -> None:
    assert full.check is not None
    vacuous = replace(full.check, error=1e-3, sensitivity=1e-3)
    assert "says nothing" in story_page(full.with_(check=vacuous))


@pytest.mark.parametrize("name", ["swin", "residual_cnn", "dense_net", "gpt2", "channel_shuffle"])
def test_pages_of_other_models_are_whole(name: str) -> None:
    graph = graph_of(name)
    scores = importance.Magnitude()(graph)
    story = tell(graph.plan(scores, depgraph.Target(params=0.7), scope="axis"), None, scores)
    assert len(Reader(story_page(story)).of_class("layer")) == len(story.layers)


def test_the_map_has_a_row_for_each_block_and_a_strip_for_each_axis_that_lost_some(told: Story) -> None:
    page = Reader(
        story_page(told).partition('id="map"')[2].join(("<main><section>", "")).partition("</section>")[0]
        + "</section></main>"
    )
    kinds = {axis.family for axis in told.axes if axis.removed}
    assert len(page.of_class("strip")) == sum(axis.family in kinds for axis in told.axes)
    assert [e for e in page.of_class("left") if "chip" in e["class"]]
    names = [text.strip() for text in page.texts]
    assert any("left out" in name for name in names)


def test_a_file_has_a_story_too() -> None:
    graph = depgraph.trace(loaded(mlp()))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    story = tell(plan, plan.apply_with_report())
    assert story.after.params < story.before.params and any(y.out and y.out[1] < y.out[0] for y in story.layers)
    assert len(Reader(story_page(story)).of_class("layer")) == len(story.layers)
    assert Story.from_json(story.to_json()) == story


def test_scales_have_round_ticks_within_and_survive_a_single_value() -> None:
    assert scale([0.03, 0.97], 0, 100).ticks() == pytest.approx([0.25, 0.5, 0.75])
    assert scale([0.5, 2000], 0, 100, log=True).ticks() == pytest.approx([1, 10, 100, 1000])
    for value in (0.0, 5.0, -3.0, 1e-12):
        single = scale([value, value], 0, 100)
        assert single(value) == pytest.approx(50) and 1 <= len(single.ticks()) <= 6
    assert Reader(plot([], ("x", "y")).text())


def test_numbers_beside_each_other_are_told_apart() -> None:
    assert apart([401.0, 401.5, 402.0]) == ["401", "401.5", "402"]
    assert apart([12000.0, 12001.0]) == ["12000", "12001"]
    assert apart([0.0, 1500.0]) == ["0", "1.5k"]


def test_a_strip_joins_equal_cells() -> None:
    assert strip([0.0] * 40).count("M") == 1
    assert 'class="k4" d="M1 0h2v1h-2z"' in strip([0, 1, 1, 0] * 1)
