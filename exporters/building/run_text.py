"""Go on with a text: `python run.py "Once upon a time" [tokens]`. Needs onnxruntime, numpy and tokenizers, nothing else."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent / "genai"
PAST, PRESENT = "past_key_values.", "present."


def empty(value):
    """The cache before the first token: no position yet."""
    heads, width = value.shape[1], value.shape[3]
    kind = {"tensor(float16)": np.float16}.get(value.type, np.float32)
    return np.zeros((1, heads, 0, width), kind)


def main():
    text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    takes = {value.name: value for value in session.get_inputs()}
    gives = [value.name for value in session.get_outputs()]
    ends = json.loads((HERE / "genai_config.json").read_text())["model"]["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    tokens = tokenizer.encode(text).ids
    given = len(tokens)
    cache = {name: empty(value) for name, value in takes.items() if name.startswith(PAST)}
    new, started = tokens, time.perf_counter()
    for _ in range(count):
        past = len(tokens) - len(new)
        feeds = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(past, len(tokens), dtype=np.int64)[None],
        }
        made = session.run(None, {**{n: v for n, v in feeds.items() if n in takes}, **cache})
        found = dict(zip(gives, made))  # noqa: B905  (runs in Python 3.9)
        cache = {PAST + name[len(PRESENT) :]: array for name, array in found.items() if name.startswith(PRESENT)}
        new = [int(found["logits"][0, -1].argmax())]
        tokens = tokens + new
        if new[0] in ends:
            break
    seconds = time.perf_counter() - started
    print(tokenizer.decode(tokens))
    print(f"{(len(tokens) - given) / seconds:.1f} tokens a second")


if __name__ == "__main__":
    main()
