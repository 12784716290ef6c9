"""From a name to a model that is fed as its makers meant it, or to an error that says what is missing."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastrel
from fastrel import demo
from fastrel.cli import main
from fastrel.data.preprocessing import Preprocessing
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.models import Loaded, load, matching, state, zero_shot
from tests import hostile, tiny

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))


def explained(loaded: Loaded, *items: object) -> fastrel.Explanation:
    samples = [sample for item in items for sample in loaded.reader(item)]
    args, kwargs = loaded.arguments(loaded.inputs(samples))
    return fastrel.Explainer(loaded.model)(*args, **kwargs)


def test_the_embedded_model_needs_no_name() -> None:
    loaded = load()
    assert (loaded.kind, loaded.class_names, loaded.probabilities) == ("image", demo.CLASSES, "sigmoid")
    scene = Image.open(demo.sample_paths()[0]).convert("RGB")
    assert torch.allclose(loaded.inputs(loaded.reader(scene))["x"], demo.to_input(np.asarray(scene)[None]), atol=1e-6)


def test_timm_by_name_with_weights_of_any_number_of_classes(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = load("vit_tiny_patch16_224", weights=str(tmp_path / name))
        assert len(loaded.class_names) == 7
        assert torch.equal(loaded.model.head.weight, theirs.head.weight)  # type: ignore[union-attr]
    plain = load("vit_tiny_patch16_224", random=True)
    assert plain.class_names[207] == "golden retriever"
    assert plain.reader.prepare == Preprocessing(248, (224, 224), "BICUBIC", (0.5,) * 3, (0.5,) * 3)
    save_file({"head.weight": torch.zeros(7, 192)}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="do not fit 'vit_tiny_patch16_224'"):
        load("vit_tiny_patch16_224", weights=str(tmp_path / "part.safetensors"))


def test_a_folder_of_timm_and_a_name_on_its_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "depth": 1}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    timm.models.save_for_hf(theirs, tmp_path, model_config={"label_names": ["cat", "dog", "zebra"]}, model_args=sizes)
    loaded = load(str(tmp_path))
    assert (loaded.class_names, loaded.source["family"]) == (("cat", "dog", "zebra"), "timm")
    assert torch.equal(loaded.model.head.weight, theirs.head.weight)  # type: ignore[arg-type, union-attr]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no pretrained weights for 'timm/vit'"):
        load("timm/vit")
    with pytest.raises(InputError, match="timm cannot make 'hf-hub:timm/vit'"):
        load("timm/vit", random=True)


def test_torchvision_by_name() -> None:
    loaded = load("torchvision/vit_b_16", random=True)
    assert loaded.class_names[0] == "tench"
    assert loaded.reader.prepare.describe()["resize"] == 256
    assert load("vit_b_16", random=True).source == loaded.source
    with pytest.raises(InputError, match="no classifier 'vit_nonsense'"):
        load("torchvision/vit_nonsense")


def test_torchvision_with_weights_of_any_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is small; to be loaded it need not be one that can be explained."""
    from torchvision import models

    theirs = models.get_model("mobilenet_v3_small", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    loaded = load("torchvision/mobilenet_v3_small", weights=str(tmp_path / "w.safetensors"))
    assert loaded.class_names == tuple("0123456")
    assert torch.equal(loaded.model.classifier[3].weight, theirs.classifier[3].weight)  # type: ignore[index, union-attr]

    def offline(*given: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(InputError, match=r"no pretrained weights for 'mobilenet_v3_small' \(no network\); pass --weights"):
        load("mobilenet_v3_small")


def test_scores_of_pairs_are_found_by_their_names() -> None:
    """Of models that compare (CLIP), of those that say whether they match (BLIP, ViLT), and of no others."""
    scores = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    name, score = matching.score_of(SimpleNamespace(logits_per_image=scores))
    assert (name, score(SimpleNamespace(logits_per_image=scores)).tolist()) == ("similarity", [1.0, 3.0])
    for field in ("itm_score", "logits"):
        name, score = matching.score_of(SimpleNamespace(**{field: scores}))
        assert (name, score(SimpleNamespace(**{field: scores})).tolist()) == ("match", [3.0, 1.0])
    with pytest.raises(InputError, match="holds neither logits_per_image nor scores"):
        matching.score_of(SimpleNamespace(logits=torch.zeros(2, 3)))


def test_loading_a_folder_says_nothing_where_nobody_looks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    folder = tiny.vit_folder(tmp_path)
    capfd.readouterr()
    load(str(folder))
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_a_folder_of_hugging_face_with_pictures(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    loaded = load(str(tiny.vit_folder(tmp_path)))
    assert (loaded.kind, loaded.class_names) == ("image", ("cat", "dog", "zebra"))
    (sample,) = loaded.reader(NOISE)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(images=NOISE, return_tensors="np")["pixel_values"][0]
    assert np.abs(sample["pixel_values"] - theirs).max() * 127.5 <= 1.001  # a grey level
    assert explained(loaded, NOISE, NOISE).patches.shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("config", "made"),
    [
        ({"num_labels": 1}, None),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, None),
        ({}, "softmax"),
    ],
)
def test_a_score_is_no_probability(config: dict[str, Any], made: str | None, tmp_path: Path) -> None:
    assert load(str(tiny.bert_folder(tmp_path, **config))).probabilities == made


def test_a_processor_of_another_kind_is_called_as_it_is(tmp_path: Path) -> None:
    tiny.vit_folder(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "do_normalize": False}))
    (sample,) = load(str(tmp_path)).reader(NOISE)
    assert 0 <= sample["pixel_values"].min() < sample["pixel_values"].max() <= 1


def test_sharded_weights_are_put_together(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.vit_folder(whole)
    tiny.vit_folder(parts, max_shard_size="60kB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    expected = load(str(whole)).fingerprint()
    assert load(str(parts)).fingerprint() == expected
    assert load(str(whole), weights=str(parts)).fingerprint() == expected
    assert load(str(whole), random=True).fingerprint() != expected
    sorted(parts.glob("*.safetensors"))[0].unlink()
    with pytest.raises(InputError, match=r"its parts model-00001-of-.* are missing"):
        state.read(str(parts))


def test_a_folder_of_weights_holds_one_file_or_an_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights \(.safetensors, .bin, .pth or an index of parts\)"):
        state.read(str(tmp_path))
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InputError, match=r"holds several files of weights: a.safetensors, b.safetensors; name one"):
        state.read(str(tmp_path))
    with pytest.raises(InputError, match="other weights need a model's name"):
        load(weights=str(tmp_path / "a.safetensors"))


def test_pictures_of_several_sizes_make_no_batch() -> None:
    samples = [{"x": np.zeros((3, 8, side), np.float32)} for side in (8, 16)]
    with pytest.raises(InputError, match=r"pictures of several sizes \[\(3, 8, 8\), \(3, 8, 16\)\] make no batch"):
        load().reader.collate(samples)


def test_weights_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for name, content, word in (
        ("x.safetensors", b"rubbish", "no weights that can be read"),
        ("x.pth", b"rubbish", "no weights that can be read"),
        ("x.model.safetensors.index.json", b"{", "no weights that can be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=word):
            state.read(str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds list, not a dictionary"):
        state.read(str(tmp_path / "list.pth"))
    with pytest.raises(InputError, match="no weights file"):
        state.read(str(tmp_path / "none.pth"))


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    """transformers makes one of random numbers where the weights hold none."""
    from transformers import BertModel

    tiny.bert_folder(tmp_path)
    config = (tmp_path / "config.json").read_text()
    BertModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"holds no weights for classifier\.bias, classifier\.weight"):
        load(str(tmp_path))


def test_texts_are_padded_and_never_cut(tmp_path: Path) -> None:
    folder = str(tiny.bert_folder(tmp_path))
    loaded = load(folder)
    assert (loaded.kind, loaded.class_names, loaded.reader.limit) == ("text", ("negative", "positive"), 32)
    together = explained(loaded, "a film", "a gripping, clever film")
    assert together.relevance.shape == (2, 8)
    assert torch.allclose(together.relevance[0, :4], explained(loaded, "a film").relevance[0], atol=1e-6)
    assert together.relevance[0, 4:].eq(0).all()
    long = "a clever film " * 20
    with pytest.raises(InputError, match="has 62 tokens, the model reads 32"):
        loaded.reader(long)
    windows = load(folder, long="window").reader(long)
    ids = [sample["input_ids"] for sample in windows]
    assert max(map(len, ids)) <= 32
    assert np.array_equal(ids[0][-9:-1], ids[1][1:9])  # a quarter is shared
    assert sum(len(x) - 2 for x in ids) - 8 * (len(ids) - 1) == 60  # and nothing lost
    with pytest.raises(InputError, match="empty"):
        loaded.reader(" \n")


def test_a_language_model_is_asked_for_the_next_token(tmp_path: Path) -> None:
    loaded = load(str(tiny.gpt_folder(tmp_path)))
    assert (loaded.kind, loaded.reader.limit) == ("causal", 24)
    assert loaded.class_names[loaded.class_index("bad")] == "bad"
    batch = loaded.inputs([s for text in ("bad film", "so bad a film") for s in loaded.reader(text)])
    with torch.no_grad():
        together = loaded.model(**batch)
        alone = loaded.model.model(**{k: v[:1, :7] for k, v in batch.items()}).logits[:, -1]  # type: ignore[operator, union-attr]
    assert together.shape == (2, 259)
    assert torch.allclose(together[:1], alone[:1], atol=1e-4) or batch["attention_mask"][0].sum() != 7


def test_pictures_with_text(tmp_path: Path) -> None:
    loaded = load(str(tiny.clip_folder(tmp_path)))
    assert loaded.kind == "multimodal"
    samples = [s for text in ("a film", "a gripping, clever film") for s in loaded.reader((NOISE, text))]
    batch = loaded.inputs(samples)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert loaded.model(**batch).logits_per_image.shape == (2, 2)


def test_a_function_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_of_today.py").write_text(
        "from tests.tiny import vit\n"
        "def build(): return vit()\n"
        "def with_own(): return vit(), lambda image: __import__('numpy').zeros((3, 32, 32))\n"
        "def number(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("my_models_of_today:build")
    assert len(loaded.class_names) == 7
    assert explained(loaded, NOISE).patches.shape == (1, 4, 4)
    assert load("my_models_of_today:with_own").reader(NOISE)[0]["x"].sum() == 0
    for name, word in (
        ("my_models_of_today:number", "returned int, not a model"),
        ("my_models_of_today:none", "AttributeError"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=word):
            load(name)


def test_names_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="timm knows no model 'vit_nonsense', nor does torchvision; cannot load"):
        load("vit_nonsense")
    with pytest.raises(InputError, match="there is no such folder"):
        load("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(InputError, match=r"is a BertModel, none of .*MODULE:FUNCTION"):
        load(str(tmp_path))


def test_dtype_and_device() -> None:
    assert load("tests.tiny:vit", dtype="bfloat16").dtype == torch.bfloat16
    assert load("tests.tiny:vit", device="auto").device.type in ("cpu", "cuda")
    for options, word in (
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"long": "cut"}, "unknown long 'cut'"),
        ({"random": True, "weights": "w"}, "not both"),
    ):
        with pytest.raises(InputError, match=word):
            load("tests.tiny:vit", **options)  # type: ignore[arg-type]


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    for loaded, item in ((load(), hostile.rgb()), (load(str(tiny.bert_folder(tmp_path))), "a film")):
        again = pickle.loads(pickle.dumps(loaded.reader))
        for name, value in loaded.reader(item)[0].items():
            assert np.array_equal(again(item)[0][name], value)
        json.dumps(loaded.reader.describe())


def test_clip_with_classes_in_words_is_a_classifier_of_pictures(tmp_path: Path) -> None:
    folder = str(tiny.clip_folder(tmp_path))
    loaded, plain = load(folder, classes=["a film", "clever"]), load(folder)
    assert (loaded.kind, loaded.class_names) == ("image", ("a film", "clever"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    (positional,), _ = loaded.arguments(loaded.inputs(loaded.reader(picture)))
    tokens = plain.reader.processor.tokenizer(["a film", "clever"], return_tensors="pt", padding=True)
    with torch.no_grad():
        pair = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        expected = plain.model(pixel_values=positional, **pair).logits_per_image
    explainer = Explainer(loaded.model)
    assert torch.allclose(explainer(positional).logits, expected, atol=1e-5)
    assert explainer(positional).patches.shape == (1, 4, 4)
    assert explainer.verify(positional.repeat(2, 1, 1, 1)).ok
    with pytest.raises(InputError, match=r"class 'a film a film.*has 26 tokens; the model reads 1 to 16"):
        load(folder, classes=["a film " * 12])


def test_siglip_judges_each_class_on_its_own(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tokenizer = load(str(tiny.clip_folder(tmp_path))).reader.processor.tokenizer
    part = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    text = {**part, "vocab_size": len(tiny.WORDS), "max_position_embeddings": 16, "projection_size": 48}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**part, "image_size": 32, "patch_size": 8})).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2)
    made = zero_shot.classifier("siglip", model, tokenizer, 16, ["a film", "clever"])
    tokens = tokenizer(["a film", "clever"], return_tensors="pt", padding="max_length", max_length=16)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        pair = {k: tokens[k] for k in tokenizer.model_input_names if k in tokens and k != "token_type_ids"}
        expected = model(pixel_values=x, **pair).logits_per_image
        assert torch.allclose(made(x), expected, atol=1e-5)
    assert zero_shot.probabilities(made) == "sigmoid"


@pytest.mark.parametrize("command", ["explain", "batch", "compare", "verify", "evaluate"])
def test_every_command_says_what_a_model_of_pictures_with_text_needs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(demo.sample_paths()[0])
    rest = {"verify": [], "evaluate": ["--data", "mosaics", "--metric", "pointing"]}.get(command, [picture])
    out = [] if command == "verify" else ["--out", str(tmp_path / "out.png")]
    model = ["--model", str(tiny.clip_folder(tmp_path))]
    assert main([command, *rest, *model, *out]) == 2
    assert "give its classes in words (--classes" in capsys.readouterr().err


def test_classes_in_words_are_for_models_without_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has classes of its own"):
        load("tests.tiny:vit", classes=["cat"])
