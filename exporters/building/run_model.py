"""Run model.onnx: `python run.py [inputs.npz]`. Needs onnxruntime and numpy, nothing else."""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def main():
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    with np.load(sys.argv[1] if len(sys.argv) > 1 else HERE / "example.npz") as arrays:
        feeds = {value.name: arrays[value.name] for value in session.get_inputs()}
    outputs = session.run(None, feeds)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - started) * 1000)
    for value, output in zip(session.get_outputs(), outputs):  # noqa: B905  (runs in Python 3.9)
        print(f"{value.name}: {output.dtype} {list(output.shape)}")
    print(f"median of 20 runs: {sorted(times)[10]:.3f} ms")


if __name__ == "__main__":
    main()
