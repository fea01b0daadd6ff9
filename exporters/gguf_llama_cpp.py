"""Runs a GGUF file in llama.cpp, as a program of its own: what llama.cpp doesn't accept ends the process.

python gguf_llama_cpp.py FILE.gguf IDS.npy LOGITS.npy
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

_SECONDS = 1800


def version() -> str:
    """The version of llama-cpp-python, an empty string where it isn't installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return ""
    return importlib.metadata.version("llama-cpp-python")


def logits(file: Path, ids: np.ndarray) -> np.ndarray:
    """What llama.cpp makes of token ids [length]: logits [length, vocabulary].

    Raises RuntimeError with what it said last when it fails.
    """
    folder = file.parent
    given, made = folder / "ids.npy", folder / "logits.npy"
    np.save(given, ids.astype(np.int32))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(file), str(given), str(made)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        env=environment,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            next((line for line in said if "error" in line.lower() or "ASSERT" in line), (said or ["it ended"])[-1])
        )
    found: np.ndarray = np.load(made)
    return found


def _main(file: str, given: str, made: str) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    ids = np.load(given)
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    length = max(len(ids), 8)
    model = llama_cpp.Llama(file, n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=True, **cache)
    model.eval(ids.tolist())
    np.save(made, np.array(model.scores[: len(ids)], dtype=np.float32))


if __name__ == "__main__":
    _main(*sys.argv[1:])
