"""Run as a script in a fresh process: loads an ONNX file, runs it, and prints what memory that took, as JSON.

Arguments: the file, its inputs (an `.npz` for each kind of run), and before them the number of threads.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime

from depgraph.memory import peak_bytes


def main(threads: str, file: str, *inputs: str) -> None:
    """Print `rest` (before the file was loaded) and `peak`, in bytes."""
    rest = peak_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for path in inputs:
        with np.load(path) as feed:
            arrays = dict(feed)
        for _ in range(2):
            session.run(None, arrays)
    print(json.dumps({"rest": rest, "peak": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
