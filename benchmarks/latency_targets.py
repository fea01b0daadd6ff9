"""Targets in milliseconds: predicted beside measured, and what is kept at equal latency, beside round numbers by hand.

python benchmarks/latency_targets.py                            all four models (a quarter of an hour)
python benchmarks/latency_targets.py --models vit --shares 0.5  one of them, at one size
python benchmarks/latency_targets.py --accuracy                 what tilted axes are worth in accuracy (needs scikit-learn)

By hand is what one does without a latency model: the same share of every axis, in multiples of 16. Ours is `graph.plan` with the
milliseconds that the latency model says of that, and, for equal parameters, with both its parameters and its milliseconds. Scores are
magnitudes of random weights, so this says nothing of quality. "Most parameters" is no plan to use: it scores groups by their
parameters alone and so shows how far any plan could go, with a line on how much of the time isn't in stored matrices.

Every model is exported and timed with one thread, dense and pruned ones in turns in one process; the lowest tenth of each counts.
The table is written to standard output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
import transformers
from torch import nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import depgraph
import exporters
import importance
from exporters.timing.measure import low, session, timed
from exporters.timing.operators import Operators

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]
IMAGE = (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
COLUMNS = ("model, by hand", "plan", "parameters", "beside hand", "latency, predicted", "latency, measured", "error")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def _resnet() -> Case:
    sizes: dict[str, Any] = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000, **sizes)), IMAGE


def _mobilenet() -> Case:
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(num_labels=1000)), IMAGE


def _vit() -> Case:
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 6}
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000, **sizes)), IMAGE


def _llama() -> Case:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False, **sizes, **heads))
    return model, (torch.arange(128)[None],)


MODELS: dict[str, Callable[[], Case]] = {"resnet-18": _resnet, "mobilenet-v2": _mobilenet, "vit": _vit, "llama": _llama}


def measured(latency: exporters.MeasuredLatency, files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Milliseconds of several files, run in turns."""
    feeds = {name: np.asarray(array) for name, array in latency.file.inputs.items()}
    sessions = {name: session(path, 1) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for number in range(-2, rounds):
        for name, opened in sessions.items():
            taken = timed(lambda opened=opened: opened.run(None, feeds), 1)
            times[name] += [taken] if number >= 0 else []
    return {name: low(found) for name, found in times.items()}


def compared(name: str, share: float, latency: exporters.MeasuredLatency, rounds: int) -> list[str]:
    """The lines of a model at the size by hand that keeps a share of the parameters."""
    graph = latency.graph
    scores = importance.Magnitude()(graph)
    hand = graph.plan(scores, depgraph.Target(params=share), scope="axis", round_to=16)
    milliseconds, kept = latency.ms(hand.kept()), hand.cost().params / graph.dense_cost.params
    equal = depgraph.Target(latency_ms=milliseconds, latency=latency)
    both = depgraph.Target(params=kept, latency_ms=milliseconds, latency=latency)
    plans = {
        "by hand": hand,
        "ours, equal latency": graph.plan(scores, equal, scope="axis"),
        "ours, equal latency, by density": graph.plan(scores, equal, scope="global", rank="density"),
        "ours, equal parameters": graph.plan(scores, both, scope="axis"),
        "most parameters, equal latency": graph.plan(by_parameters(graph), equal, scope="global", rank="density"),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.onnx"}
        onnx_ir.save(latency.file.model, files["dense"])
        for k, (plan_name, plan) in enumerate(plans.items()):
            files[plan_name] = Path(folder) / f"{k}.onnx"
            exporters.to_onnx(plan.apply(), graph.args, files[plan_name], graph.kwargs)
        found = measured(latency, files, rounds)
    lines = []
    for plan_name, plan in plans.items():
        params = plan.cost().params / graph.dense_cost.params
        predicted, real = latency.ms(plan.kept()) / latency.ms(graph.widths.at({})), found[plan_name] / found["dense"]
        cells = (f"{name} {share:g}", plan_name, f"{params:.3f}", f"{params / kept - 1:+.1%}")
        lines.append(f"| {' | '.join(cells)} | {predicted:.3f} | {real:.3f} | {predicted / real - 1:+.1%} |")
    return [*lines, in_matrices(latency, hand)]


def by_parameters(graph: depgraph.DependencyGraph) -> dict[str, np.ndarray]:
    """Every group scored by the parameters that go with it."""
    dense = graph.dense_cost.params
    return {
        axis.name: np.full(axis.size, float(dense - graph.cost({axis.name: [int(np.argmax(axis.prunable))]}).params))
        for axis in graph.axes
    }


def in_matrices(latency: exporters.MeasuredLatency, hand: depgraph.Plan) -> str:
    """A line on how much of the time by hand is in products and convolutions with stored matrices."""
    operators = Operators(latency.file)
    stored = {operators.name(k) for k in range(len(operators.nodes)) if operators.shape(k).signature is not None}
    parts = latency.parts(hand.kept())
    inside = sum(ms for name, ms in parts.items() if name in stored) / sum(parts.values())
    return f"| | stored matrices take {inside:.1%} of the time by hand | | | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.7, 0.5, 0.35])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--accuracy", action="store_true", help="the table of accuracies instead")
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if given.accuracy:
        import latency_accuracy

        for line in latency_accuracy.table():
            print(line, flush=True)
        return
    print(HEAD)
    for name in given.models:
        torch.manual_seed(0)
        model, args = MODELS[name]()
        latency = exporters.MeasuredLatency.of(depgraph.trace(model.eval(), args))
        for share in given.shares:
            print("\n".join(compared(name, share, latency, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
