"""Train a tiny Llama (grouped-query attention, tied embeddings) on the source of Python's standard library.

The script trains a byte-level BPE tokenizer of 2048 tokens and a model of 2.4 million parameters from scratch, saves
both where ``from_pretrained`` finds them (weights in bfloat16), measures the loss on held-out modules (see
``stdlib_text.py``) and writes its figures to ``training.json`` in the same folder.

    python examples/train_tiny_llama.py --out my-tiny-llama --minutes 55 --threads 1

That run, on one shared core of an AMD EPYC with AVX512-BF16 (seed 0, Python 3.11.7), took 4529 steps in 55 minutes
(5600 tokens/s): train loss 1.863, held-out loss 2.530 (perplexity 12.55) per token. ``--steps 4529`` repeats it with
the learning rate following the steps instead of the clock, hence with close but not equal figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from stdlib_text import held_out_text, training_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 256
WARMUP_STEPS = 100
MIN_LR_SHARE = 0.02
REPORT_EVERY = 50


@dataclass
class Record:
    """What a training run did, as saved in ``training.json``."""

    seed: int
    steps: int
    batch: int
    context: int
    peak_lr: float
    tokens_seen: int
    tokens_in_corpus: int
    parameters: int
    train_loss: float
    seconds: float
    device: str
    precision: str
    threads: int
    python: str
    torch: str
    held_out_loss: float | None = None
    held_out_perplexity: float | None = None
    held_out_tokens: int | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-llama"), help="folder for the model and tokenizer")
    parser.add_argument("--minutes", type=float, default=55.0, help="training time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="train this many steps instead; the schedule follows the steps")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast, fp32 weights")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0, help="time between checkpoints")
    return parser.parse_args()


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """One stream of token ids: every document is preceded by the end-of-text token."""
    ids: list[int] = []
    for document in text.split(END_OF_TEXT):
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.encode(document, add_special_tokens=False, verbose=False))
    return torch.tensor(ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def batches(tokens: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of windows of CONTEXT + 1 tokens; every epoch cuts the stream at another offset."""
    length = CONTEXT + 1
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        count = (len(tokens) - offset) // length
        windows = tokens[offset : offset + count * length].view(count, length)
        order = torch.randperm(count, generator=generator)
        for chosen in order.split(batch):
            if len(chosen) == batch:
                yield windows[chosen]


def make_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine over the share of the budget that is used (0 to 1)."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (MIN_LR_SHARE + (1 - MIN_LR_SHARE) * cosine)


def window_loss(model: torch.nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record, out: Path) -> None:
    """Write everything to a temporary folder, then move each file into place, so readers never see half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tiny-llama-") as folder:
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "training.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
        for path in Path(folder).iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


@torch.no_grad()
def evaluate(folder: Path, tokens: Tensor, batch: int = 16) -> tuple[float, int]:
    """Mean loss per token of the saved model in float32, over windows of CONTEXT predictions, and their number."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = CONTEXT + 1
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    total = sum(float(window_loss(model, part, "sum")) for part in windows.split(batch))
    count = windows.shape[0] * CONTEXT
    return total / count, count


def train(args: argparse.Namespace, device: str, tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> Record:
    """Train until the budget is used and save the result, with checkpoints on the way."""
    model = build_model(tokenizer).to(device).train()
    optimizer = make_optimizer(model, args.lr)
    precision = torch.autocast(device, torch.bfloat16) if args.precision == "bf16" else nullcontext()
    record = Record(
        seed=args.seed, steps=0, batch=args.batch, context=CONTEXT, peak_lr=args.lr, tokens_seen=0,
        tokens_in_corpus=len(tokens), parameters=model.num_parameters(), train_loss=math.nan, seconds=0.0,
        device=device, precision=args.precision, threads=args.threads, python=platform.python_version(),
        torch=torch.__version__,
    )  # fmt: skip
    recent: list[float] = []
    start = saved = time.monotonic()
    for step, windows in enumerate(batches(tokens, args.batch, torch.Generator().manual_seed(args.seed))):
        elapsed = time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / (args.minutes * 60)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, progress)
        with precision:
            loss = window_loss(model, windows.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        recent = [*recent[-99:], loss.item()]
        record.steps = step + 1
        record.tokens_seen = record.steps * args.batch * CONTEXT
        record.train_loss = sum(recent) / len(recent)
        record.seconds = time.monotonic() - start
        if record.steps % REPORT_EVERY == 0:
            speed = record.tokens_seen / record.seconds
            print(f"step {record.steps} {progress:.1%} loss {record.train_loss:.3f} {speed:.0f} tokens/s", flush=True)
        if time.monotonic() - saved > args.checkpoint_minutes * 60:
            save(model, tokenizer, record, args.out)
            saved = time.monotonic()
    save(model, tokenizer, record, args.out)
    return record


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    text = training_text(END_OF_TEXT)
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, text)
    print(f"{len(tokens)} training tokens, {len(text) / len(tokens):.2f} characters per token", flush=True)
    record = train(args, device, tokenizer, tokens)

    held_out = encode(tokenizer, held_out_text(END_OF_TEXT))
    record.held_out_loss, record.held_out_tokens = evaluate(args.out, held_out)
    record.held_out_perplexity = math.exp(record.held_out_loss)
    (args.out / "training.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    print(json.dumps(asdict(record), indent=2))


if __name__ == "__main__":
    main()
