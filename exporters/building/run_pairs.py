"""Answer a text: `python run.py "A text." [tokens]`. Needs onnxruntime, numpy and tokenizers, nothing else."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent / "seq2seq"
PAST, PRESENT = "past_key_values.", "present."


def opened(name):
    return onnxruntime.InferenceSession(str(HERE / name), providers=["CPUExecutionProvider"])


def run(session, given):
    takes = {value.name for value in session.get_inputs()}
    made = session.run(None, {name: array for name, array in given.items() if name in takes})
    return dict(zip([value.name for value in session.get_outputs()], made))  # noqa: B905  (runs in Python 3.9)


def empty(value):
    """The cache before the first token: no position yet."""
    kind = {"tensor(float16)": np.float16}.get(value.type, np.float32)
    return np.zeros((1, value.shape[1], 0, value.shape[3]), kind)


def main():
    text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    settings = json.loads((HERE / "settings.json").read_text())
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    encoder, decoder = opened("encoder.onnx"), opened("decoder.onnx")
    ids = np.array([tokenizer.encode(text).ids], np.int64)
    seen = run(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    given = {PAST + name[len(PRESENT) :]: array for name, array in seen.items() if name.startswith(PRESENT)}
    given["encoder_attention_mask"] = np.ones_like(ids)
    for value in decoder.get_inputs():
        if value.name.startswith(PAST) and value.name not in given:
            given[value.name] = empty(value)
    token, started = settings["start"], time.perf_counter()
    tokens = []  # type: ignore[var-annotated]
    while len(tokens) < count and token not in settings["ends"]:
        made = run(decoder, {**given, "input_ids": np.array([[token]], np.int64)})
        given.update({PAST + name[len(PRESENT) :]: a for name, a in made.items() if name.startswith(PRESENT)})
        token = int(made["logits"][0, -1].argmax())
        tokens.append(token)
    seconds = time.perf_counter() - started
    print(tokenizer.decode(tokens))
    print(f"{len(tokens) / seconds:.1f} tokens a second")


if __name__ == "__main__":
    main()
