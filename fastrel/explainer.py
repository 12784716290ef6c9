"""Explainer: a model, once; then explanations of its predictions."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastrel import backends, methods
from fastrel import precision as precision_
from fastrel.capture import Captured, Signature, capture, evaluation_mode, in_order
from fastrel.emit import lane_dtype
from fastrel.errors import CaptureError, InputError, UnsupportedModelError
from fastrel.explanation import BlockTrace, Explanation, check_finite
from fastrel.methods.integrated_gradients import integrated_gradients
from fastrel.reference.rules import Rules
from fastrel.targets import Seeds, Target, class_seeds, function_seeds
from fastrel.transform import Program, transform

if TYPE_CHECKING:
    from fastrel.graphed import Graphed
    from fastrel.verification import Verification

RULES = get_args(Rules)


class Explainer:
    """Explains predictions of an unmodified model.

    The model is captured with `torch.export` at the first call and again for every new kind of input (other image size,
    other dtype); batch size and text length may vary freely. Nothing is patched and nothing is copied: parameters are read
    from the live model at every call, so that training it further is fine. It is always explained as it predicts in eval
    mode, whatever mode it is in. Calls from several threads are safe.

    Args:
        model: a module that returns class logits [B, C], or anything holding them (a Hugging Face output, a dict, a tuple).
        method: one of `fastrel.methods.METHODS`.
        rules: "positive" (default): eq. (5) in every layer. "official": the published code, whose maps depend on rounding.
            "original_lrp": the published code's baseline LRP, which doubles relevance in every linear layer.
        start_layer: first attention block of the chain, counted from the input; negative from the output. Default: the
            method's own, 0 for transformer attribution.
        normalize_rollout: scale the rows of I + M to sum 1, as the published code does for BERT. Default: the method's own,
            False for transformer attribution.
        precision: "float32": the model's own dtype throughout (16-bit models: lanes in float32). "mixed": matrix products
            of relevance and gradient in bfloat16, where the processor does that faster than float32. "low": those of
            relevance in int8 where that is faster, on a GPU in float8. Both need rules="positive"; the forward pass is the model's own.
        memory: "normal", or "low": between prediction and explanation only what the blocks pass on is kept, and each block
            is computed again when its turn comes, for the time of one more forward pass.
        backend: "auto": per operator the first that can compute it of "triton" and "cuda" on a GPU, "cpp" (C++) on a CPU, and
            "torch", plain PyTorch. One that is named computes everything that it has kernels for, or says why it cannot.

    Raises:
        InputError: an option that does not exist; `backend` that cannot run, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "transformer_attribution",
        *,
        rules: str = "positive",
        start_layer: int | None = None,
        normalize_rollout: bool | None = None,
        precision: str = "float32",
        backend: str = "auto",
        memory: str = "normal",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if rules not in RULES:
            raise InputError(f"unknown rules {rules!r}; choose one of {', '.join(RULES)}")
        precision_.check(precision, rules)
        if memory not in ("normal", "low"):
            raise InputError(f"unknown memory {memory!r}; choose normal or low")
        backends.require(backend)
        self.model = model
        self.method = methods.get(method, start_layer=start_layer, normalize=normalize_rollout)
        self.rules, self.precision, self.backend, self.memory = rules, precision, backend, memory
        self._lock = threading.Lock()
        self._captured: dict[Signature, list[Captured]] = {}
        self._programs: dict[tuple[int, tuple[int, ...], bool], Program] = {}
        self._plain: Explainer | None = None

    def __call__(self, *args: Any, target: Target = None, create_graph: bool = False, **kwargs: Any) -> Explanation:
        """Explain `model(*args, **kwargs)`: `predict(...)` and `explain(target)` in one, in less memory.

        With `create_graph`, logits and relevance are differentiable with respect to parameters and inputs, so that a map can be
        a part of a training loss; everything then runs in plain PyTorch and keeps its intermediate values. The model still
        predicts as in eval mode.
        """
        if create_graph:
            return self._differentiable(args, kwargs, target)
        return self.predict(*args, **kwargs)._explain(target, once=True)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """The model's prediction, kept so that it can be explained for any target without another forward pass.

        Inputs are given as to the model itself; dimension 0 of every tensor is the batch.

        Raises:
            InputError: the model rejects these inputs, or they hold NaN.
            CaptureError: torch.export cannot capture the model.
            UnsupportedModelError: the model holds something without a relevance rule.
        """
        captured, values, tensors = self._enter(args, kwargs)
        return self._run(captured, self._program(captured, (captured.logits_index,)), values, tensors)

    def graphed(self, *args: Any, targets: int = 0, **kwargs: Any) -> Graphed:
        """Predictions and explanations of inputs of these very sizes as one CUDA graph; see `fastrel.graphed`.

        Args:
            targets: how many classes per sample will be explained; 0 for the predicted one.

        Raises:
            InputError: the model is not on a CUDA device, or this method cannot be captured.
        """
        from fastrel.graphed import Graphed

        return Graphed(self, args, kwargs, targets)

    def _differentiable(self, args: Any, kwargs: Any, target: Target) -> Explanation:
        """An explanation with its graph of autograd, by the plain PyTorch of every operator."""
        if self.method.reading == "steps" or callable(target):
            raise InputError("create_graph needs class targets and a method other than integrated_gradients")
        plain = self._plain = self._plain or self.using(
            self.method.name, rules=self.rules, start_layer=self.method.start_layer, normalize_rollout=self.method.normalize
        )
        plain.backend, plain.precision = "torch", "float32"
        captured, values, tensors = plain._enter(args, kwargs)
        program = plain._program(captured, (captured.logits_index,))
        with torch.enable_grad():
            outputs, saved = program.forward(*values)
            prediction = Prediction(plain, captured, program, list(outputs), saved, values, tensors)
            return prediction._explain(target, once=True, create_graph=True)

    def trace(self, *args: Any, target: Target = None, **kwargs: Any) -> list[BlockTrace]:
        """The attention, gradient and relevance of every block from `start_layer` on; slower, for study and tests."""
        captured, values, tensors = self._enter(args, kwargs)
        program = self._program(captured, (captured.logits_index,), trace=True)
        return self._run(captured, program, values, tensors)._trace(target)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Check the explanation of `model(*args, **kwargs)` on the model itself; see `fastrel.verification`.

        Raises:
            As `predict`; a check that fails is no error but part of the report.
        """
        from fastrel.verification import verify

        return verify(self, args, kwargs)

    def using(
        self,
        method: str = "transformer_attribution",
        *,
        rules: str = "positive",
        start_layer: int | None = None,
        normalize_rollout: bool | None = None,
    ) -> Explainer:
        """Another explainer of the same model that shares this one's captured graphs, which take seconds to make."""
        other = Explainer(
            self.model,
            method,
            rules=rules,
            start_layer=start_layer,
            normalize_rollout=normalize_rollout,
            precision=self.precision if rules == "positive" else "float32",
            backend=self.backend,
            memory=self.memory,
        )
        other._captured, other._lock = self._captured, self._lock
        return other

    def _run(self, captured: Captured, program: Program, values: list[Any], tensors: list[Tensor]) -> Prediction:
        with torch.no_grad():
            outputs, saved = program.forward(*values)
        return Prediction(self, captured, program, list(outputs), saved, values, tensors)

    def _enter(self, args: Any, kwargs: Any) -> tuple[Captured, list[Any], list[Tensor]]:
        """The captured graph that takes these inputs, made if there is none; its placeholders' values; the tensors."""
        kwargs = in_order(self.model, args, kwargs)
        signature, leaves = Signature.of(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _check_inputs(tensors)
        found = self._find(signature, leaves, tensors)
        if found is None:
            with self._lock:
                found = self._find(signature, leaves, tensors)
                if found is None:
                    captured = self._new_capture(args, kwargs)
                    self._captured.setdefault(signature, []).append(captured)
                    found = self._find(signature, leaves, tensors)
        if found is None:
            raise CaptureError(
                f"the captured graph does not take inputs of sizes {[tuple(x.shape) for x in tensors]}; "
                "dimension 0 of every tensor input must be the batch"
            )
        return *found, tensors

    def _find(self, signature: Signature, leaves: list[Any], tensors: list[Tensor]) -> tuple[Captured, list[Any]] | None:
        """A graph that is valid for these inputs and the model as it is, and the values of its placeholders."""
        for captured in self._captured.get(signature, []):
            if captured.accepts(tensors) and (owned := captured.parameters(self.model)) is not None:
                return captured, owned + leaves
        return None

    def _new_capture(self, args: Any, kwargs: Any) -> Captured:
        try:
            return capture(self.model, args, kwargs)
        except CaptureError:
            self._try_model(args, kwargs)
            raise

    def _try_model(self, args: Any, kwargs: Any) -> None:
        """Tell a model that rejects its inputs from one that cannot be captured."""
        try:
            with evaluation_mode(self.model), torch.no_grad():
                self.model(*args, **kwargs)
        except Exception as error:
            raise InputError(f"{type(self.model).__name__} rejects these inputs: {error}") from error

    def _program(self, captured: Captured, outputs: tuple[int, ...], trace: bool = False) -> Program:
        key = (id(captured), outputs, trace)
        if key not in self._programs:
            with self._lock:
                if key not in self._programs:
                    value = captured.outputs[outputs[0]].meta["val"]
                    program = transform(
                        captured,
                        self.method,
                        rules=self.rules,
                        leaves=outputs,
                        trace=trace,
                        memory=self.memory,
                        products=precision_.products(
                            self.precision, self.rules, lane_dtype(value.dtype), value.device, self.backend
                        ),
                    )
                    backends.lower(
                        program.reverse,
                        self.backend,
                        value.device,
                        program.dtype,
                        keep_weights=self.memory == "normal",
                    )
                    self._programs[key] = program
        return self._programs[key]


class Prediction:
    """A prediction that can be explained. Made by `Explainer.predict`.

    Attributes:
        logits: the logits, as the model returns them.
        output: everything the model returns.
    """

    def __init__(
        self,
        explainer: Explainer,
        captured: Captured,
        program: Program,
        outputs: list[Tensor],
        saved: Sequence[Any],
        values: list[Any],
        inputs: list[Tensor],
    ) -> None:
        self._explainer, self._captured, self._program = explainer, captured, program
        self._outputs, self._values, self._inputs = outputs, values, inputs
        self._saved: Sequence[Any] = saved

    @property
    def logits(self) -> Tensor:
        """The model's logits, [B, C]."""
        return self._outputs[self._captured.logits_index]

    @property
    def output(self) -> Any:
        """What the model returned, in its own type."""
        return self._rebuild(self._outputs)

    def explain(self, target: Target = None) -> Explanation:
        """Explain this prediction.

        Args:
            target: None (the predicted class of each sample) · an int · [B] class indices · [B, K] (K targets per sample,
                at less than K times the cost) · a function of the model's output that returns [B] or [B, K] values, for
                regression, similarities, contrasts (`lambda out: out[:, 3] - out[:, 5]`) or multi-label scores.

        Raises:
            InputError: the target does not fit the output.
        """
        return self._explain(target, once=False)

    def _explain(self, target: Target, once: bool, create_graph: bool = False) -> Explanation:
        """`explain`; if it happens only once, what was saved for it is freed as the reverse pass goes."""
        check_finite("the model's output", self.logits)
        seeds, program, saved = self._seed(target)
        if self._explainer.method.reading == "steps":
            row = grid = self._along_path(seeds)
        else:
            arguments = _arguments(program, seeds, saved)
            del saved
            if once:
                self._saved = ()
            with torch.set_grad_enabled(create_graph):
                row, grid, _ = self._run_reverse(program, arguments)
        relevance = row.flatten(2).transpose(0, 1)
        check_finite("the explanation", relevance)
        patches = None if grid is None else grid.transpose(0, 1)
        if not seeds.several:
            relevance, patches = relevance[:, 0], None if patches is None else patches[:, 0]
        perturbed = functools.partial(
            _explain_perturbed,
            self._explainer,
            self._captured,
            self._values,
            self._inputs,
            target if callable(target) else seeds.classes,
        )
        size = image_size(self._inputs)
        return Explanation(self.logits, seeds.classes, relevance, patches, size, self.output, program.generic, perturbed)

    def _run_reverse(self, program: Program, arguments: list[Any]) -> Any:
        try:
            return program.reverse(arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(self._explainer.model).__name__
            raise UnsupportedModelError(f"cannot explain {name}, a rule failed on it: {error}") from error

    def _seed(self, target: Target) -> tuple[Seeds, Program, Sequence[Any]]:
        if not callable(target):
            return class_seeds(self.logits, target), self._program, self._saved
        seeds, used = function_seeds(self._outputs, self._rebuild, target)
        if tuple(used) == self._program.leaves:
            return seeds, self._program, self._saved
        program = self._explainer._program(self._captured, tuple(used))
        with torch.no_grad():
            _, saved = program.forward(*self._values)
        return seeds, program, saved

    def _along_path(self, seeds: Seeds) -> Tensor:
        """Integrated gradients of the seeded outputs [K, B, H, W]."""
        position = [i for i, x in enumerate(self._values) if x is self._inputs[0]]
        if len(self._inputs) != 1 or self._inputs[0].dim() != 4 or not position:
            raise InputError("integrated_gradients explains models of one image input [B, C, H, W]")
        maps = []
        for weights in seeds.gradient[0]:

            def score(image: Tensor, weights: Tensor = weights) -> Tensor:
                values = [*self._values[: position[0]], image, *self._values[position[0] + 1 :]]
                outputs, _ = self._program.forward(*values)
                repeats = len(image) // len(weights)
                return (outputs[self._program.leaves[0]] * weights.repeat(repeats, 1)).sum(1)

            maps.append(integrated_gradients(score, self._inputs[0]))
        return torch.stack(maps)

    def _trace(self, target: Target) -> list[BlockTrace]:
        seeds = class_seeds(self.logits, target)
        with torch.no_grad():
            _, _, records = self._program.reverse(_arguments(self._program, seeds, self._saved))
        found: dict[int, dict[str, Tensor]] = {}
        for (block, name), value in zip(self._program.record_names, records, strict=True):
            found.setdefault(block, {})[name] = value
        names = BlockTrace.__dataclass_fields__
        return [BlockTrace(**{name: found[block].get(name) for name in names}) for block in sorted(found)]  # type: ignore

    def _rebuild(self, outputs: list[Tensor]) -> Any:
        return pytree.tree_unflatten(outputs, self._captured.out_spec)


def _arguments(program: Program, seeds: Seeds, saved: Sequence[Any]) -> list[Any]:
    """What a reverse graph takes: the seeds of all lanes, and what the forward graph saved."""
    starts: list[Tensor] = []
    for features, gradient, relevance in zip(program.leaf_features, seeds.gradient, seeds.relevance, strict=True):
        row = relevance.abs().sum([dim + 1 for dim in features], keepdim=True)
        starts += [gradient, relevance, row]
    return [*starts, *saved]


def _explain_perturbed(
    explainer: Explainer, captured: Captured, values: list[Any], inputs: list[Tensor], target: Target, seed: int
) -> Explanation:
    """The explanation with every floating-point input and parameter multiplied by 1 + u·eps, u uniform in [-1, 1)."""
    generators: dict[torch.device, torch.Generator] = {}

    def shaken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        generator = generators.setdefault(value.device, torch.Generator(value.device).manual_seed(seed))
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        factor = torch.rand(value.shape, generator=generator, dtype=wide, device=value.device)
        factor.mul_(2).sub_(1).mul_(torch.finfo(value.dtype).eps).add_(1)
        return factor.mul_(value.detach()).to(value.dtype)

    moved = [shaken(value) for value in values]
    places = [next(i for i, value in enumerate(values) if value is x) for x in inputs]
    program = explainer._program(captured, (captured.logits_index,))
    return explainer._run(captured, program, moved, [moved[i] for i in places]).explain(target)


def _check_inputs(tensors: list[Tensor]) -> None:
    """Refuse what cannot be explained: nothing at all, empty batches, NaN."""
    if not tensors:
        raise InputError("no tensor among the inputs; call the explainer as you call the model")
    for position, x in enumerate(tensors):
        if x.dim() and len(x) == 0:
            raise InputError(f"input {position} of shape {tuple(x.shape)} holds no samples")
        if x.is_floating_point():
            check_finite(f"input {position}", x)


def image_size(inputs: list[Tensor]) -> tuple[int, int] | None:
    """Height and width of the images among a model's inputs."""
    images = [x for x in inputs if x.dim() == 4 and x.is_floating_point()]
    return (images[0].shape[2], images[0].shape[3]) if images else None
