"""What torch.onnx.export makes of the models of the test zoo, and other files: each to 70% of its MACs, checked.

python benchmarks/onnx_zoo.py                              every model, by both exporters, operator sets in turn; 30 minutes
python benchmarks/onnx_zoo.py --only 'vit|swin' --opsets 13 15 17 20 --anew 18 20
python benchmarks/onnx_zoo.py FILE.onnx ...                files of your own; and those of the onnx package with --light

Weights are random. Each file is written and cut in a process of its own, scored by magnitude (at random where all weights of the
file are alike), checked against the zeroed original in ONNX Runtime, saved, and looked at by the checker of the onnx package
with strict shape inference. Results are JSON lines; a run goes on where an earlier one stopped, and --report writes a table.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import argparse
import json
import multiprocessing
import re
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KEEP = 0.7
_FUSED_ATTENTION = 14
"""Before this operator set, torch's first exporter writes attention only where it is spelled out."""
OPSETS, ANEW = (13, 14, 15, 16, 17, 18, 19, 20), (18, 19, 20)


def cut(path: Path, score: str, tell: Any) -> None:
    """One file, from file to file."""
    import onnx

    import depgraph
    import importance

    tell(stage="trace")
    graph = depgraph.trace(path)
    tell(stage="plan", macs=graph.dense_cost.macs, unknown=sorted(graph.unknown))
    scores = importance.Random(0) if score == "random" else importance.Magnitude()
    plan = graph.plan(scores, depgraph.Target(macs=KEEP))
    tell(stage="cut")
    report = plan.apply_with_report()
    check = report.check
    tell(kept=report.after.macs / report.before.macs, error=check.error, moved=check.sensitivity, stage="save")
    small = path.with_suffix(".small.onnx")
    depgraph.save(report.model, small)
    onnx.checker.check_model(small, full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(small), strict_mode=True, data_prop=True)
    tell(stage="branches")
    tell(branches=len(graph.branches), blocks=len(graph.blocks), stage="done")


def export(name: str, exporter: str, opset: int, path: Path) -> None:
    """A model of the test zoo as a file."""
    from tests.onnx_door.exporting import exported, exported_anew
    from tests.zoo import MODULES, ZOO

    example = {**MODULES, **ZOO}[name]()
    if opset < _FUSED_ATTENTION and hasattr(example.model, "set_attn_implementation"):
        example.model.set_attn_implementation("eager")
    if exporter == "dynamo":
        exported_anew(example, path, opset)
    else:
        exported(example, path, opset_version=opset, do_constant_folding=True, training=_evaluated())


def _evaluated() -> Any:
    import torch

    return torch.onnx.TrainingMode.EVAL


def work(case: dict[str, Any], pipe: Connection) -> None:
    """One case in a process of its own; what is known goes through the pipe."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)

    def tell(**known: Any) -> None:
        pipe.send(known)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            if "file" in case:
                data = Path(case["file"]).read_bytes()
                path.write_bytes(data)
            else:
                tell(stage="export")
                export(case["name"], case["exporter"], case["opset"], path)
            cut(path, case.get("score", "magnitude"), tell)
        except Exception as error:
            tell(failed=type(error).__name__, reason=" ".join(str(error).split())[:600])


def one(case: dict[str, Any], limit: float) -> dict[str, Any]:
    """The record of one case."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(case, theirs), daemon=True)
    record, started = dict(case), time.monotonic()
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, limit - (time.monotonic() - started))):
            record.update(ours.recv())
        record.setdefault("failed", "Timeout")
        record.setdefault("reason", f"took longer than {limit:.0f} s")
    except EOFError:
        pass
    process.join(1)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    if record.get("stage") != "done" and "failed" not in record:
        record.update(failed="Died", reason=f"the process ended with {process.exitcode}")
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


def cases(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be tried."""
    from tests.zoo import MODULES, ZOO

    found: list[dict[str, Any]] = [{"name": path.stem, "file": str(path)} for path in given.files]
    if given.light:
        import onnx

        light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
        found += [{"name": p.stem, "file": str(p), "score": "random"} for p in sorted(light.glob("*.onnx"))]
    if found:
        return found
    names = [name for name in (*ZOO, *MODULES) if not given.only or re.search(given.only, name)]
    for k, name in enumerate(names):
        old = given.opsets or [OPSETS[k % len(OPSETS)]]
        new = given.anew or [ANEW[k % len(ANEW)]]
        found += [{"name": name, "exporter": "script", "opset": opset} for opset in old]
        found += [{"name": name, "exporter": "dynamo", "opset": opset} for opset in new]
    return found


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a case is known by."""
    return tuple(record.get(part) for part in ("name", "file", "exporter", "opset"))


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    made = f"{record['exporter']}, {record['opset']}" if "exporter" in record else "given"
    if "kept" not in record:
        return f"| {record['name']} | {made} | {record['stage']}: {record['failed']}: {record['reason']} | | | |"
    note = f" ({record['failed']} in {record['stage']})" if "failed" in record else ""
    return (
        f"| {record['name']} | {made} | {record['kept']:.1%}{note} | {record['error']:.0e} | {record['moved']:.1g} | "
        f"{record.get('branches', '')} |"
    )


def main() -> None:
    """Read the options and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--opsets", type=int, nargs="*")
    parser.add_argument("--anew", type=int, nargs="*")
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "onnx_zoo.jsonl")
    parser.add_argument("--redo", default="", help="try cases again whose failure matches")
    given = parser.parse_args()
    import tests.onnx_door.exporting
    import tests.zoo  # noqa: F401

    known = [json.loads(text) for text in given.results.read_text().splitlines()] if given.results.is_file() else []
    earlier = {key(record): record for record in known}
    print("| model | exporter, operator set | MACs kept | error | moved | branches |\n|---|---|---|---|---|---|")
    for case in cases(given):
        record = earlier.get(key(case))
        said = f"{record.get('stage')} {record.get('failed')}: {record.get('reason')}" if record else ""
        if record is None or ("failed" in record and given.redo and re.search(given.redo, said)):
            record = one(case, given.limit)
            with given.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
        print(line(record), flush=True)


if __name__ == "__main__":
    main()
