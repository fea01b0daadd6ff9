"""What a cut changes in a file, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import depgraph
import importance
from depgraph.cutting.report import CutReport
from depgraph.errors import NothingToPrune
from depgraph.onnx_door.saving import write
from depgraph.onnx_door.watching import watched
from tests.onnx_door.building import loaded, mlp, model, node, value, weights, whole


def _graph(proto: onnx.ModelProto, *args: Any) -> Any:
    return depgraph.trace(loaded(proto), *args, strict=True)


def _axis(graph: Any, member: str, dim: int) -> Any:
    """The axis that has a dim of a stored tensor among its members and may be narrowed."""
    found = [a for a in graph.axes if a.prunable.any() and any((m.target, m.dim) == (member, dim) for m in a.members)]
    assert len(found) == 1
    return found[0]


def _cut(graph: Any, member: str, dim: int, groups: Sequence[int]) -> onnx.ModelProto:
    """The checked file without these groups; it passes the checker and strict shape inference."""
    report = graph.cut_plan({_axis(graph, member, dim).name: groups}).apply_with_report()
    assert not report.check.vacuous
    proto = ir.to_proto(report.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return proto


def _held(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def _attributes(proto: onnx.ModelProto, kind: str) -> dict[str, Any]:
    (found,) = [n for n in proto.graph.node if n.op_type == kind]
    return {a.name: helper.get_attribute_value(a) for a in found.attribute}


def test_only_what_is_cut_changes(tmp_path: Path) -> None:
    proto = mlp()
    proto.producer_name, proto.doc_string, proto.graph.doc_string = "someone", "a note", "another"
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[0].name, proto.graph.node[0].doc_string = "first", "about it"
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    graph = depgraph.trace(path)
    write(graph.cut_plan({_axis(graph, "w", 0).name: [0, 3, 5]}).apply(), path)
    cut, before, kept = onnx.load(path), _held(proto), np.setdiff1d(np.arange(16), [0, 3, 5])
    after = _held(cut)
    np.testing.assert_array_equal(after["w"], before["w"][kept])
    np.testing.assert_array_equal(after["v"], before["v"][:, kept])
    np.testing.assert_array_equal(after["c"], before["c"])
    del cut.graph.initializer[:], proto.graph.initializer[:]
    assert cut == proto


def test_weights_that_nothing_cuts_are_those_of_the_original() -> None:
    source = loaded(mlp())
    graph = depgraph.trace(source)
    made = graph.cut_plan({_axis(graph, "w", 0).name: [1]}).apply()
    assert made.graph.initializers["c"].const_value is source.graph.initializers["c"].const_value
    assert source.graph.initializers["w"].shape == [16, 6]


def test_a_vector_that_two_layers_share_is_cloned_where_one_is_cut() -> None:
    nodes = [
        node("MatMul", "x w", "a"), node("Add", "a b", "h"), node("Relu", "h", "r"),
        node("MatMul", "r v", "c"), node("Add", "c b", "k"), node("Relu", "k", "s"), node("MatMul", "s u", "y"),
    ]  # fmt: skip
    held = weights(w=(6, 8), b=(8,), v=(8, 8), u=(8, 3))
    graph = _graph(model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], held))
    cut = _cut(graph, "w", 1, [2, 4])
    shapes = {name: array.shape for name, array in _held(cut).items()}
    assert shapes["w"] == (6, 6) and shapes["v"] == (6, 8)
    assert sorted(shapes[name] for name in shapes if name.startswith("b")) == [(6,), (8,)]
    both = graph.cut_plan({_axis(graph, "w", 1).name: [2], _axis(graph, "v", 1).name: [2]}).apply()
    assert len(both.graph.initializers) == 4


def test_split_sizes_slice_bounds_and_declared_shapes_follow() -> None:
    nodes = [
        node("MatMul", "x w", "h"), node("Split", "h sizes", "p q", axis=1),
        node("Slice", "q from to along", "r"), node("MatMul", "p v", "s"), node("MatMul", "r u", "t"), node("Add", "s t", "y"),
    ]  # fmt: skip
    held = [
        *weights(w=(6, 20), v=(8, 3), u=(7, 3)),
        whole("sizes", 8, 12),
        whole("from", 2),
        whole("to", 9),
        whole("along", 1),
    ]
    declared = [value("h", ["n", 20]), value("p", ["n", 8]), value("r", ["n", 7])]
    graph = _graph(model(nodes, [value("x", ["n", 6])], [value("y", ["n", 3])], held, values=declared))
    first, third = _axis(graph, "v", 0), _axis(graph, "u", 0)
    plan = graph.cut_plan({first.name: [0, 7], third.name: [0, 3, 4]})
    made = ir.to_proto(plan.apply())
    after = _held(made)
    assert after["sizes"].tolist() == [6, 9] and after["from"].tolist() == [2] and after["to"].tolist() == [6]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in made.graph.value_info}
    assert {name: shapes[name] for name in "hpr"} == {"h": ["n", 15], "p": ["n", 6], "r": ["n", 4]}
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_groups_and_hidden_sizes_follow() -> None:
    nodes = [
        node("Conv", "x w", "h"), node("Conv", "h d", "g", group=8, pads=[1, 1]), node("Relu", "g", "r"),
        node("Transpose", "r", "t", perm=[2, 0, 1]), node("LSTM", "t i k b", "o - -", hidden_size=5),
        node("Squeeze", "o one", "s"), node("MatMul", "s u", "y"),
    ]  # fmt: skip
    held = [*weights(w=(8, 4, 1), d=(8, 1, 3), i=(1, 20, 8), k=(1, 20, 5), b=(1, 40), u=(5, 3)), whole("one", 1)]
    graph = _graph(model(nodes, [value("x", [2, 4, 9])], [value("y", [9, 2, 3])], held))
    depthwise = _cut(graph, "w", 0, [1, 6])
    assert [a.i for n in depthwise.graph.node for a in n.attribute if a.name == "group"] == [6]
    assert _attributes(_cut(graph, "k", 2, [0, 4]), "LSTM")["hidden_size"] == 3


def test_sizes_that_are_computed_stay_computed() -> None:
    """[n, s, 24] -> heads of 6 by a shape made of the input's own sizes and two numbers."""
    nodes = [
        node("MatMul", "x w", "h"), node("Shape", "x", "all"), node("Slice", "all zero two", "lead"),
        node("Concat", "lead heads size", "into", axis=0), node("Reshape", "h into", "f"),
        node("Transpose", "f", "g", perm=[0, 2, 1, 3]), node("Relu", "g", "r"), node("Transpose", "r", "b", perm=[0, 2, 1, 3]),
        node("Concat", "lead minus", "back", axis=0), node("Reshape", "b back", "k"), node("MatMul", "k v", "y"),
    ]  # fmt: skip
    numbers = {"zero": 0, "two": 2, "heads": 4, "size": 6, "minus": -1}
    held = [*weights(w=(10, 24), v=(24, 3)), *(whole(name, n) for name, n in numbers.items())]
    proto = model(nodes, [value("x", ["n", "s", 10])], [value("y", ["n", "s", 3])], held)
    graph = _graph(proto)
    heads = next(a for a in graph.axes if a.size == 4)
    made = graph.cut_plan({heads.name: [1]}).apply()
    shorter = {"x": np.ones((1, 2, 10), np.float32)}
    again = depgraph.trace(made, shorter)
    assert [v.shape for v in again.capture.program.outputs.values()] == [(1, 2, 3)]
    y = again.observer().call(((), shorter))
    assert y.shape == (1, 2, 3)


def test_a_scale_that_is_computed_from_a_width_stays_what_it_was() -> None:
    nodes = [
        node("MatMul", "x q", "a"), node("MatMul", "x k", "b"), node("Transpose", "b", "t", perm=[0, 2, 1]),
        node("MatMul", "a t", "s"), node("Shape", "a", "sizes"), node("Gather", "sizes last", "width"),
        node("Cast", "width", "wide", to=TensorProto.FLOAT), node("Sqrt", "wide", "root"), node("Div", "s root", "d"),
        node("Softmax", "d", "p"), node("MatMul", "p x", "y"),
    ]  # fmt: skip
    last = numpy_helper.from_array(np.array(2), "last")
    graph = _graph(model(nodes, [value("x", [2, 5, 6])], [value("y", [2, 5, 6])], [*weights(q=(6, 8), k=(6, 8)), last]))
    assert _held(_cut(graph, "q", 1, [0, 1, 2]))["q"].shape == (6, 5)


def test_constants_are_weights_and_old_files_list_initializers_among_inputs() -> None:
    held = weights(w=(16, 6), v=(3, 16), c=(3,))
    constant = helper.make_node("Constant", [], ["w"], value=held[0])
    nodes = [
        constant,
        node("Gemm", "x w b", "h", transB=1),
        node("Relu", "h", "r"),
        node("Gemm", "r v c", "y", transB=1),
    ]
    stored = [*held[1:], *weights(b=(16,))]
    listed = [value("x", [2, 6]), *(value(t.name, list(t.dims)) for t in stored)]
    graph = _graph(model(nodes, listed, [value("y", [2, 3])], stored, opset=8, ir_version=3))
    cut = _cut(graph, "w", 0, [0, 9])
    assert list(cut.graph.node[0].attribute[0].t.dims) == [14, 6]
    assert {i.name: i.type.tensor_type.shape.dim[-1].dim_value for i in cut.graph.input} == {
        "x": 6,
        "v": 14,
        "c": 3,
        "b": 14,
    }


def test_quantised_weights_are_cut_between_their_scales() -> None:
    numbers = np.random.default_rng(0).integers(-100, 100, (16, 6)).astype(np.int8)
    held = [
        numpy_helper.from_array(numbers, "w"), numpy_helper.from_array(np.linspace(0.01, 0.02, 16, dtype=np.float32), "scale"),
        numpy_helper.from_array(np.zeros(16, np.int8), "zero"), *weights(v=(3, 16)),
        numpy_helper.from_array(np.array(0.05, np.float32), "step"), numpy_helper.from_array(np.array(3, np.uint8), "point"),
    ]  # fmt: skip
    nodes = [
        node("DequantizeLinear", "w scale zero", "f", axis=0), node("Gemm", "x f", "h", transB=1), node("Relu", "h", "r"),
        node("QuantizeLinear", "r step point", "i"), node("DequantizeLinear", "i step point", "o"),
        node("Gemm", "o v", "y", transB=1),
    ]  # fmt: skip
    cut = _cut(_graph(model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], held)), "w", 0, [1, 2, 3])
    after = _held(cut)
    assert (after["w"].shape, after["scale"].shape, after["zero"].shape) == ((13, 6), (13,), (13,))


def test_groups_of_a_quantised_convolution_follow() -> None:
    """Its zero point comes from the data: nothing that a cut would have to know."""
    generator = np.random.default_rng(0)
    held = [
        *weights(w=(8, 3, 1, 1), v=(4, 8, 1, 1)),
        numpy_helper.from_array(generator.integers(-100, 100, (8, 1, 3, 3)).astype(np.int8), "d"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"), numpy_helper.from_array(np.array(0.01, np.float32), "step"),
    ]  # fmt: skip
    nodes = [
        node("Conv", "x w", "h"), node("DynamicQuantizeLinear", "h", "q scale point"),
        node("ConvInteger", "q d point zero", "i", group=8, pads=[1, 1, 1, 1]), node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "scale step", "both"), node("Mul", "f both", "o"), node("Conv", "o v", "y"),
    ]  # fmt: skip
    graph = _graph(model(nodes, [value("x", [1, 3, 8, 8])], [value("y", [1, 4, 8, 8])], held))
    cut = _cut(graph, "w", 0, [1, 2, 3])
    assert _held(cut)["d"].shape == (5, 1, 3, 3)
    assert next(n for n in cut.graph.node if n.op_type == "ConvInteger").attribute[0].i == 5


def test_a_large_file_is_written_beside_its_data_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    graph = depgraph.trace(path)
    made = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5)).apply()
    files = write(made, path)
    assert [f.name for f in files] == ["model.onnx", "model.onnx.data"] and len(list(tmp_path.iterdir())) == 2
    again = depgraph.trace(path)
    assert again.dense_cost.params <= 0.5 * graph.dense_cost.params
    with pytest.raises(depgraph.errors.CheckpointError, match="exists"):
        depgraph.save(made, path)


def test_a_state_that_is_input_and_output_is_cut_where_that_is_allowed() -> None:
    """An LSTM whose state goes in and comes out: its size is a custom, which names of inputs and outputs lift."""
    nodes = [
        node("LSTM", "x i k b - h c", "o hn cn", hidden_size=8),
        node("Squeeze", "o one", "s"),
        node("MatMul", "s u", "y"),
    ]
    held = [*weights(i=(1, 32, 5), k=(1, 32, 8), b=(1, 64), u=(8, 3)), whole("one", 1)]
    state = [1, 2, 8]
    inputs = [value("x", [4, 2, 5]), value("h", state), value("c", state)]
    made = model(nodes, inputs, [value("y", [4, 2, 3]), value("hn", state), value("cn", state)], held)
    with pytest.raises(NothingToPrune, match=r"free=\['input 0'\] or .* or free=\['input 1', 'input 2'\]"):
        depgraph.trace(loaded(made)).plan(importance.Random(0), depgraph.Target(params=0.5))
    graph = depgraph.trace(loaded(made), free=["input 1", "input 2"])
    report = graph.cut_plan({_axis(graph, "u", 0).name: [1, 2, 6]}).apply_with_report()
    assert not report.check.vacuous and "input 1 (h) now has shape (1, 2, 5), it had (1, 2, 8)" in report.notes
    proto = ir.to_proto(report.model)
    onnx.checker.check_model(proto, full_check=True)
    assert _attributes(proto, "LSTM")["hidden_size"] == 5
    assert [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input[1:]] == [[1, 2, 5]] * 2


def test_what_comes_into_an_empty_choice_is_compared() -> None:
    """No score reaches 0.999 here, so that the output is empty, whatever becomes of scores and boxes."""
    nodes = [
        node("MatMul", "x a", "h"), node("Relu", "h", "r"), node("MatMul", "r s", "t"), node("Sigmoid", "t", "p"),
        node("Greater", "p high", "m"), node("NonZero", "m", "z"), node("Slice", "z zero one", "i"), node("Squeeze", "i zero", "j"),
        node("MatMul", "x b", "g"), node("Tanh", "g", "q"), node("MatMul", "q c", "boxes"), node("Gather", "boxes j", "y"),
    ]  # fmt: skip
    held = [*weights(a=(6, 8), s=(8, 1), b=(6, 10), c=(10, 4)), whole("zero", 0), whole("one", 1)]
    held.append(onnx.numpy_helper.from_array(np.array(0.999, np.float32), "high"))
    graph = depgraph.trace(loaded(model(nodes, [value("x", [5, 6])], [value("y", ["n", 4])], held)))
    boxes = next(axis.name for axis in graph.axes if axis.size == 10)
    check = graph.cut_plan({boxes: [1, 4]}).apply_with_report().check
    assert check.error < 1e-5 < check.sensitivity


def test_a_file_that_is_written_a_tensor_at_a_time_is_what_protobuf_writes(tmp_path: Path) -> None:
    held = weights(w=(40, 30), b=(40,), large=(30, 40))
    held[2].ClearField("raw_data")
    held[2].float_data.extend(np.arange(1200, dtype=np.float32))
    held += [
        helper.make_tensor("words", TensorProto.STRING, [2], ["a", "b"]),
        helper.make_tensor("packed", TensorProto.INT4, [3000], [k % 7 for k in range(3000)]),
        numpy_helper.from_array(np.arange(900, dtype=np.float16), "half"),
        numpy_helper.from_array(np.arange(4000) % 3 == 0, "truth"),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "none"),
    ]
    held[0].doc_string = "of the first layer"
    nodes = [node("Gemm", "x w b", "h", transB=1), node("Gemm", "h large", "y", transB=1)]
    made = loaded(model(nodes, [value("x", ["n", 30])], [value("y", ["n", 30])], held))
    made.graph.initializers["w"].const_value.metadata_props["note"] = "kept"
    expected = ir.to_proto(made)
    write(made, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == expected
    assert ir.to_proto(made) == expected


def test_a_file_that_makes_much_of_rounding_is_not_held_to_less_than_that() -> None:
    """Four sines of nine times their input turn a digit in the seventh place into one in the third."""
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "z0")]
    for k in range(4):
        nodes += [node("Mul", f"z{k} much", f"m{k}"), node("Sin", f"m{k}", f"z{k + 1}")]
    nodes.append(node("MatMul", "z4 c", "y"))
    held = [*weights(a=(64, 512), b=(512, 8), c=(8, 3)), numpy_helper.from_array(np.array(9, np.float32), "much")]
    graph = depgraph.trace(loaded(model(nodes, [value("x", [40, 64])], [value("y", [40, 3])], held)))
    check = graph.plan(importance.Random(0), depgraph.Target(params=0.7)).apply_with_report().check
    assert 1e-4 < check.error <= check.tolerance <= 1e-2
    assert not check.vacuous


def test_an_output_that_another_is_computed_from_may_become_narrower_under_a_name_of_its_own() -> None:
    """h = x W is handed on as the output "hidden"; y = h V."""
    nodes = [node("MatMul", "x w", "h"), node("Identity", "h", "hidden"), node("MatMul", "h v", "y")]
    outputs = [value("y", [2, 3]), value("hidden", [2, 16])]
    graph = _graph(model(nodes, [value("x", [2, 6])], outputs, weights(w=(6, 16), v=(16, 3))))
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()
    assert report.notes == (
        "output 1 now has shape (2, 11), it had (2, 16) (keep it with trace(..., fixed=['output 1']))",
    )


def _counted(*more: onnx.NodeProto, outputs: list[onnx.ValueInfoProto], held: list[onnx.TensorProto]) -> Any:
    """h = relu(x W) of 16 channels, s = h V; how many of s are above zero, other weights would say otherwise."""
    nodes = [
        node("MatMul", "x w", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r v", "s"),
        node("Greater", "s zero", "m"),
        *more,
    ]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    return _graph(model(nodes, [value("x", [40, 6])], outputs, [*weights(w=(6, 16), v=(16, 1)), zero, *held]))


def _halved(graph: Any) -> CutReport:
    (axis,) = (a for a in graph.axes if a.size == 16)
    return graph.cut_plan({axis.name: range(8)}).apply_with_report()


def test_a_size_that_the_data_say_may_be_another_after_the_cut() -> None:
    nodes = [
        node("Cast", "m", "f", to=TensorProto.FLOAT), node("ReduceSum", "f", "n", keepdims=0),
        node("Cast", "n", "i", to=TensorProto.INT64), node("Reshape", "i one", "k"), node("Slice", "h start k start", "t"),
        node("MatMul", "t u", "y"),
    ]  # fmt: skip
    held = [*weights(u=(16, 3)), whole("one", 1), whole("start", 0)]
    check = _halved(_counted(*nodes, outputs=[value("y", ["k", 3])], held=held)).check
    assert check.error < 1e-5 and 0 < check.sensitivity < float("inf")


def test_what_a_body_reads_of_a_choice_is_not_compared() -> None:
    """Rows that are chosen go into a body's softmax: another choice, by a rounding error, were another number of rows."""
    body = helper.make_graph([node("Softmax", "g", "p"), node("Neg", "p", "b")], "body", [], [value("b", ["k", 3])])
    other = helper.make_graph([node("Identity", "g", "q")], "other", [], [value("q", ["k", 3])])
    nodes = [
        node("NonZero", "m", "z"), node("Slice", "z start one start", "i"), node("Squeeze", "i start", "j"),
        node("Gather", "h j", "t"), node("MatMul", "t u", "g"), node("Size", "j", "n"), node("Greater", "n few", "some"),
        node("If", "some", "y", then_branch=body, else_branch=other),
    ]  # fmt: skip
    held = [*weights(u=(16, 3)), whole("one", 1), whole("start", 0), numpy_helper.from_array(np.array(0), "few")]
    graph = _counted(*nodes, outputs=[value("y", ["k", 3])], held=held)
    assert set(watched(graph.model)) == {"h", "s"}
    check = _halved(graph).check
    assert check.error < 1e-5 and not check.vacuous


def test_a_layer_of_which_only_the_last_state_is_taken_keeps_saying_how_many_units_it_has() -> None:
    nodes = [
        node("GRU", "x i k", "- h", hidden_size=8), node("Squeeze", "h first", "s"), node("MatMul", "s w", "y"),
    ]  # fmt: skip
    held = [*weights(i=(1, 24, 6), k=(1, 24, 8), w=(8, 3)), whole("first", 0)]
    graph = _graph(model(nodes, [value("x", [5, 2, 6])], [value("y", [2, 3])], held))
    (axis,) = (a for a in graph.axes if a.size == 8)
    report = graph.cut_plan({axis.name: [1, 2, 5]}).apply_with_report()
    assert report.check.error < 1e-5 < report.check.sensitivity
