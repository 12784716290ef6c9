"""Which architectures fastrel explains: verifies one of each, and writes docs/coverage.md.

    python scripts/coverage.py [--only SUBSTRING …] [--anew]

Interrupted, it goes on where it was; `--only` examines some again.

Every transformer module of timm (the smallest model of each, random weights) and Hugging Face classifiers, which are small but have
the options of their default configurations (caches among the outputs, say). Each runs `Explainer.verify` in a process of its own
with a time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

#: What was found so far; `--only` brings a part of it up to date.
STORE = Path(__file__).resolve().parent.parent / "results" / "coverage.json"

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

_TEXT = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip

#: Configuration class: what differs from the small configuration.
TEXT: dict[str, dict[str, Any]] = {
    "Bert": {}, "Roberta": {}, "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16}, "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "MPNet": {}, "ModernBert": {}, "Camembert": {}, "XLMRoberta": {},
    "RoFormer": {"embedding_size": 32}, "Ernie": {}, "MegatronBert": {}, "Nystromformer": {}, "ConvBert": {"embedding_size": 32},
    "SqueezeBert": {"embedding_size": 32}, "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "FNet": {}, "Esm": {"mask_token_id": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPTNeoX": {}, "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "Llama": {}, "Mistral": {},
    "Qwen2": {}, "Qwen3": {}, "Gemma": {}, "Gemma2": {}, "Phi": {}, "Phi3": {}, "StableLm": {}, "Starcoder2": {}, "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "CTRL": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64},
    "BigBird": {"attention_type": "original_full"}, "Data2VecText": {}, "Xmod": {"languages": ["en"], "default_language": "en"}, "Glm": {}, "Olmo2": {},
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


def timm_case(name: str) -> tuple[Any, dict[str, Any]]:
    """A model and one batch of inputs."""
    import timm

    # Depth does not change what kinds of nodes there are; the largest take too long whole.
    shallow = {"depth": 2} if any(size in name for size in ("base", "large", "dinov2", "16_384")) else {}
    try:
        model = timm.create_model(name, num_classes=10, **shallow).eval()
    except TypeError:
        model = timm.create_model(name, num_classes=10).eval()
    return model, {"x": torch.randn(2, *model.pretrained_cfg["input_size"])}


def transformers_case(kind: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A small random model and one batch of inputs."""
    import transformers

    small, changes = {
        "text": (_TEXT, TEXT),
        "vision": (_VISION, VISION),
        "hierarchical": ({"num_labels": 3}, HIERARCHICAL),
    }[kind]
    changes = changes[name]
    config = getattr(transformers, f"{name}Config")(**{**small, **changes})
    if name in ("Siglip", "CLIP", "Siglip2"):
        config = getattr(transformers, f"{name}Config")(vision_config={**small, **changes}, num_labels=3)
    if kind == "text":
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        ids = torch.randint(5, 100, (2, 12))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    size = getattr(getattr(config, "vision_config", config), "image_size", 224)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


def examine(build: Callable[[], tuple[Any, dict[str, Any]]], send: Any) -> None:
    """Verify one model and send (verdict, remark, seconds)."""
    import warnings

    import fastrel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        model, given = build()
    except Exception as error:
        send.send(("not built", f"{type(error).__name__}: {error}".splitlines()[0][:160], 0.0))
        return
    start = time.perf_counter()
    try:
        report = fastrel.Explainer(model).verify(**given)
        failed = ", ".join(f"{c.name} {c.value:.1e}" for c in report.checks if not c.ok)
        unchecked = ", ".join(c.name for c in report.checks if "not checked" in c.meaning or "not to be had" in c.meaning)
        maps = "; ".join(shape if len(report.maps) == 1 else f"{name}: {shape}" for name, shape in report.maps.items())
        remark = f"{report.blocks} blocks; {maps}"
        remark += f"; generic: {', '.join(report.generic[:2])}" if report.generic else ""
        verdict = f"failed: {failed}" if failed else f"ok but {unchecked}" if unchecked else "ok"
        send.send((verdict, remark, time.perf_counter() - start))
    except fastrel.FastrelError as error:
        send.send(("refused", str(error).splitlines()[0][:200], time.perf_counter() - start))
    except Exception as error:
        send.send(("CRASHED", f"{type(error).__name__}: {error}".splitlines()[0][:200], time.perf_counter() - start))


def run(build: Callable[[], tuple[Any, dict[str, Any]]], limit: float) -> tuple[str, str, float]:
    """`examine` in a process of its own, at most `limit` seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=examine, args=(build, send))
    process.start()
    found = receive.recv() if receive.poll(limit) else ("timed out", f"after {limit:.0f} s", limit)
    process.kill()
    process.join()
    return found


def main() -> None:
    """Examine everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="only architectures whose name holds one of these")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "docs" / "coverage.md"))
    parser.add_argument("--limit", type=float, default=300, help="seconds per model (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: %(default)s)")
    parser.add_argument("--anew", action="store_true", help="forget what was found before")
    options = parser.parse_args()
    import timm  # noqa: F401  (imported once, before the processes fork)
    import transformers  # noqa: F401

    import fastrel  # noqa: F401

    cases: list[tuple[str, str, Callable[[], tuple[Any, dict[str, Any]]]]] = []
    for family, names in TIMM.items():
        cases += [(f"timm, {family}", name, lambda name=name: timm_case(name)) for name in names.split()]
    for kind, found in (("text", TEXT), ("vision", VISION), ("hierarchical", HIERARCHICAL)):
        group = "Hugging Face, text" if kind == "text" else "Hugging Face, vision"
        cases += [(group, name, lambda kind=kind, name=name: transformers_case(kind, name)) for name in found]
    results: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() and not options.anew else {}
    if options.only:
        chosen = [c for c in cases if any(part in f"{c[0]} {c[1]}" for part in options.only)]
    else:
        chosen = [c for c in cases if f"{c[0]}/{c[1]}" not in results]

    def one(case: tuple[str, str, Any]) -> None:
        group, name, build = case
        verdict, remark, seconds = run(build, options.limit)
        print(f"{group:24} {name:36} {verdict:20} {remark} ({seconds:.0f} s)", flush=True)
        results[f"{group}/{name}"] = [verdict, remark]
        STORE.parent.mkdir(exist_ok=True)
        STORE.write_text(json.dumps(results))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, chosen))
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for group, name, _ in cases:
        if f"{group}/{name}" in results:
            rows.setdefault(group, []).append((name, *results[f"{group}/{name}"]))
    Path(options.out).write_text(page(rows))


def page(rows: dict[str, list[tuple[str, str, str]]]) -> str:
    """The Markdown of docs/coverage.md."""
    built = {group: [row for row in found if row[1] != "not built"] for group, found in rows.items()}

    def count(groups: list[str]) -> str:
        found = [row for group in groups for row in built.get(group, [])]
        ok = sum(row[1] == "ok" for row in found)
        part = sum(row[1].startswith("ok but") for row in found)
        return f"{ok + part} of {len(found)}" + (f" ({part} with a check that could not be made)" if part else "")

    timm_groups = [group for group in built if group.startswith("timm")]
    plain = [f"timm, {family}" for family in PLAIN]
    lines = [
        "# Coverage\n",
        "One of each architecture as its library delivers it, random weights, through `Explainer.verify`. *ok*: the outputs are the live",
        "model's, the relevance of every attention map is that of the second path in float64, rows add up, the gradient is autograd's, maps",
        "in float32 are those in float64, a batch gives what its samples give one by one, and rounding moves nothing. *ok but …*: a check",
        "that could not be made on this model. *generic*: an operator without a rule of its own, which the explanation's `report` names.",
        "*refused*: an error that names the operator, never a wrong map. Of timm's base and large models and DINOv2, two blocks were built.",
        "Made by `python scripts/coverage.py`.\n",
        "The method chains attention maps over tokens. Models that have none are refused: factorised, additive or channel attention (CoaT,",
        "EdgeNeXt, EfficientViT-B, MobileViTv2, SwiftFormer), pooling or Fourier mixing (PoolFormer, FNet), lambda layers. Where a model has both",
        "kinds (XCiT, DaViT), maps over tokens are chained and relevance passes through the others by the rule of products.\n",
        f"- timm, plain ViT-like families: {count(plain)} pass",
        f"- timm, all: {count(timm_groups)} pass",
        f"- Hugging Face text classifiers: {count(['Hugging Face, text'])} pass",
        f"- Hugging Face image classifiers: {count(['Hugging Face, vision'])} pass\n",
    ]
    for group, found in built.items():
        lines += [f"## {group}\n", "| model | verdict | |", "|---|---|---|"]
        lines += [f"| {name} | {verdict} | {remark.replace('|', '/')} |" for name, verdict, remark in found]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
