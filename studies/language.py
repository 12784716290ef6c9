"""Which gradient, and which question, finds the word that decides the next token of a causal language model?

    python -m studies.language [ARCHITECTURE …]

Small models learn a planted task: of 16 words of a prompt one is a key (8 of 60 words are), anywhere but at the end,
and the next token is that key's answer. Each of 100 new prompts, whose predictions are right, is explained by every method; the highest
word but the last, where the answer is read, must be the key. Asked is the answer's logit, its logit less the mean of all (centred), its
log-probability, and its logit less that of the runner-up. Occlusion replaces one word after the other by another one. About five
minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import fastrel
from fastrel import methods
from fastrel.methods import Method
from fastrel.transform.method import Chain

WORDS, KEYS, LENGTH, PROMPTS = 60, 8, 17, 100
STEPS, BATCH = 1500, 64

_SIZE = {
    "vocab_size": WORDS + KEYS + 1, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 32, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Llama": ("llama", {"num_key_value_heads": 4}),
    "Llama, grouped keys": ("llama", {"num_key_value_heads": 2}),
    "Qwen 3": ("qwen3", {"num_key_value_heads": 2}),
    "Gemma 3": ("gemma3_text", {"num_key_value_heads": 2}),
}

#: The default and its like, and what is read without a rollout.
METHODS: dict[str, Method] = {
    "default": methods.METHODS["transformer_attribution"],
    "default, frozen gradient": Method("frozen", "", "", cost="5", reading=Chain("gradient_relevance"), attnlrp=True),
    "gradient ⊙ attention": methods.METHODS["gradient_attention"],
    "relevance per attention": methods.METHODS["relevance_per_attention"],
    "gradient × input": methods.METHODS["input_x_gradient"],
    "attnlrp": methods.METHODS["attnlrp"],
}


def prompts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [count, LENGTH], the place of the key, and the answer; words from KEYS on are no keys, the last one asks."""
    ids = torch.randint(KEYS, WORDS, (count, LENGTH), generator=generator)
    places = torch.randint(LENGTH - 1, (count,), generator=generator)
    keys = torch.randint(KEYS, (count,), generator=generator)
    ids[torch.arange(count), places] = keys
    ids[:, -1] = WORDS + KEYS
    return ids, places, WORDS + keys


def trained(name: str) -> torch.nn.Module:
    """A model that has learnt the task."""
    torch.manual_seed(0)
    kind, changes = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(kind, **{**_SIZE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        ids, _, answers = prompts(BATCH, generator)
        loss = F.cross_entropy(model(ids, use_cache=False).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > 100 and float(loss) < 0.01:
            break
    return model


def occlusion(model: torch.nn.Module, ids: Tensor, score: Callable[[Any], Tensor]) -> Tensor:
    """How much a score falls when a word is replaced by another one, [B, LENGTH]."""
    generator = torch.Generator().manual_seed(2)
    found = []
    with torch.no_grad():
        whole = score(model(ids, use_cache=False))
        for place in range(LENGTH):
            other = ids.clone()
            other[:, place] = torch.randint(KEYS, WORDS, (len(ids),), generator=generator)
            found.append(whole - score(model(other, use_cache=False)))
    return torch.stack(found, 1)


def of_logit(logits: Tensor, answers: Tensor) -> Tensor:
    """The answer's logit [B] of logits [B, V]."""
    return logits.gather(1, answers[:, None])[:, 0]


def centred(logits: Tensor, answers: Tensor) -> Tensor:
    """Less the mean of all."""
    return of_logit(logits, answers) - logits.mean(1)


def log_probability(logits: Tensor, answers: Tensor) -> Tensor:
    """Less the logarithm of the sum of all exponentials."""
    return of_logit(logits, answers) - logits.logsumexp(1)


def against_next(logits: Tensor, answers: Tensor) -> Tensor:
    """Less the highest of the others."""
    return of_logit(logits, answers) - logits.scatter(1, answers[:, None], -torch.inf).amax(1)


QUESTIONS = {
    "logit": of_logit,
    "centred": centred,
    "log-probability": log_probability,
    "against the runner-up": against_next,
}


def main() -> None:
    """Train, explain, and print a row per architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES))
    print(f"| model | question | {' | '.join(METHODS)} | occlusion |\n|---|---|{'---|' * (len(METHODS) + 1)}")
    for name in parser.parse_args().architectures:
        model = trained(name)
        ids, places, answers = prompts(PROMPTS, torch.Generator().manual_seed(3))
        with torch.no_grad():
            right = model(ids, use_cache=False).logits[:, -1].argmax(1) == answers
        ids, places, answers = ids[right], places[right], answers[right]
        explainer = fastrel.Explainer(model)
        for asked, question in QUESTIONS.items():
            score = functools.partial(_last, question, answers)
            found = [explainer.using(method)(input_ids=ids, target=score).relevance for method in METHODS.values()]
            found.append(occlusion(model, ids, score))
            hits = [float((x[:, :-1].argmax(1) == places).float().mean()) for x in found]
            print(f"| {name} ({len(ids)}) | {asked} | " + " | ".join(f"{x:.2f}" for x in hits) + " |", flush=True)


def _last(question: Any, answers: Tensor, output: Any) -> Tensor:
    return question(output.logits[:, -1], answers)


if __name__ == "__main__":
    main()
