"""The loss of a form of a model on batches with labels is that which the model itself would give, whatever kind of model it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import depgraph
from depgraph.errors import ScoreError
from importance.calling import loss_of_form
from importance.rivals import mean_loss

Batch = dict[str, Tensor]


def masked() -> tuple[nn.Module, Batch]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes))
    ids = torch.randint(5, 40, (2, 8))
    return model, {"input_ids": ids, "labels": torch.where(torch.rand(2, 8) < 0.4, ids, -100)}


def causal() -> tuple[nn.Module, Batch]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, use_cache=False, **sizes))
    ids = torch.randint(5, 40, (2, 8))
    return model, {"input_ids": ids, "labels": ids}


def translating() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    ids, labels = torch.randint(5, 40, (2, 8)), torch.randint(5, 40, (2, 6))
    given = {"decoder_input_ids": torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], dim=1)}
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, **given, "labels": labels}


class Odd(nn.Module):
    """Its loss is no usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"logits": logits} | ({} if labels is None else {"loss": (logits.sum(-1) - labels).abs().mean() ** 3})


@pytest.mark.parametrize("make", [masked, causal, translating])
@pytest.mark.parametrize("form", ["module", "graph"])
def test_labels_are_compared_as_the_model_itself_compares_them(make: object, form: str) -> None:
    torch.manual_seed(0)
    model, batch = make()  # type: ignore[operator]
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    same = depgraph.trace(model, (), inputs).cut_plan({}).apply(form=form)
    with torch.no_grad():
        own = float(model(**batch).loss)
        assert float(loss_of_form(model, same, batch, None)) == pytest.approx(own, rel=1e-5)
    assert mean_loss(model, same, [batch, batch], None) == pytest.approx(own, rel=1e-5)


def test_an_unusual_loss_must_be_given() -> None:
    model = Odd().eval()
    batch = {"input_ids": torch.randint(0, 20, (2, 6)), "labels": torch.randint(0, 20, (2, 6))}
    same = depgraph.trace(model, (), {"input_ids": batch["input_ids"]}).cut_plan({}).apply(form="graph")
    with torch.no_grad():
        assert float(loss_of_form(model, model, batch, None)) == pytest.approx(float(model(**batch)["loss"]))
        with pytest.raises(ScoreError, match="isn't computed from its logits and labels by a formula that is known"):
            loss_of_form(model, same, batch, None)
