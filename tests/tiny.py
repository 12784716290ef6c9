"""Tiny models as their libraries write them to folders, and functions that `MODULE:FUNCTION` names."""

import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastrel.data.preprocessing import Preprocessing

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "grip", "##ping", "clever", "film", ",")
_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def vit() -> nn.Module:
    """`tests.tiny:vit`: 32 x 32 pixels, 7 classes, prepared by its `pretrained_cfg`."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    return model


class Deadly:
    """A preprocessing that kills its process at red pictures; with a file, only if it is not there yet, and makes it."""

    def __init__(self, once: str | None = None) -> None:
        self.once = once

    def __call__(self, image: Image.Image) -> np.ndarray:
        x = np.asarray(image.resize((32, 32)), np.float32).transpose(2, 0, 1) / 255
        if x[0].mean() > 0.9 and x[1].mean() < 0.1 and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            self.die()
        return x

    def die(self) -> None:
        os._exit(1)


def deadly() -> tuple[nn.Module, Deadly]:
    """`tests.tiny:deadly`: `vit` with a preprocessing that kills; FASTREL_TEST_ONCE names the file that ends it."""
    return vit(), Deadly(os.environ.get("FASTREL_TEST_ONCE"))


class Crashing(Deadly):
    """The same by a segmentation fault, as decoders do it."""

    def die(self) -> None:
        faulthandler.disable()  # pytest's would print the stack
        os.kill(os.getpid(), signal.SIGSEGV)


def crashing() -> tuple[nn.Module, Crashing]:
    """`tests.tiny:crashing`: `vit` with such a preprocessing."""
    return vit(), Crashing()


def once() -> tuple[nn.Module, Deadly]:
    """`tests.tiny:once`: the same, but the file `died` in the current folder ends it."""
    return vit(), Deadly("died")


class Slow:
    """A preprocessing that takes a while, so that a run can be killed in the middle."""

    def __init__(self, prepare: Preprocessing) -> None:
        self.prepare = prepare

    def __call__(self, image: Image.Image) -> np.ndarray:
        time.sleep(0.03)
        return self.prepare(image)


def slow() -> tuple[nn.Module, Slow]:
    """`tests.tiny:slow`: `vit`, slowly."""
    return vit(), Slow(Preprocessing((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))


def fatal() -> nn.Module:
    """`tests.tiny:fatal`: no process outlives loading it."""
    os._exit(1)


def pictures(folder: Path, count: int, red: int | None = None) -> Path:
    """Pictures of noise, small; one of them may be red."""
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)
        image = Image.new("RGB", (24, 24), "red") if i == red else Image.fromarray(noise)
        image.save(folder / f"{i:05d}.png", compress_level=0)
    return folder


def bert_folder(folder: Path, **config: Any) -> Path:
    """A classifier of texts with 32 positions."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    options = {**_BERT, "vocab_size": len(WORDS), "max_position_embeddings": 32, "id2label": {0: "negative", 1: "positive"}}
    BertForSequenceClassification(BertConfig(**{**options, **config})).save_pretrained(folder)
    return folder


def vit_folder(folder: Path, **save: Any) -> Path:
    """A classifier of pictures, 32 x 32 pixels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(**_BERT, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog", 2: "zebra"})
    ViTForImageClassification(config).save_pretrained(folder, **save)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def gpt_folder(folder: Path) -> Path:
    """A language model with a byte-level vocabulary: one token per byte, and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, "ba", "bad"])}
    core = Tokenizer(models.BPE(vocabulary, [("b", "a"), ("ba", "d")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=24, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def t5_folder(folder: Path) -> Path:
    """An encoder–decoder with the language model's vocabulary."""
    from transformers import T5Config, T5ForConditionalGeneration

    gpt_folder(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 259}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).save_pretrained(folder)
    return folder


def clip_folder(folder: Path) -> Path:
    """Pictures with text."""
    from transformers import BertTokenizerFast, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16)
    part = {**_BERT, "projection_dim": 24}
    text = {**part, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3}
    config = CLIPConfig(text_config=text, vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=24)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder
