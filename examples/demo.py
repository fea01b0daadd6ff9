"""A trained language model gets smaller, is proved right, and runs in ONNX Runtime: `make demo`.

Prunes examples/assets/tiny-llama (trained by train_tiny_llama.py on the source of Python's standard library) to 80% and 60% of
its parameters by three scores, and measures perplexity on modules that it never saw. The Taylor model at 80% is left in
out/demo, with its ONNX file.

What goes is what LLM-Pruner's block-wise pruning lets go, for all scores alike: KV heads with their query heads and MLP
neurons, of all blocks but the first and the last. How the budget is spread over the layers is each score's default.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stdlib_text import held_out_text, training_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import depgraph
import exporters
import importance

MODEL = Path(__file__).resolve().parent / "assets" / "tiny-llama"
OUT = Path("out") / "demo"
WINDOW = 128
SEEDS = 5
UNITS = ("*.self_attn.q_proj.weight:0/blocks", "*.mlp.gate_proj.weight:0")
WHY = (
    "Why this order: Random and Magnitude take the same share of every layer; Taylor's scores are changes of the loss, "
    "so they also say which layer pays. Magnitude sees weights and not what flows through them: with the first block "
    "open too it is worse than Random (benchmarks/scores.md)."
)


@dataclass(frozen=True)
class Texts:
    """Token windows: `calibration` from training modules, `held_out` from modules that were kept apart."""

    calibration: list[torch.Tensor]
    held_out: list[torch.Tensor]


def windows(tokenizer: Any, text: str, count: int, batch: int) -> list[torch.Tensor]:
    """`count` batches [batch, WINDOW] spread evenly over the text."""
    step = len(text) // (count * batch)
    rows = []
    for k in range(count * batch):
        ids = tokenizer(text[k * step : k * step + 8 * WINDOW])["input_ids"][:WINDOW]
        if len(ids) == WINDOW:
            rows.append(ids)
    return list(torch.tensor(rows).split(batch))


@torch.no_grad()
def perplexity(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    """exp of the mean next-token cross-entropy."""
    total = tokens = 0.0
    for ids in batches:
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, tokens = total + loss.item(), tokens + ids[:, 1:].numel()
    return math.exp(total / tokens)


def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after `prompt`, greedily."""
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=48, do_sample=False
    )
    return tokenizer.decode(made[0], skip_special_tokens=True)


def prune_all(model: Any, texts: Texts, keeps: list[float], seeds: int) -> dict[tuple[str, float], list[Any]]:
    """Cut reports, one for each seed, for every score and every share of parameters to keep."""
    graph = depgraph.trace(model, kwargs={"input_ids": texts.calibration[0][:2]})
    ends = tuple(f"model.layers.{number}.*" for number in (0, model.config.num_hidden_layers - 1))
    scorers = {
        "random": [importance.Random(seed) for seed in range(seeds)],
        "magnitude": [importance.Magnitude()],
        "taylor": [importance.Taylor(texts.calibration)],
    }
    return {
        (name, keep): [
            graph.plan(scorer, depgraph.Target(params=keep), only=UNITS, protect=ends).apply_with_report()
            for scorer in alike
        ]
        for name, alike in scorers.items()
        for keep in keeps
    }


def export_all(dense: Any, reports: dict[tuple[str, float], list[Any]], ids: torch.Tensor, out: Path) -> dict[Any, str]:
    """ONNX files of the dense model and of the one pruned to 80% by Taylor; returns their latencies in words."""
    paths = {"dense": out / "dense.onnx"}
    exporters.to_onnx(dense, (), paths["dense"], {"input_ids": ids})
    paths["taylor", 0.8] = out / "taylor-80.onnx"
    exporters.to_onnx(reports["taylor", 0.8][0].model, (), paths["taylor", 0.8], {"input_ids": ids})
    measured = exporters.compare_latency(paths, {"input_ids": ids.numpy()}, rounds=20)
    base = measured["dense"]
    return {key: f"{m.median_ms:.2f} ms ({m.speedup_over(base):.2f}x)" for key, m in measured.items()}


def in_words(figures: list[float]) -> str:
    """One figure as it is; of several their mean and range."""
    mean = f"{statistics.mean(figures):.1f}"
    return f"{mean} ({min(figures):.1f} to {max(figures):.1f})" if len(figures) > 1 else mean


def show(console: Console, dense: Any, reports: dict[Any, Any], texts: Texts, latency: dict[Any, str]) -> None:
    """The table of all models."""
    table = Table(title="tiny-llama, pruned: KV heads and MLP neurons of all blocks but the first and the last")
    for column in ("score", "kept", "parameters", "MACs", "bytes", "held-out perplexity", "ONNX Runtime", "check"):
        table.add_column(column, justify="left" if column in ("score", "check") else "right")
    cost = reports["taylor", 0.8][0].before
    figures = (f"{cost.params:,}", f"{cost.macs:,}", f"{cost.bytes:,}")
    table.add_row("dense", "100%", *figures, in_words([perplexity(dense, texts.held_out)]), latency["dense"], "")
    for (name, keep), alike in reports.items():
        cost = alike[0].after
        figures = (f"{cost.params:,}", f"{cost.macs:,}", f"{cost.bytes:,}")
        quality = in_words([perplexity(report.model, texts.held_out) for report in alike])
        check = f"error {alike[0].check.error:.0e} of {alike[0].check.sensitivity:.0e}"
        seeds = f", {len(alike)} seeds" if len(alike) > 1 else ""
        table.add_row(name + seeds, f"{keep:.0%}", *figures, quality, latency.get((name, keep), ""), check)
    console.print(table)
    console.print(WHY, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less text, for tests")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=150)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    calibration = windows(tokenizer, training_text(), 2 if quick else 8, 8)
    texts = Texts(calibration, windows(tokenizer, held_out_text(), 2 if quick else 8, 8))
    reports = prune_all(model, texts, [0.8, 0.6], 2 if quick else SEEDS)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    latency = export_all(model, reports, texts.calibration[0][:2], OUT)
    show(console, model, reports, texts, latency)
    (chosen,) = reports["taylor", 0.8]
    console.print(f"\ntaylor at 80%: {chosen}\n", markup=False, highlight=False)
    prompt = "def read_file(path):\n"
    console.print("the dense model writes:", sample(model, tokenizer, prompt), sep="\n", markup=False, highlight=False)
    console.print("the pruned one:", sample(chosen.model, tokenizer, prompt), sep="\n", markup=False, highlight=False)
    depgraph.save(chosen.model, OUT / "taylor-80")
    tokenizer.save_pretrained(OUT / "taylor-80")
    console.print(
        f"\nleft in {OUT}: the pruned model taylor-80 (depgraph.load) and {OUT / 'taylor-80.onnx'}", highlight=False
    )


if __name__ == "__main__":
    main()
