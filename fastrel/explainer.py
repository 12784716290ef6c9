"""Explainer: a model, once; then explanations of its predictions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrel import language
from fastrel.engine import Call, Engine
from fastrel.errors import InputError
from fastrel.explanation import Explanation
from fastrel.graph.facts import Memory
from fastrel.graphed import Graphed
from fastrel.inputs import Checks
from fastrel.options import Backend, Options, method_of
from fastrel.precision import Precision
from fastrel.prediction import Prediction
from fastrel.reference.rules import Rules
from fastrel.targets import Target
from fastrel.trace import BlockTrace
from fastrel.transform.method import Method, PathIntegral
from fastrel.transform.program import Program
from fastrel.verification import Verification, verify


class Explainer:
    """Explains predictions of an unmodified model, as it is at the moment of each call.

    The model is captured with `torch.export` at the first call and again for every new kind of input (other image size,
    other dtype) and after every change of the model itself; batch size and text length may vary freely. Nothing is patched,
    and parameters are read from the live model at every call, so that training it further is fine. Where the captured graph and
    the model would differ, there is another capture or an error, never a map. It is always explained as it predicts in eval
    mode, whatever mode it is in. Calls from several threads are safe, also of several explainers, and so is using the model
    elsewhere meanwhile. Options are frozen; `using` makes an explainer with others.

    Args:
        model: a module that returns class logits [B, C], or anything holding them (a Hugging Face output, a dict, a tuple).
        method: one of `fastrel.methods.METHODS` by name, or a `fastrel.Method` of your own. Default: "frozen_attribution" by the
            positive rules, the paper's own "transformer_attribution" by the others.
        rules: "positive" (default): eq. (5) in every layer. "official": the published code, whose maps depend on rounding.
            "original_lrp": the published code's baseline LRP, which doubles relevance in every linear layer.
        start_layer: first attention block of the chain, counted from the input; negative from the output. Default: the
            method's own, 0 for the default.
        normalize_rollout: scale the rows of I + M to sum 1, as the published code does for BERT. Default: the method's own,
            False for the default.
        precision: "float32": the model's own dtype throughout (16-bit models: lanes in float32). "mixed": matrix products
            of relevance and gradient in bfloat16, where the processor does that faster than float32. "low": those of
            relevance in int8, on a GPU in float8 where that is faster. Both need rules="positive"; the forward pass is the
            model's own.
        memory: "normal", or "low": between prediction and explanation only what the blocks pass on is kept, and each block
            is computed again when its turn comes, for the time of one more forward pass.
        backend: "auto": per operator the first that can compute it of "triton" and "cuda" on a GPU, "cpp" (C++) on a CPU, and
            "torch", plain PyTorch. One that is named computes everything that it has kernels for, or says why it cannot.
        live: whether to ask, at every call, that the model still is what was captured, in less than a millisecond, and to
            compare outputs at every 64th. False trusts: after a change other than of weights, call `reset`.
        checks: whether NaN and infinity in inputs, outputs and maps are refused. On a GPU all are looked at once, at the end of a
            call, which is the only time that it waits for the device. False looks at nothing: NaN in is NaN out.
        output: which output classes are picked from, by its name (a key or field, `decoder.logits`) or place, where the model
            returns several. Default: the one called `logits`, or the only one of shape [B, C]; of several, it asks.
        grid: (rows, columns) of the patches, or (frames, rows, columns), where they cannot be read off the model. The patches
            are the last tokens of every sequence that has as many.

    Raises:
        InputError: an option that does not exist; `backend` that cannot run, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method | None = None,
        *,
        rules: Rules = "positive",
        start_layer: int | None = None,
        normalize_rollout: bool | None = None,
        precision: Precision = "float32",
        backend: Backend = "auto",
        memory: Memory = "normal",
        live: bool = True,
        checks: bool = True,
        output: str | int | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(f"model is a {type(model).__name__}, compiled by torch.jit; pass the module it was made of")
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self._model = model
        self._options = Options(
            None if method is None else method_of(method),
            rules,
            start_layer,
            normalize_rollout,
            precision,
            backend,
            memory,
            output,
            grid,
        )
        if not isinstance(live, bool):
            raise InputError(f"live must be True or False, not {live!r}")
        if not isinstance(checks, bool):
            raise InputError(f"checks must be True or False, not {checks!r}")
        self._engine = Engine(model, live, checks)

    @property
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self._model

    @property
    def options(self) -> Options:
        """How it is explained; `using` makes an explainer with others."""
        return self._options

    @property
    def method(self) -> Method:
        """The attribution method, with its start layer and normalisation."""
        return self._options.method

    @property
    def rules(self) -> Rules:
        """The rule set."""
        return self._options.rules

    @property
    def precision(self) -> Precision:
        """In what matrix products are computed."""
        return self._options.precision

    @property
    def backend(self) -> Backend:
        """What computes."""
        return self._options.backend

    @property
    def memory(self) -> Memory:
        """Whether intermediate values are kept or computed again."""
        return self._options.memory

    def __call__(self, *args: Any, target: Target = None, create_graph: bool = False, **kwargs: Any) -> Explanation:
        """Explain `model(*args, **kwargs)`: `predict(...)` and `explain(target)` in one, in less memory.

        Args:
            args: the model's inputs, as it takes them itself; dimension 0 of every tensor is the batch B.
            target: what to explain, as `Prediction.explain` takes it.
            create_graph: make logits and relevance differentiable with respect to parameters and inputs, so that a map can be a
                part of a training loss; for targets that are classes. Everything then runs in plain PyTorch, in the model's own
                dtype, and keeps its intermediate values; the model still predicts as in eval mode.
            kwargs: further inputs by name.

        Returns:
            The explanation of B samples: relevance [B, T], or [B, K, T] for K targets per sample.

        Raises:
            InputError: the model rejects these inputs, they hold NaN, or the target does not fit the output; `create_graph` with a
                function as target or with `integrated_gradients`.
            CaptureError: torch.export cannot capture the model, or its graph gives other outputs than the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        if create_graph:
            return self._differentiable(args, kwargs, target)
        checks = Checks(self._engine.checks)
        call = self._engine.enter(args, kwargs, checks)
        return self._predicted(call, self._options, checks=checks).explain_once(target)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """The model's prediction, kept so that it can be explained for any target without another forward pass.

        Args:
            args: the model's inputs, as it takes them itself; dimension 0 of every tensor is the batch B.
            kwargs: further inputs by name.

        Returns:
            The prediction: its `logits` are [B, C], and `explain` explains them.

        Raises:
            InputError: the model rejects these inputs, or they hold NaN.
            CaptureError: torch.export cannot capture the model, or its graph gives other outputs than the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        return self._predicted(self._engine.enter(args, kwargs), self._options, kept=True)

    def next_token(
        self,
        input_ids: Tensor,
        *,
        token: Any = None,
        against: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """Why a language model continues each text as it does, or an encoder–decoder its answer, of which nothing is written yet unless
        `decoder_input_ids` are given.

        Args:
            input_ids: token ids [B, T], padded on either side if there is a mask.
            token: what to explain: a token id, [B], or [B, K] for K at once; default the most likely one.
            against: explain why rather `token` than this one: an id, [B] or [B, K].
            attention_mask: 1 for tokens, 0 for padding, [B, T].
            kwargs: further inputs of the model.

        Returns:
            The explanation, its `target` the tokens explained, [B] or [B, K].

        Raises:
            InputError: ids of other shapes or beyond the vocabulary; the model returns no logits [B, T, V].
        """
        read, places = input_ids, language.last_places(input_ids, attention_mask)
        if language.answers(self._engine.model):
            if "decoder_input_ids" not in kwargs:
                kwargs["decoder_input_ids"] = language.decoder_inputs(self._engine.model, input_ids[:, :1])
            read = kwargs["decoder_input_ids"]
            places = language.last_places(read, kwargs.get("decoder_attention_mask"))
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        prediction = self._of_text(input_ids, **masked, **kwargs)
        logits = language.logits_of(prediction.output)
        places = language.places_in(logits, places, read.shape[1])
        batch, vocabulary = len(logits), logits.shape[2]
        if token is None:
            token = logits[torch.arange(batch, device=logits.device), places].argmax(1)
        tokens = language.tokens_of(token, batch, vocabulary, "token", logits)
        others = None if against is None else language.tokens_of(against, batch, vocabulary, "against", logits)
        if others is not None:
            tokens, others = torch.broadcast_tensors(tokens, others)
        scores = language.token_scores(places[:, None].expand_as(tokens), tokens, others)
        if tokens.shape[1] > 1 or torch.as_tensor(token).dim() == 2:
            return replace(prediction.explain(scores), target=tokens)
        return replace(prediction.explain(lambda output: scores(output)[:, 0]), target=tokens[:, 0])

    def continuation(
        self, input_ids: Tensor, continuation: Any, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Explanation:
        """Why a language model gives each token of a continuation, all of them by one forward pass; as `next_token`.

        Args:
            input_ids: the prompts [B, T], padded on the left if there is a mask; of an encoder–decoder its texts, on either side.
            continuation: the N tokens that come after, [B, N]; of an encoder–decoder those of its answer, without what it starts with.
            attention_mask: of the prompts, [B, T].
            kwargs: further inputs of the model.

        Returns:
            The explanation of N targets, over the T + N tokens of prompt and continuation (what comes after a token has none of
            its relevance); its `target` is the continuation. Of an encoder–decoder two maps, over the text and over what the decoder
            reads, `decoder_input_ids`: the start and the first N − 1 tokens.

        Raises:
            InputError: as `next_token`; an encoder–decoder that does not say what answers start with.
        """
        if language.answers(self._engine.model):
            return self._answer(input_ids, language.tokens_after(continuation, input_ids), attention_mask, kwargs)
        ids, after, mask = language.joined(input_ids, continuation, attention_mask)
        masked = {} if mask is None else {"attention_mask": mask}
        prediction = self._of_text(ids, **masked, **kwargs)
        logits = language.logits_of(prediction.output)
        tokens = language.tokens_of(after, len(logits), logits.shape[2], "continuation", logits)
        count = tokens.shape[1]
        places = torch.arange(ids.shape[1] - 1 - count, ids.shape[1] - 1, device=logits.device).expand_as(tokens)
        places = language.places_in(logits, places, ids.shape[1])
        return replace(prediction.explain(language.token_scores(places, tokens, None)), target=tokens)

    def _answer(self, ids: Tensor, after: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Explanation:
        """Why an encoder–decoder writes each token of `after` [B, N]."""
        language.last_places(ids, mask)
        masked = {} if mask is None else {"attention_mask": mask}
        decoded = language.decoder_inputs(self._engine.model, after)
        prediction = self.predict(input_ids=ids, decoder_input_ids=decoded, **masked, **kwargs)
        logits = language.logits_of(prediction.output)
        tokens = language.tokens_of(after, len(logits), logits.shape[2], "continuation", logits)
        places = torch.arange(tokens.shape[1], device=logits.device).expand_as(tokens)
        return replace(prediction.explain(language.token_scores(places, tokens, None)), target=tokens)

    def _of_text(self, ids: Tensor, **kwargs: Any) -> Prediction:
        """The prediction of token ids, which are `input_ids` where the model has an input of that name, else its first. Texts padded on
        the left have the positions that they would have alone, as `generate` gives them."""
        takes = inspect.signature(self._engine.model.forward).parameters
        if "position_ids" in takes and "position_ids" not in kwargs:
            kwargs |= language.shifted_positions(self._engine.model, kwargs.get("attention_mask"))
        if any(one.name == "input_ids" or one.kind is one.VAR_KEYWORD for one in takes.values()):
            return self.predict(input_ids=ids, **kwargs)
        return self.predict(ids, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture for inputs like these ahead of the first call, which then takes no longer than others.

        Args:
            args: inputs as the calls to come will have them; of numbers only NaN matters, which is refused.
            kwargs: further inputs by name.

        Raises:
            InputError: the model rejects these inputs, or they hold NaN.
            CaptureError: torch.export cannot capture the model, or its graph gives other outputs than the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        self._predicted(self._engine.enter(args, kwargs), self._options)

    def reset(self) -> None:
        """Forget everything captured, for all explainers that share it (`using`); the next call captures anew."""
        self._engine.reset()

    def noise_floor(self, *args: Any, target: Target = None, draws: int = 2, **kwargs: Any) -> Tensor:
        """How far each map moves when every input and parameter changes by as little as its dtype can tell; see `fastrel.noise`.

        Args:
            args: the model's inputs.
            target: what to explain, as `Prediction.explain` takes it.
            draws: how many perturbations to try, each another explanation.
            kwargs: further inputs by name.

        Returns:
            The largest relative L2 distance over the draws, [B] or [B, K]: 0.01 is a hundredth of the map.

        Raises:
            InputError: draws < 1; as `predict` and `Prediction.explain`.
        """
        return self.predict(*args, **kwargs).noise_floor(target, draws)

    def graphed(
        self, *args: Any, targets: int = 0, batch_sizes: Sequence[int] = (), checks: bool = True, **kwargs: Any
    ) -> Graphed:
        """Predictions and explanations of inputs of these very sizes as one CUDA graph; see `fastrel.graphed`.

        Args:
            args: the model's inputs, on a CUDA device; sizes and dtypes are those of every later call.
            targets: how many classes per sample will be explained; 0 for the predicted one.
            batch_sizes: a graph for each of these; later calls may have any batch up to the largest. Default: that of the inputs.
            checks: whether NaN and infinity in outputs and maps are refused, for which a call waits for the device. False: it
                returns at once, and NaN in is NaN out.
            kwargs: further inputs by name.

        Raises:
            InputError: the model is not on a CUDA device, this method cannot be captured, or a batch size below 1.
        """
        return Graphed(self._engine, self._options, args, kwargs, targets, batch_sizes, checks)

    def programmed(self, *args: Any, **kwargs: Any) -> tuple[Call, Program]:
        """What runs for inputs like these: the call of the captured graph, and the program that explains its logits.

        Raises:
            InputError: the model rejects these inputs, or they hold NaN.
            CaptureError: torch.export cannot capture the model, or its graph gives other outputs than the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        call = self._engine.enter(args, kwargs)
        return call, self._engine.explaining(call, self._options)

    def trace(self, *args: Any, target: Target = None, **kwargs: Any) -> list[BlockTrace]:
        """The attention, gradient and relevance of every block from `start_layer` on; slower, for study and tests.

        Args:
            args: the model's inputs.
            target: what to explain, as `Prediction.explain` takes it.
            kwargs: further inputs by name.

        Returns:
            One record per block, the one nearest the input first.

        Raises:
            InputError: as `predict` and `Prediction.explain`.
        """
        call = self._engine.enter(args, kwargs)
        program = self._engine.explaining(call, self._options, trace=True)
        return Prediction(self._engine, self._options, call, program).trace(target)

    def verify(self, *args: Any, target: Target = None, **kwargs: Any) -> Verification:
        """Check the explanation of `model(*args, **kwargs)` on the model itself; see `fastrel.verification`.

        Args:
            args: the model's inputs; the first sample is also explained alone and compared with the batch.
            target: what to explain, as `Prediction.explain` takes it.
            kwargs: further inputs by name.

        Returns:
            The report, one line per check when printed. A check that fails is no error but a part of it: look at its `ok`.

        Raises:
            InputError: the model rejects these inputs, they hold NaN, or the target does not fit the output.
            CaptureError: torch.export cannot capture the model, or its graph gives other outputs than the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        return verify(self._engine, self._options, args, kwargs, target)

    def using(self, method: str | Method | None = None, **changes: Any) -> Explainer:
        """Another explainer of the same model, alike but for the method and the options named in `changes`, that shares this
        one's captured graphs, which take seconds to make.

        Args:
            method: a name, or a `fastrel.Method`; None keeps this one's, the default of the rules where none was chosen.
            changes: any of rules, start_layer, normalize_rollout, precision, backend, memory, output, grid. What is not named is
                kept, also a start_layer that was chosen; None goes back to the method's own.

        Raises:
            InputError: an option that does not exist, or options that do not go together.
        """
        known = set(Options.__dataclass_fields__) - {"base"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}; choose from {', '.join(sorted(known))}")
        if method is not None:
            changes["base"] = method_of(method)
        other = object.__new__(type(self))
        other._model, other._engine = self._model, self._engine
        other._options = replace(self._options, **changes)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The model and the options; captured graphs are made anew where they are needed."""
        return {
            "model": self._model,
            "options": self._options,
            "live": self._engine.live,
            "checks": self._engine.checks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._options = state["model"], state["options"]
        self._engine = Engine(self._model, state["live"], state["checks"])

    def _predicted(
        self, call: Call, options: Options, grad: bool = False, kept: bool = False, checks: Checks | None = None
    ) -> Prediction:
        program = self._engine.explaining(call, options)
        return Prediction(self._engine, options, call, program, grad, kept, checks)

    def _differentiable(self, args: Any, kwargs: Any, target: Target) -> Explanation:
        """An explanation with its graph of autograd, by the plain PyTorch of every operator."""
        if isinstance(self.method.reading, PathIntegral) or callable(target):
            raise InputError("create_graph needs class targets and a method other than integrated_gradients")
        options = replace(self._options, backend="torch", precision="float32")
        return self._predicted(self._engine.enter(args, kwargs), options, grad=True).explain_once(target, create_graph=True)
