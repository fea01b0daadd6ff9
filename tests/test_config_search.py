"""The search for a config by the sizes that it builds."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from depgraph.config_search import ConfigSearch, dims_of
from depgraph.configs import edited

OLD = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10}
NEW = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
BECAME = {OLD[name]: {NEW[name], 2 * OLD[name]} for name in OLD}


def config(tied: bool = True) -> LlamaConfig:
    return LlamaConfig(**OLD, num_hidden_layers=2, vocab_size=40, tie_word_embeddings=tied)


def searching(wanted: nn.Module, seconds: float = 60) -> ConfigSearch:
    return ConfigSearch(LlamaForCausalLM, config(), dims_of(wanted), BECAME, time.monotonic() + seconds)


def pruned(**other: int) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(edited(config(), {(name,): size for name, size in {**NEW, **other}.items()}))


def test_the_edits_are_found_in_few_builds() -> None:
    wanted = pruned()
    search = searching(wanted)
    found = search.found()
    assert found is not None and search.apart(found) == 0, "eight heads of six build what six of eight do"
    assert search.builds < 30, "each of five steps has about ten changes to choose from"
    with torch.device("meta"):
        assert dims_of(LlamaForCausalLM(edited(config(), found))) == dims_of(wanted)


def test_an_edit_can_be_kept_out() -> None:
    search = searching(pruned())
    assert search.found((("hidden_size",), 48)) is None
    before = search.builds
    assert search.found((("hidden_size",), 48)) is None and search.builds == before, "what was built is known"


@pytest.mark.parametrize("other", [{"intermediate_size": 71}, {"num_hidden_layers": 1}])
def test_sizes_that_nothing_became_are_not_found(other: dict[str, int]) -> None:
    assert searching(pruned(**other)).found() is None


def test_it_ends_in_time_and_a_config_that_is_refused_is_no_answer() -> None:
    assert searching(pruned(), seconds=-1).found() is None
    assert searching(pruned()).apart({("num_attention_heads",): 0}) == math.inf
