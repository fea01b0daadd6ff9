"""The zoo itself: every example builds, runs to finite values, and is the same each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import MODULES, ZOO

EVERYTHING = {**ZOO, **{f"module-{name}": make for name, make in MODULES.items()}}


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", EVERYTHING)
def test_builds_runs_and_is_deterministic(name: str) -> None:
    state = torch.random.get_rng_state()
    first, second = EVERYTHING[name](), EVERYTHING[name]()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in first.model.modules())

    outputs = tensors(first())
    assert outputs
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, tensors(second()), strict=True))

    weights, others = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_trained_value_is_constant_or_tiny(name: str) -> None:
    for key, parameter in EVERYTHING[name]().model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.01, key


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_output_depends_on_the_input_and_is_of_moderate_size(name: str) -> None:
    example = EVERYTHING[name]()
    main = max((t for t in tensors(example()) if t.is_floating_point()), key=lambda t: t.numel())
    assert 0.01 < float(main.std()) < 1000
    assert not torch.allclose(main[0], main[1], rtol=1e-3)


def test_tied_embeddings_stay_tied() -> None:
    model = ZOO["llama_8_4"]().model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    module = MODULES["tied_weights"]().model
    assert module.output.weight is module.embed.weight


def test_swin_shifts_its_windows() -> None:
    assert any(getattr(module, "shift_size", 0) for module in ZOO["swin"]().model.modules())
