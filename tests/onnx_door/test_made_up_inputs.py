"""Inputs that nobody gave: sizes and numbers at which a file runs, and does what is meant."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import depgraph
from tests.onnx_door.building import loaded, model, node, value, weights


def _shape(proto: onnx.ModelProto, name: str) -> tuple[int, ...]:
    graph = depgraph.trace(loaded(proto))
    return tuple(graph.args[0][name].shape)


def test_images_whose_channels_come_last_are_as_large_as_others() -> None:
    """x [n, h, w, 3] -> [n, 3, h, w] -> convolutions whose windows don't fit three rows."""
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "a"),
        node("Conv", "a v", "b"),
        node("Transpose", "b", "y", perm=[0, 2, 3, 1]),
    ]
    proto = model(
        nodes,
        [value("x", ["n", "h", "k", 3])],
        [value("y", ["n", "p", "q", 4])],
        weights(w=(8, 3, 3, 3), v=(4, 8, 3, 3)),
    )
    batch, height, width, channels = _shape(proto, "x")
    assert (channels, height) == (3, width)
    assert min(height, width) >= 32


def test_a_number_that_is_compared_is_the_one_that_it_is_compared_with() -> None:
    """At a rate of 16000 a signal is weighed by w; at any other it is folded into rows of 100, which no made-up size fits."""
    one = helper.make_graph(
        [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "o")],
        "one", [], [value("o", ["n", 4])], weights(w=(6, 16), v=(16, 4)),
    )  # fmt: skip
    other = helper.make_graph(
        [node("Reshape", "x rows", "f"), node("MatMul", "f u", "e")], "other", [], [value("e", ["n", 4])],
        [*weights(u=(100, 4)), numpy_helper.from_array(np.array([-1, 100]), "rows")],
    )  # fmt: skip
    nodes = [
        node("Cast", "rate", "r64", to=TensorProto.INT64),
        node("Equal", "r64 sixteen", "known"),
        node("If", "known", "y", then_branch=one, else_branch=other),
    ]
    held = [numpy_helper.from_array(np.array(16000), "sixteen")]
    inputs = [value("x", ["n", 6]), value("rate", [], TensorProto.INT32)]
    graph = depgraph.trace(loaded(model(nodes, inputs, [value("y", ["n", 4])], held)))
    assert [axis.size for axis in graph.axes if axis.prunable.all()] == [16]


def test_the_batch_of_a_state_stands_behind_its_layers() -> None:
    """x [?, 4, ?] through a window of three steps, and a state [1, ?, 8] whose open dims have no names: the state's is the batch."""
    nodes = [
        node("Conv", "x k", "c"),
        node("Transpose", "c", "t", perm=[2, 0, 1]),
        node("GRU", "t w r - - h", "s z", hidden_size=8),
        node("Squeeze", "s one", "y"),
    ]
    held = [*weights(k=(4, 4, 3), w=(1, 24, 4), r=(1, 24, 8)), numpy_helper.from_array(np.array([1]), "one")]
    proto = model(nodes, [value("x", ["", 4, ""]), value("h", [1, "", 8])], [value("y", ["", "", 8])], held)
    assert _shape(proto, "h")[1] == _shape(proto, "x")[0]
