"""ONNX files made smaller, from file to file: seconds, peak memory, and latency before and after in one run.

python benchmarks/onnx_files.py                    ResNet-50, and a decoder of 2.5 GB (needs 6 GB of disk, and minutes)
python benchmarks/onnx_files.py --only resnet-50   one of them
python benchmarks/onnx_files.py FILE.onnx ...      files of your own

Weights of the decoder are random numbers that are drawn while the file is written. Each file is cut in a fresh process;
its peak is the highest resident memory, with pages of mapped files counted, over that after a file of a few kB was cut in it: what
libraries take once is told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
_MARK = "figures:"
_HIDDEN, _INNER, _LAYERS, _HEADS, _WORDS = 2048, 5504, 11, 16, 32000


def resnet_50(path: Path) -> None:
    """ResNet-50 with random weights and statistics, as torch writes it."""
    import torch
    from models import MODELS

    case = MODELS["resnet-50"]()
    torch.onnx.export(case.model, case.args, path, dynamo=False, opset_version=17)


def decoder(path: Path) -> None:
    """A decoder-only transformer: RMS norms, attention of 16 heads, a gated MLP; 2.5 GB of random weights."""
    import onnx_ir as ir

    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        def drawn() -> Any:
            array = generator.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
            return ir.Tensor(array, name=name)

        tensor = ir.LazyTensor(drawn, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)

    stored: list[Any] = []
    nodes: list[Any] = []

    def held(name: str, *shape: int) -> Any:
        stored.append(weight(name, *shape))
        return stored[-1]

    def number(name: str, values: list[int]) -> Any:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        stored.append(
            ir.Value(
                name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
            )
        )
        return stored[-1]

    def op(kind: str, *inputs: Any, **attributes: Any) -> Any:
        nodes.append(ir.node(kind, list(inputs), attributes, name=f"{kind.lower()}_{len(nodes)}"))
        nodes[-1].outputs[0].name = f"v{len(nodes)}"
        return nodes[-1].outputs[0]

    ids = ir.Value(name="ids", shape=ir.Shape(["n", "s"]), type=ir.TensorType(ir.DataType.INT64))
    split, joined = number("split", [0, 0, _HEADS, _HIDDEN // _HEADS]), number("joined", [0, 0, _HIDDEN])
    hidden = op("Gather", held("embedding", _WORDS, _HIDDEN), ids)
    for k in range(_LAYERS):
        normed = op("LayerNormalization", hidden, held(f"{k}.norm", _HIDDEN))
        heads = []
        for part in ("q", "k", "v"):
            made = op("Reshape", op("MatMul", normed, held(f"{k}.{part}", _HIDDEN, _HIDDEN)), split)
            heads.append(op("Transpose", made, perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]))
        mixed = op("MatMul", op("Softmax", op("MatMul", heads[0], heads[1]), axis=-1), heads[2])
        back = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        hidden = op("Add", hidden, op("MatMul", back, held(f"{k}.o", _HIDDEN, _HIDDEN)))
        normed = op("LayerNormalization", hidden, held(f"{k}.norm2", _HIDDEN))
        gate = op("Sigmoid", op("MatMul", normed, held(f"{k}.gate", _HIDDEN, _INNER)))
        inner = op("Mul", gate, op("MatMul", normed, held(f"{k}.up", _HIDDEN, _INNER)))
        hidden = op("Add", hidden, op("MatMul", inner, held(f"{k}.down", _INNER, _HIDDEN)))
    logits = op("MatMul", op("LayerNormalization", hidden, held("norm", _HIDDEN)), held("head", _HIDDEN, _WORDS))
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", "s", _WORDS])
    graph = ir.Graph([ids], [logits], nodes=nodes, initializers=stored, opset_imports={"": 17}, name="decoder")
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


CASES = {"resnet-50": resnet_50, "decoder": decoder}


def warm_up() -> None:
    """Cut a small file, so that all is imported and the runtime started."""
    import onnx_ir as ir

    import depgraph
    import importance

    shape, kind = ir.Shape([2, 8]), ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", shape=shape, type=kind)
    held = [ir.Value(name=n, const_value=ir.tensor(np.ones((8, 8), np.float32), name=n)) for n in "ab"]
    nodes = [ir.node("MatMul", [given, held[0]], name="1")]
    nodes.append(ir.node("MatMul", [nodes[0].outputs[0], held[1]], name="2"))
    nodes[1].outputs[0].shape, nodes[1].outputs[0].type = shape, kind
    graph = ir.Graph([given], nodes[1].outputs, nodes=nodes, initializers=held, opset_imports={"": 17}, name="small")
    plan = depgraph.trace(ir.Model(graph, ir_version=10)).plan(importance.Magnitude(), depgraph.Target(macs=0.5))
    plan.apply_with_report()


def work(path: str, keep: float) -> dict[str, Any]:
    """What a fresh process does: one file cut to a share of its MACs, checked, and written."""
    from measuring import Stopwatch, give_back_freed, resident

    import depgraph
    import importance

    bare = resident()
    warm_up()
    give_back_freed()
    watch, before, start = Stopwatch(), resident(), time.perf_counter()
    with watch.phase("trace"):
        graph = depgraph.trace(path, {"s": 8, "n": 1} if path.endswith("decoder.onnx") else ())
    with watch.phase("score and plan"):
        plan = graph.plan(importance.Magnitude(), depgraph.Target(macs=keep))
    with watch.phase("cut and check"):
        report = plan.apply_with_report()
    with watch.phase("write"):
        depgraph.save(report.model, f"{path}.small.onnx")
    return {
        "seconds": time.perf_counter() - start,
        "phases": watch.phases,
        "before": before,
        "libraries": before - bare,
        "peak": max(phase["peak"] for phase in watch.phases.values()) - before,
        "macs": report.after.macs / report.before.macs,
        "error": report.check.error if report.check else None,
        "sensitivity": report.check.sensitivity if report.check else None,
    }


def latency(path: Path) -> float:
    """The median milliseconds of a run on one thread."""
    import statistics

    import onnxruntime

    import depgraph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = depgraph.trace(path).inputs
    times = []
    for _ in range(7):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(path: Path, keep: float) -> None:
    """Cut one file in a process of its own, and print a line of figures."""
    done = subprocess.run(
        [sys.executable, __file__, "--work", str(path), "--keep", str(keep)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        print(f"{path.name}: failed\n{done.stderr[-1500:]}")
        return
    found = json.loads(lines[0].removeprefix(_MARK))
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()) / 2**20
    small = path.with_name(f"{path.name}.small.onnx")
    print(f"{path.name}: libraries {found['libraries']:,.0f} MiB before")
    print(
        f"{path.name}: {size:,.0f} MiB, {found['seconds']:.1f} s, peak {found['peak']:,.0f} MiB ({found['peak'] / size:.2f} of the "
        f"file), MACs {found['macs']:.1%}, error {found['error']:.0e}, moved by {found['sensitivity']:.0e}"
    )
    for name, phase in found["phases"].items():
        print(f"  {name}: {phase['cpu']:.1f} CPU s, {phase['peak'] - found['before']:,.0f} MiB")
    if size < 1000:
        dense, pruned = latency(path), latency(small)
        print(f"  latency: {dense:.1f} -> {pruned:.1f} ms ({dense / pruned:.2f}x)")


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.work:
        print(_MARK + json.dumps(work(given.work, given.keep)))
        return
    for path in given.files:
        measure(path, given.keep)
    with tempfile.TemporaryDirectory() as folder:
        for name in () if given.files else [given.only] if given.only else CASES:
            path = Path(folder) / f"{name}.onnx"
            CASES[name](path)
            measure(path, given.keep)


if __name__ == "__main__":
    main()
