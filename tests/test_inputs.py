"""Models as people have them: what they return, write in place and compute with sizes does not get in the way."""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import transformers
from torch import Tensor, nn

import fastrel
from tests.small import ids, made, whole


def encoded(f: Callable[[Any, Tensor, Tensor], Any]) -> nn.Module:
    """A model that is f(model, hidden states, ids)."""
    return made(lambda model, given: f(model, model.encoder(given), given))


def wrote(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(x)
    return x


def region(context: Callable[[], Any], model: Any, x: Tensor) -> Tensor:
    with context():
        y = model.block(x)
    return model.head(y.to(x.dtype).mean(1))


CAUSAL = float("-inf")

FORWARDS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "returns (logits, None)": lambda m, x, i: (m.head(x.mean(1)), None),
    "returns numbers and strings": lambda m, x, i: {"logits": m.head(x.mean(1)), "loss": None, "step": 3, "name": "ok"},
    "x[:, 1] = 0": lambda m, x, i: m.head(wrote(x, lambda x: x.__setitem__((slice(None), 1), 0.0)).mean(1)),
    "x[mask] = 0.5": lambda m, x, i: m.head(wrote(x, lambda x: x.__setitem__(i > 25, 0.5)).mean(1)),
    "x[:, 2:4].mul_(2)": lambda m, x, i: m.head(wrote(x, lambda x: x[:, 2:4].mul_(2.0)).mean(1)),
    "a view written, its base read": lambda m, x, i: m.head(wrote(x, lambda x: x.view(-1, 16).add_(1)).mean(1)),
    "index_put_": lambda m, x, i: m.head(wrote(x, lambda x: x.index_put_((torch.arange(len(x)), i % 7 * 0 + 1)[:1], x * 0.5)).mean(1)),
    "torch.enable_grad() inside": lambda m, x, i: region(torch.enable_grad, m, x),
    "x[:, -1]": lambda m, x, i: m.head(x[:, -1]),
    "x[:, T - 1]": lambda m, x, i: m.head(x[:, x.shape[1] - 1]),
    "x[:, -2:]": lambda m, x, i: m.head(x[:, -2:].mean(1)),
    "the last token of each text": lambda m, x, i: m.head(x[torch.arange(len(x)), (i > 0).sum(1) - 1]),
    "int(x.shape[0])": lambda m, x, i: m.head(torch.cat([m.score.weight.expand(int(x.shape[0]), 1, 16), x], 1)[:, 1:].mean(1)),
    "float(x.shape[1])": lambda m, x, i: m.head((x / float(x.shape[1])).mean(1)),
    "a causal mask made inside": lambda m, x, i: m.head((x + m.cross(x, mask=torch.full((x.shape[1],) * 2, CAUSAL, dtype=x.dtype).triu(1)))[:, -1]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_ordinary_code_is_explained_alone_and_in_a_batch_of_any_size(name: str) -> None:
    model, given = encoded(FORWARDS[name]), ids()
    explainer = fastrel.Explainer(model, backend="torch")
    together = explainer(given, target=1)
    alone = explainer(given[:1], target=1)
    torch.testing.assert_close(alone.relevance, together.relevance[:1], rtol=1e-9, atol=1e-12)
    assert together.relevance.abs().sum() > 0
    for one, texts in ((together, given), (explainer(ids(2, 5), target=1), ids(2, 5))):
        assert one.relevance.shape == texts.shape
        found = model(texts)
        found = found if isinstance(found, Tensor) else found["logits"] if isinstance(found, dict) else found[0]
        torch.testing.assert_close(one.logits, found)


def test_writes_in_place_leave_what_other_spellings_leave() -> None:
    def mask(i: Tensor) -> Tensor:
        return (i > 25)[..., None]

    written = encoded(lambda m, x, i: m.head(wrote(x, lambda x: x.__setitem__(i > 25, 0.0)).mean(1)))
    filled = encoded(lambda m, x, i: m.head(x.masked_fill(mask(i), 0.0).mean(1)))
    a, b = (fastrel.Explainer(model, backend="torch")(ids(), target=1).relevance for model in (written, filled))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_regions_of_autocast_are_explained_with_their_casts() -> None:
    model = encoded(lambda m, x, i: region(lambda: torch.autocast("cpu", torch.bfloat16), m, x)).float()
    relevance = fastrel.Explainer(model, backend="torch")(ids()).relevance
    plain = encoded(lambda m, x, i: m.head(m.block(x).mean(1))).float()
    other = fastrel.Explainer(plain, backend="torch")(ids()).relevance
    assert F.cosine_similarity(relevance, other).min() > 0.999


def test_pictures_of_uint8_have_the_maps_of_floats() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made(lambda m, x: m.head(m.block(m.patches(x).flatten(2).mT).mean(1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.double() / 255 - 0.5)

    model, picture = Pictures().eval(), torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    a, b = (fastrel.Explainer(model, backend="torch")(x, target=1).patches for x in (picture, picture.double()))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_text_of_one_token_has_a_map() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, attn_implementation="eager"
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    for batch in (1, 2):
        assert fastrel.Explainer(model, backend="torch")(input_ids=ids(batch, 1)).relevance.shape == (batch, 1)


_HF: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SIDES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
          "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("GPT2ForSequenceClassification", None),
        ("LlamaForSequenceClassification", None),
        ("GPT2LMHeadModel", lambda out: out.logits[:, -1, 3]),
        ("BartForSequenceClassification", None),
        ("BertForQuestionAnswering", lambda out: out.start_logits[:, 2]),
    ],
)
def test_hugging_face_models_are_explained_as_delivered(name: str, target: Any) -> None:
    kind = next(kind for kind in ("GPT2", "Llama", "Bart", "Bert") if name.startswith(kind))
    config = getattr(transformers, f"{kind}Config")(
        **_HF, **(_SIDES if kind == "Bart" else {}), num_labels=2 if "Question" in name else 3
    )
    model = getattr(transformers, name)(config).double().eval()
    given = ids(2, 9)
    given[:, -1] = 2
    explanation = fastrel.Explainer(model, backend="torch")(
        input_ids=given, attention_mask=torch.ones_like(given), target=target
    )
    assert all(one.relevance.shape == (2, 9) for one in explanation.maps.values())
    assert all(one.relevance.abs().sum() > 0 for one in explanation.maps.values())


def test_a_mask_given_to_a_torch_encoder_is_captured() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
            )

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(ids), mask).mean(1))

    mask = nn.Transformer.generate_square_subsequent_mask(7)
    assert fastrel.Explainer(Model().eval(), backend="torch")(ids(), mask).relevance.shape == (3, 7)


def test_torch_prints_nothing_while_it_fails_to_capture() -> None:
    model, said = encoded(lambda m, x, i: m.head(x.mean(1)) if x.sum() > 0 else m.head(x[:, 0])), io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(fastrel.CaptureError) as error:
        fastrel.Explainer(model)(ids())
    assert not said.getvalue()
    assert len(str(error.value).splitlines()) <= 3


def test_rows_are_kept_where_tokens_are_picked() -> None:
    for name in ("x[:, -1]", "x[:, -2:]", "the last token of each text"):
        assert torch.allclose(whole(encoded(FORWARDS[name]), ids()), torch.tensor(4.0, dtype=torch.float64))


def test_an_input_without_dimensions_is_a_number_that_all_samples_share() -> None:
    model = made(lambda m, x, factor: m.head(m.encoder(x).mean(1) * factor))
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    for factor in (2.0, -3.0):
        found = explainer(given, torch.full((), factor, dtype=torch.float64), target=1)
        plain = fastrel.Explainer(made(lambda m, x, f=factor: m.head(m.encoder(x).mean(1) * f)))(given, target=1)
        torch.testing.assert_close(found.logits, plain.logits)
        torch.testing.assert_close(found.relevance, plain.relevance)


def test_a_batch_that_the_model_counts_in_python_is_captured_for_its_size() -> None:
    def with_class_token(count: Callable[[Tensor], int]) -> nn.Module:
        def f(m: Any, x: Tensor, encoded: Tensor) -> Any:
            return encoded, m.block(torch.cat([m.encoder.position[:1].expand(count(x), 1, -1), encoded], 1))

        return made(lambda m, x: f(m, x, m.encoder(x)))

    counting, asking = (fastrel.Explainer(with_class_token(count)) for count in (len, lambda x: x.shape[0]))
    for batch in (3, 1, 4):
        found, expected = (one(ids(batch), target=lambda out: out[1][:, 0, 1]).relevance for one in (counting, asking))
        torch.testing.assert_close(found, expected)


class Named(OrderedDict[str, Any]):
    """What models return, as transformers before 5.13 make it known: pytree is told the values and not what they are called."""


pytree.register_pytree_node(
    Named,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: Named(zip(names, values, strict=True)),
    serialized_type_name="tests.test_inputs.Named",
)


def test_outputs_that_do_not_tell_torch_what_they_are_called_have_their_names() -> None:
    def named(m: Any, x: Tensor, given: Tensor) -> Named:
        return Named(scores=m.head(x.mean(1)), logits=m.head(x[:, 0]), inside=Named(last=m.head(x[:, -1])))

    explainer, given = fastrel.Explainer(encoded(named)), ids()
    output = explainer.model(given)
    torch.testing.assert_close(explainer(given, target=1).logits, output["logits"])
    torch.testing.assert_close(explainer.using(output="inside.last")(given, target=1).logits, output["inside"]["last"])
