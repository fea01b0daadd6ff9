"""A tokenizer's tokens, kinds, scores and merges as GGUF tells them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers

from depgraph.errors import ExportError
from exporters.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary


def of_pieces() -> transformers.PreTrainedTokenizerFast:
    """Pieces joined by merges, with bytes to fall back on, and a beginning before every text."""
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "ba"]
    model = tokenizers.models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[("a", "b"), ("▁", "ab"), ("b", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens={}
    )


def of_bytes(split: pre_tokenizers.PreTokenizer) -> transformers.PreTrainedTokenizerFast:
    """Bytes joined by merges, text cut as `split` says."""
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<end>": 3}, merges=[("a", "b")])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = split
    made.add_tokens(["extra"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def test_pieces_have_kinds_and_scores_in_the_order_of_merges() -> None:
    found = vocabulary(of_pieces(), 12)
    assert found.kind == "llama" and found.tokens[7:] == ("ab", "▁ab", "ba", "[PAD10]", "[PAD11]")
    assert found.kinds == (
        UNKNOWN,
        CONTROL,
        CONTROL,
        BYTE,
        NORMAL,
        NORMAL,
        NORMAL,
        NORMAL,
        NORMAL,
        NORMAL,
        UNUSED,
        UNUSED,
    )
    assert found.scores[7] > found.scores[8] > found.scores[9] > found.scores[4]
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert found.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}


def test_bytes_have_merges_and_the_name_of_how_text_is_cut() -> None:
    found = vocabulary(of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)), 5)
    assert (found.kind, found.split, found.merges) == ("gpt2", "gpt-2", ("a b",))
    assert found.kinds == (NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED)


def test_an_unknown_way_of_cutting_can_be_named() -> None:
    tokenizer = of_bytes(pre_tokenizers.Split(tokenizers.Regex("x"), "isolated"))
    with pytest.raises(ExportError, match=r'GgufOptions\(split="\.\.\."\)'):
        vocabulary(tokenizer, 5)
    assert vocabulary(tokenizer, 5, "mine").split == "mine"


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has 10 tokens, the model 9"):
        vocabulary(of_pieces(), 9)
    with pytest.raises(ExportError, match="holds no tokenizer"):
        vocabulary(tmp_path, 9)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ExportError, match="of kind BPE, this one is WordLevel"):
        vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=words), 9)
    with pytest.raises(ExportError, match="no fast tokenizer"):
        vocabulary(object(), 9)


def test_a_folder_names_its_tokenizer(tmp_path: Path) -> None:
    of_pieces().save_pretrained(tmp_path)
    assert vocabulary(tmp_path, 10).tokens == vocabulary(of_pieces(), 10).tokens
