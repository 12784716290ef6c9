"""The models that `scripts/coverage.py` examines: small, with random weights, as their libraries deliver them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: timm modules that hold attention, and what to build of each. Names, not patterns: the smallest of every architecture.
TIMM = {
    "vit": "vit_tiny_patch16_224 vit_small_patch32_224 vit_tiny_patch16_384 flexivit_small vit_base_patch16_rpn_224",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224",
    "eva": "eva02_tiny_patch14_224 eva02_base_patch14_224 eva_large_patch14_196",
    "dino": "vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3",
    "siglip and clip": "vit_base_patch32_siglip_256 vit_base_patch32_clip_224 vit_base_patch16_siglip_gap_224",
    "other plain": "vit_little_patch16_reg4_gap_256 vit_medium_patch16_gap_240 vit_pwee_patch16_reg1_gap_256 vit_wee_patch16_reg1_gap_256 "
    "vit_base_patch16_xp_224 vit_dpwee_patch16_reg1_gap_256 aimv2_large_patch14_224",
    "relative positions": "vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_relpos_base_patch32_plus_rpn_256",
    "rope": "vit_small_patch16_rope_224 vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224",
    "hybrid": "vit_tiny_r_s16_p8_224 vit_small_r26_s32_224",
    "sam and hiera": "samvit_base_patch16_224 hiera_tiny_224",
    "cait": "cait_xxs24_224",
    "xcit": "xcit_nano_12_p16_224",
    "swin": "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224",
    "maxvit": "maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 coatnet_pico_rw_224 coatnet_0_rw_224 coatnext_nano_rw_224 maxxvit_rmlp_nano_rw_256",
    "pvt": "pvt_v2_b0",
    "twins": "twins_pcpvt_small twins_svt_small",
    "mvit": "mvitv2_tiny",
    "levit": "levit_128s levit_conv_128s",
    "volo": "volo_d1_224",
    "nest": "nest_tiny jx_nest_tiny",
    "crossvit": "crossvit_tiny_240",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "davit": "davit_tiny",
    "gcvit": "gcvit_xxtiny",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "visformer": "visformer_tiny",
    "vitamin": "vitamin_small_224",
    "tiny_vit": "tiny_vit_5m_224",
    "edgenext": "edgenext_xx_small",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "efficientformer": "efficientformer_l1 efficientformerv2_s0",
    "efficientvit": "efficientvit_b0 efficientvit_m0",
    "fastvit": "fastvit_sa12",
    "nextvit": "nextvit_small",
    "caformer": "caformer_s18",
    "botnet and halonet": "botnet26t_256 halonet26t lamhalobotnet50ts_256",
    "naflexvit": "naflexvit_base_patch16_gap",
    "repghost and others": "shvit_s1 swiftformer_xs",
}
PLAIN = (
    "vit",
    "deit",
    "beit",
    "eva",
    "dino",
    "siglip and clip",
    "other plain",
    "relative positions",
    "rope",
    "sam and hiera",
    "cait",
)

_SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2,
    "head_dim": 8,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "d_model": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 64,
    "decoder_start_token_id": 0,
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_LOCAL = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}

#: Text classifiers: type of model, and what differs from the small configuration.
TEXT: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16}, "arcee": {}, "bart": _BART, "bert": {}, "big_bird": {"attention_type": "original_full"}, "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4}, "camembert": {}, "canine": {"local_transformer_stride": 4, "num_hash_buckets": 64},
    "convbert": {"embedding_size": 32}, "ctrl": {**_GPT2, "dff": 64}, "data2vec-text": {}, "deberta": _DEBERTA, "deberta-v2": _DEBERTA,
    "diffllama": {}, "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "doge": {}, "electra": {"embedding_size": 16},
    "ernie": {}, "esm": {"mask_token_id": 4}, "eurobert": {}, "exaone4": {}, "flaubert": _XLM, "fnet": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "glm": {}, "glm4": {}, "gpt2": _GPT2, "gpt_bigcode": _GPT2, "gpt_neo": _LOCAL, "gpt_neox": {}, "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}, "helium": {}, "hunyuan_v1_dense": {}, "ibert": {}, "jetmoe": {"kv_channels": 8},
    "layoutlm": {}, "llama": {}, "longformer": {"attention_window": 8}, "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "markuplm": {"max_depth": 4}, "mbart": _BART, "megatron-bert": {}, "ministral": {}, "mistral": {}, "mixtral": {"num_local_experts": 2},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}, "modernbert": {}, "modernbert-decoder": {},
    "mpnet": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}, "mvp": _BART, "nemotron": {}, "nomic_bert": {}, "nystromformer": {}, "olmo": {},
    "olmo2": {}, "olmo3": {}, "openai-gpt": {**_GPT2, "n_positions": 64}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {},
    "phi3": {}, "phimoe": {"num_local_experts": 2}, "plbart": _BART, "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}, "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16}, "rembert": {"input_embedding_size": 16}, "roberta": {},
    "roberta-prelayernorm": {}, "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": 100, "shape_vocab_size": 100},
    "roformer": {"embedding_size": 32}, "seed_oss": {}, "smollm3": {}, "squeezebert": {"embedding_size": 32}, "stablelm": {}, "starcoder2": {}, "t5": _T5,
    "tapas": {}, "umt5": _T5, "xlm": _XLM, "xlm-roberta": {}, "xlm-roberta-xl": {}, "xmod": {"languages": ["en"], "default_language": "en"}, "yoso": {},
}  # fmt: skip

#: Language models, asked for one token after the last.
CAUSAL: dict[str, dict[str, Any]] = {
    "biogpt": {}, "bloom": {"n_layer": 2, "n_head": 4}, "cohere": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gpt2": _GPT2, "gpt_neo": _LOCAL,
    "gpt_neox": {}, "gptj": {**_GPT2, "rotary_dim": 4}, "granite": {}, "llama": {}, "mistral": {}, "mixtral": {"num_local_experts": 2}, "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}, "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}  # fmt: skip

#: Encoder–decoders, asked for one token after the last of the decoder.
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _BART, "blenderbot": _BART, "led": {**_BART, "attention_window": 8}, "longt5": {**_T5, "local_radius": 4}, "m2m_100": _BART,
    "marian": _BART, "mbart": _BART, "mt5": _T5, "mvp": _BART, "nllb-moe": {**_BART, "num_experts": 2}, "pegasus": _BART, "plbart": _BART,
    "switch_transformers": {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, "t5": _T5, "umt5": _T5,
}  # fmt: skip

VISION: dict[str, dict[str, Any]] = {
    "ViT": {}, "DeiT": {}, "Beit": {}, "Dinov2": {}, "Dinov2WithRegisters": {}, "ViTMSN": {}, "Data2VecVision": {}, "IJepa": {},
    "Siglip": {}, "CLIP": {},
}  # fmt: skip
#: Hierarchical ones, whose configurations have little in common.
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 64},
    "Swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 64},
    "Pvt": {"image_size": 64}, "PvtV2": {"image_size": 64}, "Segformer": {}, "MobileViT": {}, "MobileViTV2": {}, "Levit": {}, "Cvt": {},
    "Hiera": {}, "PoolFormer": {}, "SwiftFormer": {},
}  # fmt: skip

_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_WORDS = {
    **_TOWER,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYES = {**_TOWER, "image_size": 32, "patch_size": 8}


@dataclass
class Case:
    """A model, one batch of its inputs, what is asked of it where that is no class, and all that it says there, [B, C]."""

    model: Any
    inputs: dict[str, Any]
    target: Any = None
    answer: Any = None


def cases() -> Iterator[tuple[str, str, Callable[[], Case]]]:
    """(group, name, what builds it) of everything."""
    for family, names in TIMM.items():
        for name in names.split():
            yield f"timm, {family}", name, lambda name=name: _timm(name)
    for name in TEXT:
        yield "Hugging Face, text", name, lambda name=name: _text("AutoModelForSequenceClassification", name, TEXT[name])
    for name in CAUSAL:
        yield "Hugging Face, language models", name, lambda name=name: _text("AutoModelForCausalLM", name, CAUSAL[name])
    for name in ENCODER_DECODERS:
        yield (
            "Hugging Face, encoder–decoders",
            name,
            lambda name=name: _text("AutoModelForSeq2SeqLM", name, ENCODER_DECODERS[name]),
        )
    for name in VISION:
        yield "Hugging Face, vision", name, lambda name=name: _pictures(name, _VISION, VISION[name])
    for name in HIERARCHICAL:
        yield "Hugging Face, vision", name, lambda name=name: _pictures(name, {"num_labels": 3}, HIERARCHICAL[name])
    for group, several in (("several inputs", SEVERAL), ("sound, film, series", SIGNALS)):
        for name, build in several.items():
            yield f"Hugging Face, {group}", name, build


def _timm(name: str) -> Case:
    import timm

    # Depth does not change what kinds of nodes there are; the largest take too long whole.
    shallow = {"depth": 2} if any(size in name for size in ("base", "large", "dinov2", "16_384")) else {}
    # Linear attention has no map until it is explained; of 3,137 tokens of each of many blocks, all at once, verify holds too much.
    size = {"coat_lite_tiny": 112, "coat_tiny": 128}.get(name)
    smaller = {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, num_classes=10, **shallow, **smaller).eval()
    except TypeError:
        model = timm.create_model(name, num_classes=10).eval()
    shape = model.pretrained_cfg["input_size"] if size is None else (3, size, size)
    return Case(model, {"x": torch.randn(2, *shape)})


def _ids(length: int = 12) -> Tensor:
    ids = torch.randint(5, 100, (2, length))
    ids[:, -1] = 2  # BART reads at the end of the text
    return ids


def _last(out: Any) -> Tensor:
    return out.logits[:, -1, 7]


def _word(out: Any) -> Tensor:
    return out.logits[:, -1]


def _text(auto: str, name: str, changes: dict[str, Any]) -> Case:
    import transformers

    config = transformers.AutoConfig.for_model(name, **{**_SMALL, **changes})
    ids = _ids()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "Seq2Seq" in auto:
        given["decoder_input_ids"] = _ids(4)
    model = getattr(transformers, auto).from_config(config).eval()
    return Case(model, given) if "Classification" in auto else Case(model, given, _last, _word)


def _pictures(name: str, small: dict[str, Any], changes: dict[str, Any]) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**small, **changes})
    if name in ("Siglip", "CLIP", "Siglip2"):
        config = getattr(transformers, f"{name}Config")(vision_config={**small, **changes}, num_labels=3)
    config.architectures = [f"{name}ForImageClassification"]
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    size = getattr(getattr(config, "vision_config", config), "image_size", 224)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return Case(model, {"pixel_values": torch.randn(2, 3, size, size)})


def _made(model: str, target: Any = None, /, **config: Any) -> Callable[..., Case]:
    """A builder of a Hugging Face model of this configuration; its inputs are given at the call."""

    def build(**inputs: Callable[[], Any]) -> Case:
        import transformers

        kind = getattr(transformers, model)
        given = {name: make() for name, make in inputs.items()}
        return Case(kind(kind.config_class(**config)).eval(), given, target, _word if target is _last else None)

    return build


def _picture() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def _pairs(out: Any) -> Tensor:
    return out.logits_per_image.diagonal()


def _both(model: str, target: Any, **config: Any) -> Callable[[], Case]:
    return lambda: _made(model, target, **config)(input_ids=_ids, pixel_values=_picture)


#: Models of several inputs.
SEVERAL: dict[str, Callable[[], Case]] = {
    "CLIP": _both("CLIPModel", _pairs, text_config=_WORDS, vision_config=_EYES, projection_dim=16),
    "SigLIP": _both("SiglipModel", _pairs, text_config=_WORDS, vision_config=_EYES),
    "AltCLIP": _both("AltCLIPModel", _pairs, text_config={**_WORDS, "project_dim": 16}, vision_config=_EYES, projection_dim=16),
    "Chinese-CLIP": _both("ChineseCLIPModel", _pairs, text_config=_WORDS, vision_config=_EYES, projection_dim=16),
    "BLIP, matching": _both("BlipForImageTextRetrieval", lambda out: out.itm_score[:, 1], text_config={**_WORDS, "encoder_hidden_size": 32}, vision_config=_EYES, image_text_hidden_size=16),
    "ViLT": _both("ViltForQuestionAnswering", None, **_WORDS, image_size=32, patch_size=8, num_labels=4),
    "VisualBERT": lambda: _made("VisualBertForVisualReasoning", **_WORDS, visual_embedding_dim=8, num_labels=2)(
        input_ids=_ids, visual_embeds=lambda: torch.randn(2, 4, 8), visual_attention_mask=lambda: torch.ones(2, 4), attention_mask=lambda: torch.ones(2, 12)
    ),
    "LXMERT": lambda: _made(
        "LxmertForQuestionAnswering", lambda out: out.question_answering_score[:, 1], **_WORDS, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=8, num_qa_labels=4
    )(input_ids=_ids, visual_feats=lambda: torch.randn(2, 4, 8), visual_pos=lambda: torch.rand(2, 4, 4)),
    "BridgeTower": _both("BridgeTowerForImageAndTextRetrieval", None, text_config={**_WORDS, "hidden_size": 64}, vision_config={**_EYES, "hidden_size": 64}, hidden_size=64, num_attention_heads=2, num_hidden_layers=2),
    "FLAVA": _both("FlavaModel", lambda out: out.multimodal_embeddings[:, 0, 3], text_config=_WORDS, image_config=_EYES, multimodal_config=_TOWER, hidden_size=32, projection_dim=16),
    "OWL-ViT": _both("OwlViTModel", _pairs, text_config=_WORDS, vision_config=_EYES, projection_dim=16),
    "CLIPSeg": _both("CLIPSegModel", _pairs, text_config=_WORDS, vision_config=_EYES, projection_dim=16),
    "LayoutLMv3": lambda: _made(
        "LayoutLMv3ForSequenceClassification", **_WORDS, num_labels=3, input_size=32, patch_size=8, coordinate_size=5, shape_size=6, max_2d_position_embeddings=64
    )(input_ids=_ids, bbox=lambda: torch.randint(0, 60, (2, 12, 4)).sort(2).values, pixel_values=_picture),
    "Encoder–decoder of BERTs": lambda: _encoder_decoder(),
    "Vision encoder–decoder": lambda: _vision_encoder_decoder(),
}  # fmt: skip


def _encoder_decoder() -> Case:
    import transformers as t

    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(**_WORDS), t.BertConfig(**_WORDS))
    return Case(t.EncoderDecoderModel(config).eval(), {"input_ids": _ids(), "decoder_input_ids": _ids(4)}, _last, _word)


def _vision_encoder_decoder() -> Case:
    import transformers as t

    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        t.ViTConfig(**_EYES), t.GPT2Config(**_GPT2, vocab_size=100)
    )
    return Case(
        t.VisionEncoderDecoderModel(config).eval(),
        {"pixel_values": _picture(), "decoder_input_ids": _ids(4)},
        _last,
        _word,
    )


_FILM = {**_EYES, "num_frames": 4, "num_labels": 3}
_SOUND = {
    **_TOWER, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 3,
}  # fmt: skip


def _sound(model: str, **changes: Any) -> Callable[[], Case]:
    return lambda: _made(model, **{**_SOUND, **changes})(input_values=lambda: torch.randn(2, 800))


#: Models of sound, film and series of numbers.
SIGNALS: dict[str, Callable[[], Case]] = {
    "VideoMAE": lambda: _made("VideoMAEForVideoClassification", **_FILM, tubelet_size=2)(pixel_values=lambda: torch.randn(2, 4, 3, 32, 32)),
    "ViViT": lambda: _made("VivitForVideoClassification", **_FILM, tubelet_size=[2, 8, 8])(pixel_values=lambda: torch.randn(2, 4, 3, 32, 32)),
    "TimeSformer": lambda: _made("TimesformerForVideoClassification", **_FILM)(pixel_values=lambda: torch.randn(2, 4, 3, 32, 32)),
    "AST": lambda: _made("ASTForAudioClassification", **_TOWER, num_mel_bins=32, max_length=64, patch_size=16, num_labels=3)(input_values=lambda: torch.randn(2, 64, 32)),
    "wav2vec 2": _sound("Wav2Vec2ForSequenceClassification"),
    "HuBERT": _sound("HubertForSequenceClassification"),
    "WavLM": _sound("WavLMForSequenceClassification"),
    "UniSpeech": _sound("UniSpeechForSequenceClassification"),
    "data2vec-audio": _sound("Data2VecAudioForSequenceClassification", conv_pos_kernel_size=4, num_conv_pos_embeddings=2),
    "Whisper, classifier": lambda: _made("WhisperForAudioClassification", d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, max_source_positions=20, num_mel_bins=8, classifier_proj_size=8, num_labels=3)(input_features=lambda: torch.randn(2, 8, 40)),
    "Whisper": lambda: _made("WhisperForConditionalGeneration", _last, **_BART, vocab_size=100, max_source_positions=20, num_mel_bins=8, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2)(
        input_features=lambda: torch.randn(2, 8, 40), decoder_input_ids=lambda: _ids(4)
    ),
    "PatchTST": lambda: _made("PatchTSTForClassification", lambda out: out.prediction_logits[:, 0], num_input_channels=2, num_targets=3, context_length=32, patch_length=8, patch_stride=8, d_model=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, use_cls_token=True)(past_values=lambda: torch.randn(2, 32, 2)),
}  # fmt: skip
