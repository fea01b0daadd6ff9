"""Small random configurations of architectures in transformers, each as the class that a user would prune.

Sizes are unequal wherever the configuration allows, so that nothing is right by accident: 8 heads of 12, an inner width
of 80, a vocabulary of 101, 7 tokens. With partial rotary embeddings: 6 heads of 20, of which 8 (four pairs) turn.
"""

from __future__ import annotations

from .configured import (
    IDS,
    LABELS,
    VOCAB,
    bert_text,
    build,
    encoder_text,
    image,
    speech,
    text,
    text_and_image,
    text_pair,
    three_texts,
)
from .example import Builder, seeded

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 80}
WIDE = {**HEADS, "hidden_size": 96}  # 8 heads of 12
FREE = {**HEADS, "hidden_size": 56, "head_dim": 12}  # where the head dimension is a setting of its own
PARTIAL = {**HEADS, "hidden_size": 120, "num_attention_heads": 6}  # 6 heads of 20
WORDS = {**IDS, "vocab_size": VOCAB, "max_position_embeddings": 33}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}}
GEMMA = {
    **FREE,
    **WORDS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
SEQ2SEQ = {
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 1,
    **IDS,
}
RESNET = {"embedding_size": 20, "hidden_sizes": [32, 56], "depths": [2, 2], "num_labels": LABELS}


def llama(kv_heads: int, tied: bool = False) -> Builder:
    settings = {**FREE, **WORDS, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    return build("LlamaForCausalLM", "LlamaConfig", three_texts, **settings)


VISION: dict[str, Builder] = {
    "resnet_basic": build("ResNetForImageClassification", "ResNetConfig", image(33), layer_type="basic", **RESNET),
    "resnet_bottleneck": build("ResNetForImageClassification", "ResNetConfig", image(33), **RESNET),
    "regnet": build(
        "RegNetForImageClassification",
        "RegNetConfig",
        image(33),
        embedding_size=36,
        hidden_sizes=[40, 56],
        depths=[2, 2],
        groups_width=8,
        num_labels=LABELS,
    ),
    "mobilenet_v2": build(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        image(65),
        depth_multiplier=0.35,
        num_labels=LABELS,
    ),
    "convnext": build(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        image(32),
        num_stages=2,
        hidden_sizes=[24, 40],
        depths=[2, 2],
        num_labels=LABELS,
    ),
    "vit": build(
        "ViTForImageClassification", "ViTConfig", image(24), **WIDE, image_size=24, patch_size=6, num_labels=LABELS
    ),
    "swin": build(  # 12 x 12 and 6 x 6 patches in shifted windows of 3 x 3
        "SwinForImageClassification",
        "SwinConfig",
        image(48),
        image_size=48,
        patch_size=4,
        embed_dim=48,
        depths=[2, 2],
        num_heads=[4, 8],
        window_size=3,
        mlp_ratio=1.75,
        num_labels=LABELS,
    ),
    "segformer": build(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        image(40),
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[44, 96],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[4, 8],
        mlp_ratios=[3, 2],
        decoder_hidden_size=40,
        num_labels=LABELS,
    ),
    "dinov2": build(  # the image is larger than the position table's, as with the published checkpoints
        "Dinov2ForImageClassification",
        "Dinov2Config",
        image(30),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        mlp_ratio=2,
        image_size=24,
        patch_size=6,
        num_labels=LABELS,
    ),
    "clip": build(
        "CLIPModel",
        "CLIPConfig",
        text_and_image,
        projection_dim=40,
        text_config={**WIDE, **WORDS},
        vision_config={**HEADS, "hidden_size": 80, "intermediate_size": 112, "image_size": 24, "patch_size": 6},
    ),
}

ENCODERS: dict[str, Builder] = {
    "bert_masked_lm": build("BertForMaskedLM", "BertConfig", bert_text, **WIDE, **WORDS),
    "bert_classifier": build(
        "BertForSequenceClassification", "BertConfig", bert_text, **WIDE, **WORDS, num_labels=LABELS
    ),
    "distilbert": build(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        encoder_text,
        dim=96,
        n_layers=2,
        n_heads=8,
        hidden_dim=80,
        num_labels=LABELS,
        **WORDS,
    ),
    "deberta_v2": build(  # the settings of the published checkpoints, smaller
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        encoder_text,
        **WIDE,
        **WORDS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=10,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        max_relative_positions=-1,
        position_biased_input=False,
        num_labels=LABELS,
    ),
}

ENCODER_DECODERS: dict[str, Builder] = {
    "t5": build(
        "T5ForConditionalGeneration",
        "T5Config",
        text_pair,
        vocab_size=VOCAB,
        d_model=56,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_heads=8,
        relative_attention_num_buckets=10,
        relative_attention_max_distance=14,
        decoder_start_token_id=0,
    ),
    "bart": build("BartForConditionalGeneration", "BartConfig", text_pair, max_position_embeddings=33, **SEQ2SEQ),
    "whisper": build(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        speech,
        num_mel_bins=20,
        max_source_positions=15,
        max_target_positions=33,
        **SEQ2SEQ,
    ),
}

DECODERS: dict[str, Builder] = {
    "gpt2": build(
        "GPT2LMHeadModel",
        "GPT2Config",
        text,
        vocab_size=VOCAB,
        n_positions=33,
        n_embd=96,
        n_layer=2,
        n_head=8,
        n_inner=80,
        **IDS,
    ),
    "opt": build(
        "OPTForCausalLM",
        "OPTConfig",
        text,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        ffn_dim=80,
        word_embed_proj_dim=96,
        **WORDS,
    ),
    "gptj": build(
        "GPTJForCausalLM",
        "GPTJConfig",
        text,
        vocab_size=VOCAB,
        n_positions=33,
        n_embd=120,
        n_layer=2,
        n_head=6,
        rotary_dim=8,
        n_inner=80,
        **IDS,
    ),
    "gpt_neox": build("GPTNeoXForCausalLM", "GPTNeoXConfig", text, **PARTIAL, **WORDS, **ROTATED),
    "bloom": build(
        "BloomForCausalLM", "BloomConfig", text, vocab_size=VOCAB, hidden_size=96, n_layer=2, n_head=8, **IDS
    ),
    "falcon_multi_query": build(
        "FalconForCausalLM",
        "FalconConfig",
        text,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        ffn_hidden_size=80,
        **WORDS,
    ),
    "falcon_grouped_query": build(
        "FalconForCausalLM",
        "FalconConfig",
        three_texts,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_kv_heads=4,
        new_decoder_architecture=True,
        ffn_hidden_size=80,
        **WORDS,
    ),
    "llama_8_8": llama(8),
    "llama_8_4": llama(4, tied=True),
    "llama_8_2": llama(2),
    "llama_8_1": llama(1),
    "qwen3": build("Qwen3ForCausalLM", "Qwen3Config", three_texts, **FREE, **WORDS, num_key_value_heads=4),
    "gemma2": build("Gemma2ForCausalLM", "Gemma2Config", three_texts, **GEMMA),
    "gemma3": build("Gemma3ForCausalLM", "Gemma3TextConfig", three_texts, **GEMMA),
    "phi": build("PhiForCausalLM", "PhiConfig", text, **PARTIAL, **WORDS, **ROTATED),
    "phi3": build(
        "Phi3ForCausalLM",
        "Phi3Config",
        three_texts,
        **WIDE,
        **WORDS,
        num_key_value_heads=4,
        original_max_position_embeddings=33,
    ),
    "stablelm": build(
        "StableLmForCausalLM", "StableLmConfig", text, **PARTIAL, **WORDS, **ROTATED, num_key_value_heads=6
    ),
    "olmo2": build("Olmo2ForCausalLM", "Olmo2Config", three_texts, **WIDE, **WORDS, num_key_value_heads=4),
    "mamba": build(
        "MambaForCausalLM",
        "MambaConfig",
        text,
        vocab_size=VOCAB,
        hidden_size=44,
        state_size=10,
        num_hidden_layers=2,
        time_step_rank=9,
        **IDS,
    ),
}

EXPERTS = {**FREE, **WORDS, "num_key_value_heads": 4, "num_experts_per_tok": 2}

MIXTURES: dict[str, Builder] = {
    "mixtral": build("MixtralForCausalLM", "MixtralConfig", three_texts, **EXPERTS, num_local_experts=6),
    "gpt_oss": build(
        "GptOssForCausalLM",
        "GptOssConfig",
        three_texts,
        **EXPERTS,
        num_local_experts=6,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": build(  # two of three sets of four experts are chosen first
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        three_texts,
        **{**WIDE, **WORDS},
        num_key_value_heads=8,
        n_routed_experts=12,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=20,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
    ),
}

FAMILIES = (VISION, ENCODERS, ENCODER_DECODERS, DECODERS, MIXTURES)

ZOO: dict[str, Builder] = {name: seeded(name, make) for family in FAMILIES for name, make in family.items()}
