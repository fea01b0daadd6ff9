"""Greedy decoding in PyTorch and in ONNX Runtime, step by step, and whether both give the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from depgraph.capture.restoring import restored
from depgraph.errors import ExportError, first_line
from exporters.model_state import preserved
from exporters.onnx_check import Difference, Differs, Tolerance

NEW_TOKENS = 20
"""How many tokens a check decodes."""

_SEED, _ROWS, _LENGTH = 7, 3, 8


@dataclass(frozen=True)
class Decoded:
    """New tokens [batch, count], the logits [batch, vocabulary] of each step that chose them, and what chose them."""

    tokens: np.ndarray
    logits: tuple[np.ndarray, ...]
    source: str


@dataclass(frozen=True)
class Agreement:
    """How two runs agree.

    Attributes:
        rows: Sequences decoded together.
        tokens: Tokens compared and found equal, over all rows.
        ties: Rows that part where the two best logits are closer than the runs' difference; they are compared up to there.
        difference: Of the logits.
        reference: What they were compared with.
    """

    rows: int
    tokens: int
    ties: int
    difference: Difference
    reference: str

    def __str__(self) -> str:
        ties = f", in {self.ties} of them up to a tie of the two best" if self.ties else ""
        return f"{self.tokens} greedy tokens of {self.rows} sequences equal those of {self.reference}{ties}"


def default_prompt(model: Any) -> Tensor:
    """Random token ids [3, 8], the same each time."""
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(min(3, size - 1), size, (_ROWS, _LENGTH), generator=generator)


def left_padded(prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [max(batch, 3), length]: rows of the prompt in turn, cut to different lengths, padded on the left.

    Raises:
        ExportError: The prompt isn't [batch, length] of whole numbers with two tokens or more.
    """
    if prompt.ndim != 2 or prompt.shape[0] < 1 or prompt.shape[1] < 2 or prompt.is_floating_point():
        raise ExportError(
            f"The prompt has shape {tuple(prompt.shape)}; give token ids [batch, length] of 2 tokens or more."
        )
    rows, length = max(prompt.shape[0], _ROWS), prompt.shape[1]
    cut = torch.tensor([(0, 1, length // 2)[row % 3] for row in range(rows)])
    mask = torch.arange(length).expand(rows, -1) >= cut[:, None]
    ids = prompt.cpu()[torch.arange(rows) % prompt.shape[0]]
    return ids * mask, mask.long()


def in_torch(model: nn.Module, inputs: Mapping[str, Any], count: int, start: int | None = None) -> Decoded:
    """`count` greedy tokens of `generate()` without its processors and stops: what the weights say.

    Args:
        start: The token with which the decoder of an encoder-decoder starts.
    Raises:
        ExportError: The model has no `generate()`, or it fails.
    """
    from transformers import GenerationMixin  # takes seconds

    owner = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise ExportError(f"{owner} has no generate() of transformers to compare tokens with: export it with to_onnx.")
    with _plain_generation(model, count, start), torch.no_grad():
        try:
            # the base class's own: some classes override it with their task around it
            made: Any = GenerationMixin.generate(model, **inputs)
        except Exception as error:
            raise ExportError(
                f"generate() of {owner} fails on the prompt ({first_line(error)}); give another."
            ) from error
    logits = tuple(step.float().cpu().numpy() for step in made.logits)
    return Decoded(made.sequences[:, -count:].cpu().numpy(), logits, "generate()")


@contextmanager
def _plain_generation(model: Any, count: int, start: int | None) -> Iterator[None]:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=0,
        decoder_start_token_id=start,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with restored(model), preserved(model):
        model.eval()
        model.generation_config = settings
        yield


Step = dict[str, np.ndarray]


def in_onnx(session: onnxruntime.InferenceSession, feeds: Step, count: int) -> Decoded:
    """`count` greedy tokens of a decoder's file: one run over the prompt, then one token at a time.

    Args:
        feeds: All inputs of the first run; those with a mask or positions among them grow as the tokens come.
    """
    logits = []
    for _ in range(count):
        step, feeds = _run(session, feeds)
        logits.append(step)
    return Decoded(np.stack([step.argmax(-1) for step in logits], 1), tuple(logits), "ONNX Runtime")


def following(session: onnxruntime.InferenceSession, feeds: Step) -> Step:
    """The inputs of the run after that with `feeds`."""
    return _run(session, feeds)[1]


def _run(session: onnxruntime.InferenceSession, feeds: Step) -> tuple[np.ndarray, Step]:
    """The logits [batch, vocabulary] of the last position, and the inputs of the next run."""
    carried = [i.name for i in session.get_inputs() if f"present.{i.name.partition('.')[2]}" in _output_names(session)]
    outputs = dict(zip(_output_names(session), session.run(None, feeds), strict=True))
    logits = outputs["logits"][:, -1].astype(np.float32)
    past = {name: outputs[f"present.{name.partition('.')[2]}"] for name in carried}
    return logits, _grown(feeds, logits.argmax(-1)[:, None]) | past


def _output_names(session: onnxruntime.InferenceSession) -> list[str]:
    return [value.name for value in session.get_outputs()]


def _grown(feeds: Step, token: np.ndarray) -> Step:
    """The inputs of the next run, without the cache."""
    grown = {**feeds, "input_ids": token.astype(np.int64)}
    if "attention_mask" in feeds:
        grown["attention_mask"] = np.concatenate([feeds["attention_mask"], np.ones_like(token)], 1)
    if "position_ids" in feeds:
        grown["position_ids"] = feeds["position_ids"][:, -1:] + 1
    return grown


def agreement(expected: Decoded, got: Decoded, tolerance: Tolerance) -> Agreement:
    """Compare two runs step by step.

    Raises:
        Differs: Logits differ by more than the tolerance.
    """
    count, rows = expected.tokens.shape[1], expected.tokens.shape[0]
    together = np.ones(rows, bool)
    equal, worst = 0, Difference()
    for step in range(count):
        reference, actual = expected.logits[step][together], got.logits[step][together]
        largest = float(np.abs(reference).max(initial=0.0))
        error = float(np.abs(reference - actual).max(initial=0.0))
        if not error <= tolerance.absolute + tolerance.relative * largest:
            raise Differs(
                f"At new token {step + 1} the logits of {got.source} differ from those of {expected.source} by {error:.3g} "
                f"(largest value {largest:.3g}); not written: export in float32, or raise OnnxOptions.rtol if that is rounding."
            )
        worst |= Difference(error, error / largest if largest else 0.0)
        together &= expected.tokens[:, step] == got.tokens[:, step]
        equal += int(together.sum())
    return Agreement(rows, equal, int((~together).sum()), worst, expected.source)
