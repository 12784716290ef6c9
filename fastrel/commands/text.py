"""Explaining a text with a Hugging Face classifier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastrel.commands.images import build_explainer, class_index, from_function
from fastrel.errors import InputError
from fastrel.render.text import save_page, words


def run(options: argparse.Namespace) -> int:
    """Explain one text and write the page."""
    out = Path(options.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"with --text, --out must name an .html file, not {options.out!r}")
    if not options.model:
        raise InputError("--text needs --model, the name or folder of a Hugging Face classifier")
    if not options.text.strip():
        raise InputError("--text is empty")
    model, tokenizer = load(options.model)
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    inputs = dict(tokenizer(options.text, return_tensors="pt", truncation=True))
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    prediction = build_explainer(model, options).predict(**inputs)
    logits = prediction.logits[0]
    chosen = [int(logits.argmax())] if options.target is None else [class_index(t, labels) for t in options.target]
    explanation = prediction.explain([chosen])
    out.parent.mkdir(parents=True, exist_ok=True)
    chances = logits.softmax(0).tolist()
    save_page(out, tokens, explanation.relevance[0], [f"{labels[c]} ({chances[c]:.0%})" for c in chosen])
    print("classes: " + ", ".join(f"{label} {chance:.1%}" for label, chance in zip(labels, chances, strict=True)))
    for c, row in zip(chosen, explanation.relevance[0], strict=True):
        best = sorted(words(tokens, row), key=lambda item: -item[1])[:5]
        print(f"{labels[c]}: " + ", ".join(word for word, _ in best))
    print(f"-> {out}")
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer; MODULE:FUNCTION is a function that returns both.

    Raises:
        InputError: transformers is not installed, or nothing can be loaded under this name.
    """
    if ":" in name:
        model, tokenizer = from_function(name, tuple)
        return model.eval(), tokenizer
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise InputError('explaining text needs transformers: pip install "fastrel[text]"') from error
    try:
        return AutoModelForSequenceClassification.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {name!r}: {str(error).splitlines()[0]}") from error
