"""The zoo's records as a line for the terminal and as Markdown."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
APART = {
    "config": "has no default config that can be made tiny",
    "construct": "isn't constructed from its tiny config",
    "forward": "doesn't run on the inputs that the zoo makes up",
    "build": "isn't built within the limit",
}
LITTLE, SLOWEST = 0.10, 8


def reached(records: Iterable[Record], stage: str) -> list[Record]:
    """The records that passed a stage."""
    return [r for r in records if stage in r["done"]]


def summary(records: dict[str, Record]) -> str:
    """The counts in one line."""
    return "; ".join(f"{name}: {value}" for name, value in counts(list(records.values())))


def counts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What was tried and how far it came; shares are of those whose own forward runs."""
    runs = reached(records, "forward")
    asked = [r for r in runs if r["asked_onnx"]]
    little = [r for r in reached(records, "save") if r["removed"] < LITTLE]
    planned = [r for r in reached(records, "save") if r.get("planned")]
    rows = [
        ("model types", str(len(records))),
        ("constructed", str(sum(r.get("failed") not in ("config", "construct", "build") for r in records))),
        ("own forward runs", str(len(runs))),
        ("traced", _of(reached(records, "trace"), runs)),
        ("cut by a quarter, every check passed, saved and loaded", _of(reached(records, "save"), runs)),
        ("of these, by a plan of the library's for the same budget", _of(planned, runs)),
        (f"of these, less than {LITTLE:.0%} removed because hardly more is prunable", _of(little, runs)),
    ]
    if asked:
        rows.append((f"exported, ONNX Runtime equal (of {len(asked)} tried)", _of(reached(asked, "onnx"), asked)))
    else:
        rows.append(("exported", "not tried (--no-onnx)"))
    return rows


def _of(part: Sequence[Record], whole: Sequence[Record]) -> str:
    return f"{len(part)} ({len(part) / max(len(whole), 1):.1%})"


def exponent(records: Iterable[Record]) -> float:
    """The slope of log trace seconds over log operators, by least squares; seconds under 0.05 say little and are left out."""
    points = [(math.log(r["operators"]), math.log(r["trace_s"])) for r in records if r["trace_s"] >= 0.05]
    if len(points) < 2:
        return float("nan")
    middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread if spread else float("nan")


def markdown(records: dict[str, Record]) -> str:
    """All tables."""
    held = [records[t] for t in sorted(records)]
    parts = [_head(), _table(("", "types"), counts(held)), _times(held), _failures(held), _little(held), _apart(held)]
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "onnxruntime")
    )
    return (
        "# Every model type of transformers\n\n"
        f"Written by `python benchmarks/zoo.py --report benchmarks/zoo.md` ({versions}). Every type that transformers registers is\n"
        "built with random weights from a tiny config that one rule over the names of fields makes; of every axis at once a\n"
        'quarter of the groups goes, ties between sizes permitting, with `form="auto"`; half, where a quarter is less than 10% of the\n'
        "parameters and more is prunable; where the form that a model can be cut in doesn't hold that, what planning makes of the same\n"
        "budget. Shares are of those whose own forward runs."
    )


def _times(records: list[Record]) -> str:
    traced = reached(records, "trace")
    slow = sorted(traced, key=lambda r: -r["trace_s"])[:SLOWEST]
    rows = [
        (r["type"], str(r["operators"]), f"{r['trace_s']:.2f}", f"{r.get('cut_s', float('nan')):.2f}") for r in slow
    ]
    forms = Counter(r["form"] for r in reached(records, "cut"))
    text = (
        f"Processor seconds of `trace` grow as operators to the power {exponent(traced):.2f}. "
        f"Cut as a module: {forms['module']}, as a graph: {forms['graph']}. The slowest to trace:"
    )
    return f"## Time\n\n{text}\n\n" + _table(("type", "operators", "trace s", "plan, cut and check s"), rows)


def _failures(records: list[Record]) -> str:
    """Failures of the library, those with one message together, the most frequent first."""
    failed = [r for r in records if r.get("failed") in ("trace", "cut", "save", "onnx")]
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in failed:
        groups.setdefault((r["failed"], _alike(r)), []).append(r)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [
        (stage, ", ".join(r["type"] for r in found), _cell(found[0]["reason"]), found[0].get("where", ""))
        for (stage, _), found in ordered
    ]
    return f"## Failures\n\n{len(failed)} types.\n\n" + _table(
        ("stage", "types", "reason (of the first)", "where"), rows
    )


def _alike(record: Record) -> str:
    """A reason without what differs from model to model."""
    text = re.sub(
        r"transformers/models/\S+|'[^']*'|\b[A-Z]\w+[a-z]\w*[A-Z]\w*\b|\([^)]*\)|[\d.e+-]*\d[\d.e%+-]*",
        "*",
        record["reason"],
    )
    return f"{record.get('where', '')} {text[:90]}"


def _little(records: list[Record]) -> str:
    found = [r for r in reached(records, "save") if r["removed"] < LITTLE]
    rows = [(r["type"], f"{r['prunable']:.1%}", f"{r['removed']:.1%}", ", ".join(r["unknown"])) for r in found]
    note = f"These pass, but less than {LITTLE:.0%} of the parameters that the call reads went.\n\n"
    return "## Hardly prunable\n\n" + note + _table(("type", "prunable", "removed", "operators without a rule"), rows)


def _apart(records: list[Record]) -> str:
    rows = [(r["type"], APART[r["failed"]], _cell(r["reason"])) for r in records if r.get("failed") in APART]
    return "## Apart: not built, or its own forward doesn't run\n\n" + _table(("type", "how", "reason"), rows)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")[:240]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
