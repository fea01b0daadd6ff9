"""Every model type of the installed transformers, tiny and random: built, run, cut by a quarter, checked, saved, exported.

python benchmarks/zoo.py [--only PATTERN] [--jobs N] [--limit SECONDS] [--no-onnx] [--results FILE] [--report FILE]
python benchmarks/zoo.py --sample

Results are kept as JSON lines, and a run goes on where an earlier one stopped; see zoo.md for what came out.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import argparse
import json
import math
import multiprocessing
import random
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import zoo_report  # noqa: E402
import zoo_stages  # noqa: E402

MEMORY, WALL = 10 << 30, 4
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "depgraph" / "zoo.jsonl"
SAMPLE = (
    "albert",
    "bart",
    "bit",
    "clip",
    "convnext",
    "deepseek_v3",
    "gemma3_text",
    "gpt2",
    "hubert",
    "layoutlmv3",
    "llama",
    "llava",
    "mamba",
    "qwen3_moe",
    "segformer",
    "swin",
    "t5",
    "videomae",
    "vit",
    "whisper",
)


def work(model_type: str, with_onnx: bool, limit: float, pipe: Connection) -> None:
    """All stages of one type, in a process of its own; what is known goes through the pipe."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
    zoo_stages.cut_type(model_type, pipe.send, with_onnx)


def one(model_type: str, with_onnx: bool, limit: float) -> dict[str, Any]:
    """The record of one type; one that needs more processor time than the limit, or hangs, counts as a failure of its stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo_warm"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model_type, with_onnx, limit, theirs), daemon=True)
    record: dict[str, Any] = {"type": model_type, "done": [], "asked_onnx": with_onnx}
    started = time.monotonic()
    process.start()
    theirs.close()
    with suppress(EOFError):
        while ours.poll(max(0.0, WALL * limit - (time.monotonic() - started))):
            told = ours.recv()
            record.update(told, done=[*record["done"], *told.get("done", [])])
    process.join(1)
    process.kill()
    process.join()
    record["seconds"] = round(time.monotonic() - started, 1)
    stage = record.pop("stage", "build")
    if "failed" not in record and process.exitcode:
        hung = -process.exitcode in (signal.SIGXCPU, signal.SIGKILL)
        ended = f"took longer than {limit:.0f} s" if hung else f"the process ended with {process.exitcode}"
        record.update(failed=stage, reason=ended)
    return record


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Earlier records by type, the last of each."""
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {r["type"]: r for r in records}


def is_done(record: dict[str, Any] | None, with_onnx: bool) -> bool:
    """Does a record answer what is asked, or end before ONNX anyway?"""
    return record is not None and (not with_onnx or record["asked_onnx"] or "failed" in record)


def redo(record: dict[str, Any], pattern: str) -> bool:
    """Is it a failure that is to be tried again?"""
    return bool(pattern) and "failed" in record and bool(re.search(pattern, f"{record['failed']}: {record['reason']}"))


def run(types: list[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records of these types: those that a results file has, and the others now, added to the file as they come."""
    with_onnx, known = not given.no_onnx, read(given.results)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    todo = [t for t in types if not is_done(known.get(t), with_onnx) or redo(known[t], given.redo)]
    random.Random(0).shuffle(todo)
    lock = threading.Lock()

    def step(model_type: str) -> None:
        record = one(model_type, with_onnx, given.limit)
        with lock, given.results.open("a") as file:
            known[model_type] = record
            file.write(json.dumps(record) + "\n")
            ended = f"{record['failed']}: {record['reason']}" if "failed" in record else "ok"
            print(f"{len(known)} {model_type} ({record['seconds']} s): {ended}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(step, todo))
    return {t: known[t] for t in types if t in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="regular expression that a type's name must match"
    )
    parser.add_argument("--jobs", type=int, default=1, help="types at once")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one type")
    parser.add_argument("--no-onnx", action="store_true", help="leave the export out")
    parser.add_argument("--sample", action="store_true", help="types that must pass, quickly; nothing is kept")
    parser.add_argument("--results", type=Path, default=CACHE, help="the file of results (%(default)s)")
    parser.add_argument("--report", type=Path, help="write the tables as Markdown here")
    parser.add_argument("--redo", default="", metavar="PATTERN", help="try failures again whose stage and reason match")
    parser.add_argument("--list", action="store_true", help="don't run anything, use the results there are")
    given = parser.parse_args()
    types = [t for t in (SAMPLE if given.sample else zoo_stages.model_types()) if re.search(given.only, t)]
    if given.sample:
        given.results = Path(os.devnull)
    records = {t: r for t, r in read(given.results).items() if t in types} if given.list else run(types, given)
    print(zoo_report.summary(records))
    if given.report:
        given.report.write_text(zoo_report.markdown(records))
    if given.sample and any("failed" in record for record in records.values()):
        sys.exit("a type of the sample failed")


if __name__ == "__main__":
    main()
