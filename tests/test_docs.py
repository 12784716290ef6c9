"""Every Python block of README and of the documentation runs, page by page, from top to bottom."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import fastrel
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]

VIT = """
model = timm.create_model("vit_tiny_patch16_224")
explainer, images = fastrel.Explainer(model), torch.randn(2, 3, 224, 224)
"""

#: What the blocks of a page take for granted, by their number.
GIVEN: dict[str, dict[int, str]] = {
    "README.md": {
        0: 'images, photo = torch.randn(2, 3, 224, 224), Image.new("RGB", (224, 224))',
        1: """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer, texts = AutoTokenizer.from_pretrained("my-bert"), ["a clever film", "a film"]
bert = AutoModelForSequenceClassification.from_pretrained("my-bert")
""",
        2: """
from tests.test_docs import clip, gpt
explainer, explanation = fastrel.Explainer(gpt()), clip()
prompt_ids = reply_ids = ids = torch.randint(0, 50, (2, 5))
mask, tokens = torch.ones_like(ids), list("abcdefg")
""",
    },
    "docs/guides/data-sets.md": {1: 'pictures = [Image.new("RGB", (64, 64))]'},
    "docs/serving.md": {0: "import fastrel, timm" + VIT + "loaded = None"},
}

#: How many blocks a page's models have, where two are not enough for what it shows.
BLOCKS = {"docs/guides/own-method.md": 7}


def gpt() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16)).eval()


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**tower, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99}
    config = CLIPConfig(text_config=words, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    ids, pictures = torch.randint(0, 99, (1, 7)), torch.randn(1, 3, 32, 32)
    return fastrel.Explainer(CLIPModel(config).eval())(
        input_ids=ids, pixel_values=pictures, target=lambda out: out.logits_per_image.diagonal()
    )


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


@pytest.fixture
def offline(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names of pretrained models give the same architectures with few blocks of random weights; the current folder has a BERT and
    pictures."""
    import timm

    create = timm.create_model

    def shallow(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        return create(name, **{"depth": BLOCKS.get(page, 2), **options}).eval()

    monkeypatch.setattr(timm, "create_model", shallow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-bert").mkdir()
    tiny.bert_folder(tmp_path / "my-bert")
    tiny.pictures(tmp_path / "photos", 2)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_a_page_runs(page: str, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("page")  # graphs look for the functions that they call in modules
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(torch=torch, Image=Image)
    for i, block in enumerate(blocks(page)):
        exec(GIVEN.get(page, {}).get(i, ""), vars(module))
        exec(compile(block, page, "exec"), vars(module))


def test_the_method_page_names_files_that_hold_what_it_says() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    found = re.findall(r"`([\w/]+\.(?:py|cpp|cu))(?:: ([\w, ]+))?`", text)
    assert len(found) > 20
    for path, names in found:
        file = next((file for file in (ROOT / path, ROOT / "fastrel" / path) if file.is_file()), None)
        assert file, path
        for name in filter(None, names.split(", ")):
            assert re.search(rf"\b{name}\b", file.read_text()), f"{path}: {name}"


def test_every_public_name_says_what_it_is_in_the_reference() -> None:
    """That methods and modules have docstrings too, ruff asks (D1)."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    public = [name for name in fastrel.__all__ if not name.startswith("_")]
    assert [
        name for name in public if f"fastrel.{name}" not in named and f"fastrel.{fastrel._HOMES[name]}" not in named
    ] == []
    assert [name for name in public if not getattr(fastrel, name).__doc__] == []
    parts = {part for one in named for part in one.split(".")[1:2]}
    assert set(fastrel._PACKAGES) <= parts
