"""Large tensors of a file stay in it until they are asked for, and are then what they were."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import depgraph
import importance
from depgraph.errors import CaptureError, CheckpointError
from depgraph.onnx_door.loading import load
from depgraph.onnx_door.reading import read
from depgraph.onnx_door.saving import write
from tests.onnx_door.building import model, node, value, weights

_WIDE = (40, 50)


def _mlp(width: int = 64) -> onnx.ModelProto:
    """x [n, 32] -> hidden -> y [n, 32]."""
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "y")]
    held = weights(a=(32, width), b=(width, 32))
    return model(nodes, [value("x", ["n", 32])], [value("y", ["n", 32])], held)


def _of_all_kinds() -> onnx.ModelProto:
    """Large tensors as initializers, in Constants, in a body, in a function; of all ways of being stored."""
    held = weights(w=_WIDE, listed=_WIDE)
    held[1].ClearField("raw_data")
    held[1].float_data.extend(np.arange(2000, dtype=np.float32))
    held[0].doc_string = "of the first layer"
    held[0].metadata_props.add(key="note", value="kept")
    held += [
        helper.make_tensor("packed", TensorProto.INT4, [9001], bytes(k % 100 for k in range(4501)), raw=True),
        numpy_helper.from_array(np.ones(4000, helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)), "brain"),
        numpy_helper.from_array(np.arange(8000) % 3 == 0, "truth"),
        helper.make_tensor("words", TensorProto.STRING, [3], ["a" * 3000, "b" * 3000, "c"]),
    ]
    (inner, constant) = (numpy_helper.from_array(np.full(_WIDE, k, np.float32), f"held {k}") for k in (1, 2))
    body = helper.make_graph([node("Add", "x within", "z")], "body", [], [value("z", _WIDE)], [inner])
    inner.name = "within"
    body.initializer[0].name = "within"
    nodes = [
        node("Constant", "", "c", value=constant),
        node("If", "flag", "s", then_branch=body, else_branch=body),
        node("Own", "s", "t", domain="mine"),
        node("Add", "t c", "u"),
        node("Add", "u w", "y"),
    ]
    made = model(nodes, [value("x", _WIDE), value("flag", [], TensorProto.BOOL)], [value("y", _WIDE)], held)
    own = [node("Constant", "", "k", value=constant), node("Mul", "a k", "b")]
    made.functions.append(helper.make_function("mine", "Own", ["a"], ["b"], own, [helper.make_opsetid("", 17)]))
    return made


def test_what_is_read_later_is_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_of_all_kinds(), path)
    _, found = read(path)
    made, expected = ir.to_proto(found), onnx.load(path)
    assert [*made.graph.initializer] == [*expected.graph.initializer]
    assert [*made.graph.node] == [*ir.to_proto(ir.from_proto(expected)).graph.node]
    assert [*made.functions] == [*expected.functions] != []
    read_late = [v.const_value for v in found.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    assert {tensor.name for tensor in read_late} == {"w", "packed", "brain", "truth"}


def test_a_file_can_be_replaced_by_what_was_made_of_it(tmp_path: Path) -> None:
    """What was traced is of the file that was there."""
    path = tmp_path / "model.onnx"
    onnx.save(_mlp(), path)
    graph = depgraph.trace(path)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(macs=0.5))
    first = ir.to_proto(plan.apply()).graph.initializer
    write(plan.apply(), path)
    assert [*ir.to_proto(plan.apply()).graph.initializer] == [*first] == [*onnx.load(path).graph.initializer]


def test_a_file_that_was_written_into_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_mlp(), path)
    graph = depgraph.trace(path)
    onnx.save(_mlp(48), path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.onnx has been written to since it was read: trace it again"):
        graph.plan(importance.Magnitude(), depgraph.Target(macs=0.5))


def test_a_file_without_its_end_and_one_with_too_few_numbers_are_refused(tmp_path: Path) -> None:
    path, proto = tmp_path / "model.onnx", _mlp()
    path.write_bytes(proto.SerializeToString()[:-3000])
    with pytest.raises(CaptureError, match="can't be read as an ONNX file"):
        load(path)
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-8]
    onnx.save(proto, path)
    with pytest.raises(CaptureError, match="'a' of shape .* has 8184 bytes of data, not 8192"):
        load(path)


@pytest.mark.filterwarnings("ignore:The onnxtxt format is experimental")
def test_a_text_file_of_a_model_is_read_too(tmp_path: Path) -> None:
    onnx.save(_mlp(), tmp_path / "model.onnxtxt", format="onnxtxt")
    assert len(depgraph.trace(tmp_path / "model.onnxtxt").axes) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a stretch")
def test_weights_are_not_held_for_the_graph(tmp_path: Path) -> None:
    path, names = tmp_path / "model.onnx", [f"w{k}" for k in range(16)]
    nodes = [node("MatMul", f"h{k} w{k}", f"h{k + 1}") for k in range(16)]
    held = [numpy_helper.from_array(np.ones((1024, 1024), np.float32), name) for name in names]
    onnx.save(model(nodes, [value("h0", [1, 1024])], [value("h16", [1, 1024])], held), path)
    del held
    _trace_small(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    graph = depgraph.trace(path)
    assert _peak() - before < 16 and len(graph.tensors()) == 16


def _trace_small(folder: Path) -> None:
    onnx.save(_mlp(), folder / "small.onnx")
    depgraph.trace(folder / "small.onnx")


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")
def test_processes_that_share_a_file_read_what_it_holds(tmp_path: Path) -> None:
    path, names = tmp_path / "model.onnx", [f"w{k}" for k in range(4)]
    nodes = [node("MatMul", f"h{k} w{k}", f"h{k + 1}") for k in range(4)]
    held = [numpy_helper.from_array(np.full((64, 64), k, np.float32), name) for k, name in enumerate(names)]
    onnx.save(model(nodes, [value("h0", [1, 64])], [value("h4", [1, 64])], held), path)
    tensors = [v.const_value for v in load(path)[0].graph.initializers.values()]
    child = os.fork()
    wrong = sum(not (t.numpy() == k).all() for _ in range(300) for k, t in enumerate(tensors))
    if not child:
        os._exit(min(wrong, 1))
    assert (wrong, os.waitpid(child, 0)[1]) == (0, 0)
