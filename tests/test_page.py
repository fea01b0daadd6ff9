"""The page that shows a model: whole, alone, and with every layer and axis in it once."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import depgraph
from depgraph.layers import Anatomy

from .test_decisions import Masked
from .zoo import MODULES, ZOO

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Reads a page and notes its elements, with their attributes and texts; raises AssertionError where tags don't match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = [""]
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is given twice"
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.found if name in attributes.get("class", "").split()]


def graph_of(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


@pytest.mark.parametrize(
    "name", ["llama_8_4", "gpt2", "swin", "residual_cnn", "dense_net", "channel_shuffle", "tied_weights"]
)
def test_every_axis_and_layer_is_on_the_page_once(name: str) -> None:
    graph = graph_of(name)
    page = Reader(graph.html())
    assert sorted(e["id"] for e in page.of_class("axis")) == sorted(f"a{k}" for k in range(len(graph.axes)))
    shown = [e["title"].partition(":")[0] for e in page.of_class("layer")]
    assert shown == [layer.name for layer in Anatomy(graph).layers]
    assert {e["data-a"] for tag, e in page.found if tag == "i"} == {str(k) for k in range(len(graph.axes))}


def test_the_page_is_alone_and_says_what_the_model_costs() -> None:
    graph = graph_of("llama_8_4")
    text = graph.html()
    page = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//\w|url\(|@import", text.partition("<script>")[0])
    assert not re.search(r"https?:|fetch|import|XMLHttp", text.partition("<script>")[2])
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.found)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert f"<b>{graph.dense_cost.params:,}</b> parameters" in text
    assert "{{" not in text


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    model, odd = nn.Sequential(), '<b title="x">&\'{{picture}}'
    model.add_module("in", nn.Linear(6, 8))
    model.add_module(odd, nn.Linear(8, 4))
    page = Reader(depgraph.trace(model, torch.randn(2, 6)).html())
    assert [e["title"].partition(": linear")[0] for e in page.of_class("layer")] == ["in", odd]
    assert odd in page.texts
    assert not any(attributes.get("title") == "x" for _, attributes in page.found)


def test_bars_say_which_part_of_a_width_an_axis_has() -> None:
    graph = graph_of("dense_net")
    page = Reader(graph.html())
    widths = [float(e["style"].partition("width:")[2].rstrip("%")) for e in page.of_class("bar") if "style" in e]
    assert max(widths) == 100
    parts = [e["style"] for tag, e in page.found if tag == "i" and "left" in e.get("style", "")]
    assert "left:0%;width:58.33%" in parts  # 14 channels of the stem beside 10 that were added
    assert "left:58.33%;width:41.67%" in parts


def test_a_model_without_axes_has_a_page_too() -> None:
    page = Reader(depgraph.trace(nn.Linear(6, 4), torch.randn(2, 6)).html())
    assert [bar["data-why"].partition(":")[0] for bar in page.of_class("bar")] == ["outputs", "inputs"]
    assert not page.of_class("axis")


def test_how_a_model_was_captured_is_on_the_page() -> None:
    graph = depgraph.trace(Masked().eval(), torch.randn(9, 6))
    assert graph.note and any(f"{graph.note}." in text for text in Reader(graph.html()).texts)
    assert "captured on" not in graph_of("mlp").html()


def test_a_deep_model_has_a_light_page_with_alike_blocks_folded() -> None:
    width, depth = 16, 48
    block = lambda: nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, width))  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(depth))})

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.begin, self.inner, self.end = nn.Linear(5, width), model, nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.begin(x)
            for each in self.inner["blocks"]:
                x = x + each(x)
            return self.end(x)

    text = depgraph.trace(Deep(), torch.randn(2, 5)).html()
    details = [attributes for tag, attributes in Reader(text).found if tag == "details"]
    assert sum("open" in attributes for attributes in details) == 1
    assert len(details) == depth + 1  # the blocks, and their family of axes
    assert "×48" in text
    assert len(text.encode()) < 500_000
