"""Hugging Face transformers: folders and names on the hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastrel import language
from fastrel.data.preprocessing import Prepare, Preprocessing, Wrapped
from fastrel.errors import InputError, first_line, needed
from fastrel.models import state, zero_shot
from fastrel.models.loaded import Kind, Loaded
from fastrel.models.readers import Pictures, PicturesWithText, Texts
from fastrel.models.request import Request

#: Endings of architectures, and the kind of model that they are.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("ForImageClassification", "image"),
    ("ForImageClassificationWithTeacher", "image"),
    ("ForSequenceClassification", "text"),
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("ForConditionalGeneration", "causal"),
    ("MTModel", "causal"),
    ("ForImageAndTextRetrieval", "multimodal"),
    ("CLIPModel", "multimodal"),
    ("SiglipModel", "multimodal"),
)


def claims(name: str) -> bool:
    """Everything that nobody else wanted."""
    return True


def load(request: Request) -> Loaded:
    """A classifier of pictures or texts, a causal language model, or a model of pictures with text.

    Raises:
        InputError: no such model, no head for any of these, or weights that leave parts of it untrained.
    """
    transformers = _library(request.name)
    if request.name.startswith((".", "/", "~")) and not Path(request.name).is_dir():
        raise InputError(f"cannot load {request.name!r}: there is no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(request.name)
    except (OSError, ValueError) as error:
        known = "" if "/" in request.name else f"timm knows no model {request.name!r}, nor does torchvision; "
        raise InputError(f"{known}cannot load {request.name!r} from Hugging Face: {first_line(error)}") from error
    architectures = getattr(config, "architectures", None) or [""]
    kind = next((kind for ending, kind in _KINDS if architectures[0].endswith(ending)), None)
    known = "none of " + ", ".join(f"…{ending}" for ending, _ in _KINDS)
    if kind == "causal" and (reads := getattr(transformers, architectures[0]).main_input_name) != "input_ids":
        kind, known = None, f"which reads {reads}, not a text"
    if kind is None:
        raise InputError(
            f"{request.name!r} is a {architectures[0] or 'model that does not say what it is'}, {known}; "
            "write a function that returns the model and its preprocessing or tokenizer, and give MODULE:FUNCTION"
        )
    model = _build(transformers, getattr(transformers, architectures[0]), config, request)
    source = {"family": "transformers", "name": request.name}
    if kind == "image":
        processor = _from(transformers.AutoImageProcessor, request.name)
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        return Loaded(model, "image", Pictures(preprocessing(processor), "pixel_values"), names, _chances(config), source)
    if kind == "multimodal":
        processor = _from(transformers.AutoProcessor, request.name)
        if request.classes:
            tokenizer = processor.tokenizer
            classifier = zero_shot.classifier(request.name, model, tokenizer, limit(model, tokenizer), request.classes)
            chances = zero_shot.probabilities(classifier)
            return Loaded(
                classifier, "image", Pictures(preprocessing(processor.image_processor)), request.classes, chances, source
            )
        return Loaded(model, "multimodal", PicturesWithText(processor), (), "softmax", source)
    tokenizer = _from(transformers.AutoTokenizer, request.name)
    return causal(model, tokenizer, source) if kind == "causal" else text(model, tokenizer, source)


def text(model: nn.Module, tokenizer: Any, source: dict[str, Any]) -> Loaded:
    """A sequence classifier with its tokenizer."""
    config: Any = model.config
    _padding(config, tokenizer)
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Loaded(model, "text", Texts(tokenizer, limit(model, tokenizer)), names, _chances(config), source)


def causal(model: nn.Module, tokenizer: Any, source: dict[str, Any]) -> Loaded:
    """A language model, asked for the token after the last one, an encoder–decoder for the first of its answer: its classes are the
    vocabulary."""
    config: Any = model.config
    _padding(config, tokenizer)
    names = [""] * config.get_text_config().vocab_size
    for token, i in tokenizer.get_vocab().items():
        if i < len(names):
            names[i] = tokenizer.convert_tokens_to_string([token])
    asked = FirstToken(model) if language.answers(model) else NextToken(model)
    return Loaded(asked, "causal", Texts(tokenizer, limit(model, tokenizer)), tuple(names), "softmax", source)


class NextToken(nn.Module):
    """The logits [B, V] of the token after the last one of each text, padding (at the end) left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T]."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits[torch.arange(input_ids.shape[0], device=logits.device), attention_mask.sum(1) - 1]


class FirstToken(nn.Module):
    """The logits [B, V] of the first token that an encoder–decoder answers each text with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T]."""
        start = torch.full((len(input_ids), 1), language.start_of_answers(self.model), device=input_ids.device)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": start}
        return self.model(**given, use_cache=False).logits[:, 0]


class Processed:
    """A Hugging Face image processor as a callable, picture -> [C, H, W]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[C, H, W]."""
        return self.processor(images=image, return_tensors="np")["pixel_values"][0]

    def __repr__(self) -> str:
        return str(self.processor.to_dict())


def preprocessing(processor: Any) -> Prepare:
    """What a Hugging Face image processor does, as numbers where it is resizing, cropping, scaling and normalising.

    Resizing is Pillow's, with which these models were trained; the processor's own differs by at most a grey level.
    """
    config = processor.to_dict()
    mean, std = (tuple(map(float, config.get(key) or ())) for key in ("image_mean", "image_std"))
    size, crop = dict(config.get("size") or {}), dict(config.get("crop_size") or {})
    plain = (
        config.get("do_resize")
        and config.get("do_rescale")
        and config.get("do_normalize")
        and abs(config.get("rescale_factor", 0) * 255 - 1) < 1e-6
        and not any(config.get(key) for key in ("do_pad", "crop_pct", "do_reduce_labels", "do_flip_channel_order"))
    )
    wrapped = Wrapped(Processed(processor), mean or (0.0,) * 3, std or (1.0,) * 3)
    if not plain:
        return wrapped
    resize = (size.get("height"), size.get("width")) if {*size} == {"height", "width"} else size.get("shortest_edge")
    cropped = (crop["height"], crop["width"]) if config.get("do_center_crop") and crop else None
    resample = Image.Resampling(config.get("resample", Image.Resampling.BILINEAR)).name
    try:
        return Preprocessing(resize, cropped, resample, mean, std)  # type: ignore[arg-type]
    except (InputError, TypeError):
        return wrapped


def limit(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens a model reads: what its tokenizer says, at most what its table of positions holds."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    found = int(min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 1 << 30))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            found = min(found, module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return found


def _build(transformers: Any, architecture: Any, config: Any, request: Request) -> Any:
    if request.random:
        return architecture(config)
    found: Any = {"state_dict": state.read(request.weights), "config": config} if request.weights else {}
    try:
        with _bars_where_they_are_seen(transformers):
            model, report = architecture.from_pretrained(
                None if request.weights else request.name,
                dtype=request.torch_dtype or "auto",
                output_loading_info=True,
                **found,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {request.name!r}: {first_line(error)}") from error
    untrained = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if untrained:
        raise InputError(f"{request.name!r} holds no weights for {', '.join(untrained[:5])}: they would be random numbers")
    return model


@contextlib.contextmanager
def _bars_where_they_are_seen(transformers: Any) -> Iterator[None]:
    """The library's progress bars, which it writes to stderr, on a terminal alone."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load what prepares inputs for {name!r}: {first_line(error)}") from error


def _library(name: str) -> Any:
    with needed(repr(name), "text"):
        import transformers
    return transformers


def _padding(config: Any, tokenizer: Any) -> None:
    """Tokenizers of decoders often have no padding; where it is masked, any token will do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _chances(config: Any) -> Any:
    """What makes probabilities of logits. One logit whose problem is not named is a score: the library trains it by regression, and
    others to be passed through a sigmoid."""
    if config.problem_type is None and config.num_labels == 1:
        return None
    by_problem = {"regression": None, "multi_label_classification": "sigmoid"}
    return by_problem.get(config.problem_type, "softmax")
