"""The loss of a batch: the caller's, the model's own, or next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from depgraph.errors import ScoreError

Loss = Callable[[Any, Any], Tensor]
"""Maps the model's output and the batch, as it was given but on the model's device, to a scalar."""

IGNORED = -100
_TOKENS = (("decoder_input_ids", "decoder_attention_mask"), ("input_ids", "attention_mask"))


def next_token(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of predicting each next token, in float32 or wider.

    Args:
        logits: [batch, tokens, vocabulary].
        tokens: integers [batch, tokens]; -100 is not predicted.
        mask: [batch, tokens], nonzero where there is text: a token is predicted if it and the one before are text.

    Raises ScoreError when no token is left to predict, or one lies outside the vocabulary.
    """
    targets = tokens[:, 1:].long()
    if mask is not None:
        text = mask != 0
        targets = targets.masked_fill(~(text[:, 1:] & text[:, :-1]), IGNORED)
    used = targets[targets != IGNORED]
    if not used.numel():
        raise ScoreError("no next token to predict in a batch: give sequences of two tokens or more")
    if not 0 <= int(used.min()) <= int(used.max()) < logits.shape[-1]:
        raise ScoreError(f"the tokens of a batch don't lie in the {logits.shape[-1]} classes of the logits: {HINT}")
    predicted = logits[:, :-1].flatten(0, 1)
    wide = predicted if predicted.dtype == torch.float64 else predicted.float()
    return functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED)


HINT = "pass loss=callable(output, batch) that returns a scalar (to the command: as 'loss' in the dict of file.py:function)"


GIVE = "pass batches=[...] (to the command: --data, or 'batches' in the dict of file.py:function)"


def own_loss(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that the model returned, or next-token cross-entropy for a language model called with token ids.

    `inputs` are the batch's tensors by the names of the model's arguments. Raises ScoreError when there is neither.
    """
    loss = _field(output, "loss")
    if isinstance(loss, Tensor):
        return loss
    logits = output if isinstance(output, Tensor) else _field(output, "logits")
    tokens, mask = _tokens(inputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or tokens is None or logits.shape[:2] != tokens.shape:
        raise ScoreError(
            f"the model returned no loss ({type(output).__name__}) and isn't a language model called with token ids: "
            f"{HINT}, or put labels into the batches if the model takes them"
        )
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == tokens.shape:
        tokens = labels
    return next_token(logits, tokens, mask if mask is not None and mask.shape == tokens.shape else None)


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _tokens(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Token ids and their mask, by the usual names, else the first argument if it holds integers [batch, tokens]."""
    for tokens, mask in _TOKENS:
        if isinstance(inputs.get(tokens), Tensor):
            return inputs[tokens], inputs.get(mask)
    first = next(iter(inputs.values()), None)
    integers = isinstance(first, Tensor) and first.ndim == 2 and not (first.is_floating_point() or first.is_complex())
    return (first, inputs.get("attention_mask")) if integers else (None, None)
