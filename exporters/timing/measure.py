"""Measure the models of a kit on this machine: `python measure.py` in the folder of the kit writes profile.json there.

This file is copied into every kit and runs by itself: it needs Python 3.9 or later, onnxruntime and numpy, nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

FORMAT = 1
SHORTEST, MOST_SECONDS = 8, 4.0  # runs of a file at least, and seconds after which no more are begun
TOGETHER = 256 << 20  # bytes of models that are open at once
LOW = 0.1  # the quantile that counts: what the machine does when nothing else disturbs it


def machine(threads):
    """What this machine is, as far as it decides how fast operators run."""
    return {
        "cpu": cpu_name(),
        "instructions": instructions(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }


def cpu_name():
    """The processor's name; on ARM, where Linux has none, its part numbers."""
    found = re.findall(r"^(model name|Hardware|CPU implementer|CPU part)\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    said = dict(reversed(found))
    if name := said.get("model name") or said.get("Hardware"):
        return name.strip()
    if "CPU part" in said:
        return f"ARM implementer {said.get('CPU implementer', '?')} part {said['CPU part']}"
    if sys.platform == "darwin":
        return run("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return platform.processor() or platform.machine()


def cpu_info():
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""


def instructions():
    """The vector instructions among AVX, AVX2, AVX-512 and NEON."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ["NEON"]
    flags = set(re.sub(r"[^a-z0-9_ \n]", " ", cpu_info().lower()).split())
    if sys.platform == "darwin":
        flags = set(run("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split())
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        flags = {name for name, number in (("avx", 39), ("avx2", 40), ("avx512f", 41)) if present(number)}
    known = {"avx": "AVX", "avx1.0": "AVX", "avx2": "AVX2", "avx512f": "AVX-512", "neon": "NEON", "asimd": "NEON"}
    return sorted({known[flag] for flag in flags if flag in known})


def run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def session(path, threads, profile=""):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    model = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def low(times):
    return sorted(times)[int(len(times) * LOW)]


def timed(task, threads):
    """Milliseconds of a call: of this thread's own time where it is the only one, as other programs may run meanwhile."""
    clock = time.perf_counter if threads != 1 or sys.platform == "win32" else time.thread_time
    started = clock()
    task()
    return (clock() - started) * 1000


def nodes_of(events, runs):
    """Milliseconds of each operator in one run: {name, op, shape of the first output, ms, how often a run has it}."""
    times: dict = {}
    about: dict = {}
    for event in events:
        name, args = event.get("name", ""), event.get("args", {})
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            shapes = [list(s.values())[0] for s in args.get("output_type_shape") or []]
            key = (name[: -len("_kernel_time")], args.get("op_name", ""), tuple(shapes[0]) if shapes else ())
            times.setdefault(key, []).append(event["dur"] / 1000)
            about[key] = {"name": key[0], "op": key[1], "shape": list(key[2])}
    found = []
    for key, all_times in times.items():
        often = max(1, round(len(all_times) / runs))
        found.append({**about[key], "ms": low(all_times) * often, "often": often})
    return found


def profiled(models, runs, threads, beside=None):
    """The operators of each of some models (path, feeds), which are run in turns; `beside` is called after each turn."""
    with tempfile.TemporaryDirectory() as folder:
        opened = [(session(path, threads, str(Path(folder) / str(k))), feeds) for k, (path, feeds) in enumerate(models)]
        made, began = 0, time.perf_counter()
        while made <= runs and (made <= SHORTEST or time.perf_counter() - began < len(models) * MOST_SECONDS):
            for one, feeds in opened:
                one.run(None, feeds)
            if beside is not None and made:
                beside()
            made += 1
        events = [json.loads(Path(one.end_profiling()).read_text()) for one, _ in opened]
    return [nodes_of(found, made) for found in events]


def whole(models, runs, threads):
    """The time of the first of some models (path, feeds), and that of the operators of all.

    All are taken in turns: what the machine does meanwhile makes all slower, and not one of them beside another.
    """
    (path, feeds), times = models[0], []
    plain = session(path, threads)
    for _ in range(2):
        plain.run(None, feeds)
    found = profiled(models, runs, threads, lambda: times.append(timed(lambda: plain.run(None, feeds), threads)))
    return {"ms": low(times), "nodes": found[0]}, found[1:]


def micro(path, entry, runs, threads):
    """Milliseconds of the operators n0, n1, ... of a micro model, in this order; long ones are in models of their own."""
    feeds = {"x": np.random.default_rng(0).standard_normal(entry["input"]).astype(np.float32)}
    found = [0.0] * len(entry["points"])
    short = len(entry["alone"]) < len(found)
    for node in profiled([(path, feeds)], runs, threads)[0] if short else ():
        if (number := number_of(node)) is not None:
            found[number] += node["ms"]
    if entry["alone"]:
        with np.load(path.with_suffix(".npz")) as models:
            for number, ms in long_ones(models, entry["alone"], lambda these: alone(these, feeds, runs, threads)):
                found[number] = ms
    return {"points": entry["points"], "odd": entry["odd"], "ms": found}


def long_ones(models, numbers, times):
    """Milliseconds of operators in models of their own, by number; `times` measures some models in turns.

    Each is measured beside the largest, as far as memory goes together with others, and what counts is their ratio: the machine may
    have been slower by the time that the next are.
    """
    sizes = {number: models[f"n{number}"].nbytes for number in numbers}
    *others, largest = sorted(numbers, key=sizes.__getitem__)
    first = None
    for some in together(others, sizes, TOGETHER - sizes[largest]) or [[]]:
        found = times([models[f"n{number}"].tobytes() for number in (*some, largest)])
        first = found[-1] if first is None else first
        longer = found[-1] / first if first else 1.0
        yield from ((number, found[k] / longer) for k, number in enumerate(some))
    yield largest, first


def together(names, sizes, most):
    """Names in lists, each of one or of several whose sizes add up to `most` at most."""
    found: list = []
    for name in names:
        if found and sum(sizes[n] for n in (*found[-1], name)) <= most:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def number_of(node):
    named = re.match(r"n(\d+)(?![0-9])", node["name"])
    return int(named[1]) if named else None


def alone(models, feeds, runs, threads):
    """Milliseconds of the one long operator of each of some models, run in turns.

    ONNX Runtime's profile has the time by the clock, and on a busy machine an operator of some milliseconds never runs without
    another program's turn within it. The run's own time has none of that, so what the short operators beside it leave of it is
    an upper bound too.
    """
    plain = [session(model, threads) for model in models]
    times: list = [[] for _ in models]
    for one in plain:
        one.run(None, feeds)

    def beside():
        for k, one in enumerate(plain):
            times[k].append(timed(functools.partial(one.run, None, feeds), threads))

    found = []
    for k, nodes in enumerate(profiled([(model, feeds) for model in models], runs, threads, beside)):
        by_clock = sum(node["ms"] for node in nodes if number_of(node) is not None)
        found.append(min(by_clock, max(low(times[k]) - sum(n["ms"] for n in nodes if number_of(n) is None), 0.0)))
    return found


def loaded(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def measure(folder, runs=30, threads=1, told=lambda line: None):
    """The profile of this machine for a kit, as plain data."""
    folder = Path(folder)
    kit = json.loads((folder / "kit.json").read_text())
    models = [(folder / kit["dense"], loaded(folder / kit["inputs"]))]
    if "narrow" in kit:
        models.append((folder / kit["narrow"], loaded(folder / kit["narrow inputs"])))
    told(f"{kit['model']}: the whole model" + (", and at half of its widths" if "narrow" in kit else ""))
    dense, halves = whole(models, runs, threads)
    about = {"format": FORMAT, "model": kit["model"], "fingerprint": kit["fingerprint"], "machine": machine(threads)}
    if halves:
        about["narrow"] = {"nodes": halves[0]}
    found = {}
    for number, entry in enumerate(kit["micro"], start=1):
        told(f"{kit['model']}: operators {number} of {len(kit['micro'])}")
        found[entry["key"]] = micro(folder / entry["file"], entry, runs, threads)
    return {**about, "dense": dense, "micro": found}


def main():
    parser = argparse.ArgumentParser(description="Measure the operators of a model on this machine.")
    parser.add_argument("--threads", type=int, default=1, help="threads that ONNX Runtime computes with (1)")
    parser.add_argument("--runs", type=int, default=30, help="runs of each file, at the most (30)")
    parser.add_argument("--out", default="profile.json", help="the file to write (profile.json)")
    given = parser.parse_args()
    found = measure(Path(__file__).resolve().parent, given.runs, given.threads, print)
    draft = Path(given.out + ".partial")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(draft, given.out)
    print(f"wrote {given.out}: {found['machine']['cpu']}, {found['dense']['ms']:.3g} ms; copy it back")


if __name__ == "__main__":
    main()
