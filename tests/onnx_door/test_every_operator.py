"""Every case that ONNX has for its operators, in the middle of a small network: what may be cut there is cut right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import depgraph
from depgraph.errors import CaptureError, CheckError, CutError

pytestmark = pytest.mark.slow
PARTS = 8
REFUSED = {
    "test_shape": "the output is a size",
    "test_size": "the output is a size",
    "test_onehot": "the two values of OneHot are computed",
    "test_resize": "scales and regions are computed",
    "test_upsample": "scales are computed",
    "test_scan_sum": "a Scan of operator set 8",
    "test_training_dropout": "it draws random numbers",
    "test_stft": "onnx takes one-sided for two-sided where that isn't said",
}
"""Beginnings of the names of cases of which a cut may be refused, by the check too, and why."""


class Around:
    """A case's operator whose tensors are mixed along each of their dims before, and along those of what it makes behind."""

    def __init__(self, case: Any) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        self.given: dict[str, np.ndarray] = {}
        inputs, outputs = ([np.asarray(a) for a in arrays] for arrays in case.data_sets[0])
        graph, names = case.model.graph, dict[str, str]()
        for k, (value, array) in enumerate(zip(graph.input, inputs, strict=True)):
            names[value.name] = self._taken(f"in{k}", array)
        for node in graph.node:
            own = onnx.NodeProto()
            own.CopyFrom(node)
            del own.input[:]
            own.input.extend(names.get(name, name) for name in node.input)
            self.nodes.append(own)
        declared = [self._given(k, v.name, a) for k, (v, a) in enumerate(zip(graph.output, outputs, strict=True))]
        taken = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in self.given.items()]
        built = helper.make_graph(self.nodes, "around", taken, declared, self.held)
        self.model = helper.make_model(
            built, opset_imports=case.model.opset_import, ir_version=min(case.model.ir_version, 10)
        )

    def _taken(self, name: str, array: np.ndarray) -> str:
        if array.dtype != np.float32 or not array.ndim or array.size < 2:
            self.held.append(numpy_helper.from_array(array, name))
            return name
        self.given[name] = array
        return self._mixed(name, array.shape, f"w_{name}")

    def _given(self, k: int, name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        if array.dtype != np.float32:
            self.nodes.append(helper.make_node("Cast", [name], [f"cast{k}"], to=TensorProto.FLOAT))
            name = f"cast{k}"
        self.nodes.append(helper.make_node("Identity", [self._mixed(name, array.shape, f"v{k}")], [f"final{k}"]))
        return helper.make_tensor_value_info(f"final{k}", TensorProto.FLOAT, None)

    def _mixed(self, name: str, shape: tuple[int, ...], own: str) -> str:
        for d, size in enumerate(shape):
            if size > 1:
                weight = (np.eye(size) + 0.05 * self.rng.random((size, size))).astype(np.float32)
                self.held.append(numpy_helper.from_array(weight, f"{own}_{d}"))
                there = [k for k in range(len(shape)) if k != d] + [d]
                back = [there.index(k) for k in range(len(shape))]
                made = [f"{own}_{d}_{step}" for step in ("there", "made", "back")]
                self.nodes += [
                    helper.make_node("Transpose", [name], made[:1], perm=there),
                    helper.make_node("MatMul", [made[0], f"{own}_{d}"], made[1:2]),
                    helper.make_node("Transpose", made[1:2], made[2:], perm=back),
                ]
                name = made[2]
        return name


def cases() -> list[Any]:
    """The cases whose tensors are all simple ones, without those that spell an operator out in others."""
    from onnx.backend.test.case.node import collect_testcases  # takes seconds

    def is_simple(case: Any) -> bool:
        arrays = [a for part in (case.data_sets or [([], [])])[0] for a in part]
        return bool(arrays) and all(isinstance(a, (np.ndarray, np.generic)) for a in arrays)

    return [case for case in collect_testcases(None) if is_simple(case) and not case.name.endswith("_expanded")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_what_may_go_around_an_operator_goes(part: int, tmp_path: Path) -> None:
    wrong, tried = {}, 0
    for case in cases()[part::PARTS]:
        around = Around(case)
        if around.given and _runs(around):
            tried += 1
            try:
                _cut_each(around, tmp_path / "around.onnx")
            except (CaptureError, CheckError, CutError) as error:
                wrong[case.name] = str(error)
    assert not {name: text for name, text in wrong.items() if not name.startswith(tuple(REFUSED))}
    assert tried > 50


def _cut_each(around: Around, path: Path) -> None:
    """Take a third of each axis, by itself."""
    onnx.save(around.model, path)
    graph, rng = depgraph.trace(path, around.given), np.random.default_rng(0)
    for axis in graph.axes:
        free = rng.permutation(np.flatnonzero(axis.prunable))[: max(1, axis.size // 3)]
        if 0 < len(free) < axis.size:
            graph.cut_plan({axis.name: sorted(free.tolist())}).apply_with_report()


def _runs(around: Around) -> bool:
    try:
        session = onnxruntime.InferenceSession(around.model.SerializeToString(), providers=["CPUExecutionProvider"])
        made = session.run(None, around.given)
    except Exception:  # what the runtime itself refuses
        return False
    return all(np.isfinite(a).all() for a in made) and any(a.size for a in made)
