"""Answer a text, or what a file of inputs holds: `python run.py ["A text." or inputs.npz] [tokens]`.

Needs onnxruntime and numpy; for texts tokenizers too. Without an argument: the example that the model came with.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent
HERE = FOLDER / "seq2seq"
PAST, PRESENT = "past_key_values.", "present."


def opened(name):
    return onnxruntime.InferenceSession(str(HERE / name), providers=["CPUExecutionProvider"])


def run(session, given):
    takes = {value.name for value in session.get_inputs()}
    made = session.run(None, {name: array for name, array in given.items() if name in takes})
    return dict(zip([value.name for value in session.get_outputs()], made))  # noqa: B905  (runs in Python 3.9)


def tokenizer():
    """What reads and writes texts; None where it isn't there."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    file = HERE / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.exists() else None


def inputs_of(given, words):
    """The inputs of one sequence, from a text or a file's first."""
    if not given.endswith(".npz"):
        if words is None:
            sys.exit("a text needs seq2seq/tokenizer.json and `pip install tokenizers`: give a file of inputs, x.npz")
        return {"input_ids": np.array([words.encode(given).ids], np.int64)}
    with np.load(given) as arrays:
        return {name: arrays[name][:1] for name in arrays.files}


def with_mask(inputs):
    """The same, and a mask for tokens that have none."""
    if "input_ids" in inputs:
        inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
    return inputs


def first_step(inputs, encoder, decoder):
    """What the decoder takes besides tokens: what the encoder made, and a cache with no position yet."""
    seen = run(encoder, inputs)
    given = {PAST + name[len(PRESENT) :]: array for name, array in seen.items() if name.startswith(PRESENT)}
    if "attention_mask" in inputs:
        given["encoder_attention_mask"] = inputs["attention_mask"]
    for value in decoder.get_inputs():
        if value.name.startswith(PAST) and value.name not in given:
            kind = {"tensor(float16)": np.float16}.get(value.type, np.float32)
            given[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
    return given


def generate(decoder, given, settings, count):
    """The likeliest token each time, up to the end or so many."""
    new = settings["start"]
    tokens = []  # type: ignore[var-annotated]
    while len(tokens) < count:
        made = run(decoder, {**given, "input_ids": np.array([new], np.int64)})
        given.update({PAST + name[len(PRESENT) :]: a for name, a in made.items() if name.startswith(PRESENT)})
        scores = made["logits"][0, -1].copy()
        barred = settings["never"] + ([] if tokens else settings["not_first"])
        scores[[number for number in barred if number < len(scores)]] = -np.inf
        token = int(scores.argmax()) if tokens or not settings["first"] else settings["first"][0]
        tokens, new = [*tokens, token], [token]
        if token in settings["ends"]:
            break
    return tokens


def main():
    given = sys.argv[1] if len(sys.argv) > 1 else str(FOLDER / "example.npz")
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    settings, words = json.loads((HERE / "settings.json").read_text()), tokenizer()
    encoder, decoder = opened("encoder.onnx"), opened("decoder.onnx")
    inputs = with_mask(inputs_of(given, words))
    started = time.perf_counter()
    tokens = generate(decoder, first_step(inputs, encoder, decoder), settings, count)
    seconds = time.perf_counter() - started
    print(" ".join(map(str, tokens)) if words is None else words.decode(tokens))
    print(f"{len(tokens) / seconds:.1f} tokens a second, the encoder included")


if __name__ == "__main__":
    main()
