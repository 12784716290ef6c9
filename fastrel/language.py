"""What is asked of a language model: the next token, one against another, a continuation. An encoder–decoder (T5, BART) answers with a
text of its own, its decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrel.errors import InputError
from fastrel.outputs import logits_in


def logits_of(output: Any) -> Tensor:
    """The logits [B, T, V] in what a language model returns: of a tuple, such as (logits, loss), the one item of that shape.

    Raises:
        InputError: there are none.
    """
    found = logits_in(output)
    if found is None and isinstance(output, (tuple, list)):
        fitting = [x for x in output if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3]
        found = fitting[0] if len(fitting) == 1 else None
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise InputError(f"a language model returns logits [B, T, V]; this one returned {shape}")
    return found


def last_places(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The place of the last real token of each text [B], padded on either side.

    Raises:
        InputError: the mask is not of the ids' shape, or leaves a text without tokens.
    """
    batch, length = _checked_ids(input_ids)
    if attention_mask is None:
        return torch.full((batch,), length - 1, device=input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}; pass one of [B, T]"
        )
    real = attention_mask != 0
    if not bool(real.any(1).all()):
        raise InputError(f"attention_mask leaves no token of text {int((~real.any(1)).nonzero()[0, 0])}")
    return length - 1 - real.flip(1).int().argmax(1)


def shifted_positions(model: nn.Module, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """`position_ids` [B, T] that count from the first real token, of texts that are padded on the left; nothing for others, and for
    models that find positions in the ids and count from another number (RoBERTa)."""
    if attention_mask is None or bool((attention_mask[:, 0] != 0).all()):
        return {}
    tables = (x for name, x in model.named_modules() if name.endswith("position_embeddings"))
    if any(getattr(table, "padding_idx", None) is not None for table in tables):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


def places_in(logits: Tensor, places: Tensor, length: int) -> Tensor:
    """Places of a text of this length as they are in logits [B, T, V], or in [B, 1, V] of a model that returns the last one alone.

    Raises:
        InputError: the logits are those of other places.
    """
    if logits.shape[1] == length:
        return places
    if logits.shape[1] == 1 and bool((places == length - 1).all()):
        return torch.zeros_like(places)
    raise InputError(
        f"the model returned logits {list(logits.shape)} for texts of {length} tokens, which lack place {int(places.min())}; let it "
        "return those of every token, or explain next_token of texts that are not padded on the right"
    )


def tokens_of(tokens: Any, batch: int, vocabulary: int, name: str, like: Tensor) -> Tensor:
    """Token ids [B, K] of an int, [B] or [B, K].

    Raises:
        InputError: another shape or type, or ids beyond the vocabulary.
    """
    try:
        found = torch.as_tensor(tokens).to(like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be token ids, not {tokens!r}") from error
    found = found.expand(batch) if found.dim() == 0 else found
    found = found[:, None] if found.dim() == 1 else found
    if (
        found.is_floating_point()
        or found.dtype == torch.bool
        or found.dim() != 2
        or len(found) != batch
        or not found.numel()
    ):
        raise InputError(
            f"{name} must be a token id, [{batch}] or [{batch}, K] ids, not {found.dtype} {tuple(found.shape)}"
        )
    wrong = found[(found < 0) | (found >= vocabulary)]
    if len(wrong):
        raise InputError(f"{name} holds {int(wrong[0])}, and the model has {vocabulary} tokens, 0 to {vocabulary - 1}")
    return found.long()


def token_scores(places: Tensor, tokens: Tensor, against: Tensor | None) -> Callable[[Any], Tensor]:
    """A target: the logits [B, K] of `tokens` [B, K] at `places` [B, K], less those of `against` [B, K]."""

    def target(output: Any) -> Tensor:
        logits = logits_of(output)
        rows = logits.gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2]))
        chosen = rows.gather(2, tokens.unsqueeze(2)).squeeze(2)
        return chosen if against is None else chosen - rows.gather(2, against.unsqueeze(2)).squeeze(2)

    return target


def joined(input_ids: Tensor, continuation: Any, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A prompt and its continuation as one text [B, T + N]: ids, the continuation [B, N], and their mask.

    Raises:
        InputError: the continuation is not [B, N] ids, or prompts are padded on the right, between both.
    """
    _, length = _checked_ids(input_ids)
    after = tokens_after(continuation, input_ids)
    if mask is not None:
        if not bool((last_places(input_ids, mask) == length - 1).all()):
            raise InputError("prompts padded on the right cannot be continued; pad them on the left")
        mask = torch.cat([mask, mask.new_ones(after.shape)], 1)
    return torch.cat([input_ids, after.to(input_ids.dtype)], 1), after, mask


def answers(model: nn.Module) -> bool:
    """Whether a model writes another text than it reads, by a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def start_of_answers(model: nn.Module) -> int:
    """The token that a decoder reads first.

    Raises:
        InputError: nothing says what it is.
    """
    configs = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "bos_token_id")  # in the order of `generate`
    found = (getattr(config, name, None) for name in names for config in configs)
    start = next((x for x in found if x is not None), None)
    if not isinstance(start, int):
        raise InputError(
            f"{type(model).__name__} does not say what its answers start with; set config.decoder_start_token_id"
        )
    return int(start)


def decoder_inputs(model: nn.Module, after: Tensor) -> Tensor:
    """What the decoder of a model reads when it writes `after` [B, N]: the token that answers start with, and all but the last, [B, N].

    Raises:
        InputError: as `start_of_answers`.
    """
    return torch.cat([torch.full_like(after[:, :1], start_of_answers(model)), after[:, :-1]], 1)


def tokens_after(continuation: Any, input_ids: Tensor) -> Tensor:
    """The tokens [B, N] int64 that texts go on with, or are answered with.

    Raises:
        InputError: they are not [B, N] ids.
    """
    batch, _ = _checked_ids(input_ids)
    after = torch.as_tensor(continuation, device=input_ids.device)
    after = after[None] if after.dim() == 1 and batch == 1 else after
    if after.dim() != 2 or len(after) != batch or not after.numel() or after.is_floating_point():
        raise InputError(f"continuation must be token ids [{batch}, N], not {after.dtype} {tuple(after.shape)}")
    return after.long()


def _checked_ids(input_ids: Any) -> tuple[int, int]:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        given = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"input_ids must be a tensor of token ids [B, T], not {given}")
    return input_ids.shape[0], input_ids.shape[1]
