"""Bodies of texts that vectors are made of, or that are classified, ranked or compared: TEI's, vLLM's, Cohere's and LoRAX's fields.

Null means absent, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from starlette.requests import Request

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import ScoreKind
from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.cutting import cut_to
from lorax_router.http_api.json_body import Integer, Items, StrictBody, bearer_token, said
from lorax_router.http_api.lorax.bodies import EmbedParametersBody
from lorax_router.http_api.model_body import ModelBody
from lorax_router.http_api.terms_headers import with_terms
from lorax_router.http_api.timeout_header import timeout_of
from lorax_router.service.requests import GenerateParameters

# As many as OpenAI takes of texts to embed.
MAX_TEXTS = 2048

# Whose answers have a vector for each token.
MAX_TEXTS_OF_TOKENS = 64

ScoreFunction = Literal["sigmoid", "softmax", "none"]
_SCALES = {
    "softmax": ScoreKind.ONE_OF,
    "sigmoid": ScoreKind.ANY_OF,
    "none": ScoreKind.NUMBERS,
}
_OF_TEXTS = ("truncate", "truncation_direction", "prompt_name")
_OF_LABELS = ("top_k", "function_to_apply")


class PooledBody(ModelBody):
    """With which model, and what becomes of texts that are too long."""

    parameters: EmbedParametersBody | None = None
    """LoRAX's way to name an adapter; `model`, `adapter_id` and `adapter_source` are another."""
    truncate: bool | None = None
    """Cut the end of texts that are too long; refused otherwise."""
    truncation_direction: Literal["right", "Right"] | None = None
    """Texts are cut at their end."""
    truncate_prompt_tokens: Integer | None = None
    """The same to so many tokens; -1: to as many as a prompt may have."""
    priority: Integer | None = None
    """A smaller one goes first, where the server schedules by priority."""

    def asked(self, calls: Calls, request: Request, output: OutputKind) -> GenerateParameters:
        """Return the parameters of what is asked for with each text; raises ValidationError."""
        most = cut_to(self.truncate_prompt_tokens)
        own = GenerateParameters(
            output=output,
            cut_to=0 if self.truncate and most is None else most,
            priority=self.priority,
        )
        if self.parameters is None or not self.parameters.names_any:
            return calls.named(request, self, own)
        if self.adapter_id or calls.models.resolve(self.model, self.adapter_source).adapter_id:
            raise ValidationError("`parameters` and `model` name an adapter each; send one of them")
        named = replace(
            self.parameters.to_domain(bearer_token(request)),
            output=output,
            cut_to=own.cut_to,
            priority=own.priority,
            timeout_s=timeout_of(request),
        )
        return with_terms(request, named)


class ScoredBody(PooledBody):
    """With which scores."""

    raw_scores: bool | None = None
    """Scores as the classification head gives them, not as probabilities."""
    activation: bool | None = None
    """vLLM's name for the opposite."""

    @property
    def scale(self) -> ScoreKind | None:
        """What is made of the head's scores; None: what the model says."""
        is_raw = bool(self.raw_scores) or self.activation is False
        return ScoreKind.NUMBERS if is_raw else None


class LabelParametersBody(EmbedParametersBody):
    """With which adapter a text is classified, and which labels are told."""

    top_k: Integer | None = None
    """As `top_k` beside `inputs`."""
    function_to_apply: ScoreFunction | None = None
    """As `function_to_apply` beside `inputs`."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        own = {name: value for name, value in said(self).items() if name not in _OF_LABELS}
        return EmbedParametersBody.model_validate(own).to_domain(bearer_token)


class LabelBody(ScoredBody):
    """With which labels."""

    parameters: LabelParametersBody | None = None
    """LoRAX's way to name an adapter, and where Hugging Face's clients put what they ask for."""
    top_k: Integer | None = None
    """Hugging Face's: the best so many labels only; all if absent."""
    function_to_apply: ScoreFunction | None = None
    """Hugging Face's: what is made of the head's scores; as the model says if absent."""

    @property
    def most(self) -> int | None:
        """How many labels are wanted; None: all."""
        most: int | None = self._either("top_k")
        return most

    @property
    def scale(self) -> ScoreKind | None:
        """What is made of the head's scores; None: what the model says."""
        function: str | None = self._either("function_to_apply")
        return super().scale if function is None else _SCALES[function]

    def check_labels(self) -> None:
        """Raise ValidationError for labels that contradict each other or are none."""
        if self.most is not None and self.most < 1:
            raise ValidationError(f"`top_k` must be at least 1, got {self.most}")
        is_said = self.raw_scores is not None or self.activation is not None
        if is_said and self._either("function_to_apply") is not None:
            raise ValidationError(
                "`function_to_apply` says what `raw_scores` and `activation` say; send one of them"
            )

    def _either(self, name: str) -> Any:
        """Return a field that may stand in `parameters` as well."""
        inner = None if self.parameters is None else getattr(self.parameters, name)
        outer = getattr(self, name)
        if inner is not None and outer is not None:
            raise ValidationError(f"`{name}` stands beside `parameters` and in it; send one")
        return inner if outer is None else outer


class EmbedBody(PooledBody):
    """A text to make a vector of, or several."""

    inputs: str | Items[str]
    """The text; or a list of texts, whose answer is TEI's: a list of vectors."""
    normalize: bool | None = None
    """TEI's: let each vector have length one; as the model was made if absent."""
    prompt_name: str | None = None
    """TEI's: by which name the model knows what such texts begin with."""
    dimensions: Integer | None = None
    """TEI's: only the first so many numbers of each."""
    adapters: Items[str] | None = None
    """Through each of these adapters: the answer is a list, with an entry for each."""
    stream: bool | None = None
    """Clients say that it is false."""

    @property
    def is_list(self) -> bool:
        """Whether the answer is a list of vectors, as TEI's is: LoRAX knows none of TEI's fields."""
        fields = (self.normalize, self.prompt_name, self.dimensions, self.truncate)
        of_tei = any(each is not None for each in (*fields, self.truncation_direction))
        return of_tei or not isinstance(self.inputs, str)

    @property
    def texts(self) -> list[str]:
        """All texts; raises ValidationError."""
        if self.stream:
            raise ValidationError("`stream` is not offered for a vector; leave it out")
        return [self.inputs] if isinstance(self.inputs, str) else texts_of("inputs", self.inputs)


class EmbedAllBody(PooledBody):
    """A text to make a vector of each token of, or several."""

    inputs: str | Items[str]
    """The text, or a list of texts."""
    prompt_name: str | None = None
    """TEI's: by which name the model knows what such texts begin with."""

    @property
    def texts(self) -> list[str]:
        """All texts; raises ValidationError."""
        given = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        if len(given) > MAX_TEXTS_OF_TOKENS:
            raise ValidationError(
                f"`inputs` takes at most {MAX_TEXTS_OF_TOKENS} texts where each token has a vector, got "
                f"{len(given)}"
            )
        return texts_of("inputs", given)


class SimilarityInputBody(StrictBody):
    """What is compared."""

    source_sentence: str
    """The text that the others are compared with."""
    sentences: Items[str]
    """The others."""


class SimilarityParametersBody(EmbedParametersBody):
    """With which adapter texts are compared, and how they are read."""

    truncate: bool | None = None
    """As `truncate` beside `inputs`."""
    truncation_direction: Literal["right", "Right"] | None = None
    """Texts are cut at their end."""
    prompt_name: str | None = None
    """By which name the model knows what such texts begin with."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        own = {name: value for name, value in said(self).items() if name not in _OF_TEXTS}
        return EmbedParametersBody.model_validate(own).to_domain(bearer_token)


class SimilarityBody(PooledBody):
    """TEI's: a text, and others that are compared with it by their vectors."""

    inputs: SimilarityInputBody
    """What is compared."""
    parameters: SimilarityParametersBody | None = None
    """TEI's fields, and LoRAX's way to name an adapter."""

    def asked(self, calls: Calls, request: Request, output: OutputKind) -> GenerateParameters:
        """Return the parameters of what is asked for with each text; raises ValidationError."""
        inner = self.parameters or SimilarityParametersBody()
        truncate = inner.truncate if self.truncate is None else self.truncate
        own = PooledBody.asked(
            self.model_copy(update={"truncate": truncate}), calls, request, output
        )
        return replace(own, prompt_name=inner.prompt_name)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared with what; raises ValidationError."""
        if not self.inputs.source_sentence:
            raise ValidationError("`inputs.source_sentence` must not be empty")
        others = texts_of("inputs.sentences", self.inputs.sentences)
        return [(self.inputs.source_sentence, each) for each in others]


class ClassifyBody(LabelBody):
    """A text to classify; in vLLM's words several."""

    inputs: str | None = None
    """The text, as LoRAX and TEI call it."""
    input: str | Items[str] | None = None
    """The text or texts, as vLLM calls them: the answer is vLLM's then."""
    adapters: Items[str] | None = None
    """Through each of these adapters: the answer is a list, with an entry for each."""

    @property
    def texts(self) -> list[str]:
        """All texts; raises ValidationError."""
        if (self.inputs is None) == (self.input is None):
            raise ValidationError("send the text as `inputs`, or texts as `input`, and not both")
        if self.inputs is not None:
            return [self.inputs]
        if self.most is not None:
            raise ValidationError(
                "`top_k` is for texts that are sent as `inputs`: of `input` all labels are told"
            )
        return texts_of("input", [self.input] if isinstance(self.input, str) else self.input)


class ClassifyBatchBody(LabelBody):
    """Texts to classify."""

    inputs: Items[str]
    """The texts."""

    @property
    def texts(self) -> list[str]:
        """All texts; raises ValidationError."""
        return texts_of("inputs", self.inputs)


class PredictBody(LabelBody):
    """A text or a pair of texts to classify, or several of them."""

    inputs: str | Items[str] | Items[Items[str]]
    """A text, a list of one text or of the two of a pair, or a list of such lists."""

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list of answers."""
        return isinstance(self.inputs, list) and any(isinstance(each, list) for each in self.inputs)

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        """All texts, those of pairs with the second one; raises ValidationError."""
        given = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        rows: list[Any] = list(given) if self.is_batch else [given]
        if len(rows) > MAX_TEXTS:
            raise ValidationError(f"`inputs` takes at most {MAX_TEXTS} texts, got {len(rows)}")
        if not all(1 <= len(row) <= 2 for row in rows):
            raise ValidationError("`inputs` must be a text, or have one or two texts in each list")
        return [(row[0], row[1] if len(row) == 2 else None) for row in rows]


class NamedText(StrictBody):
    """A document with its text."""

    text: str


class RerankBody(ScoredBody):
    """A query, and texts to rank by how much they have to do with it."""

    query: str
    """What is looked for."""
    texts: Items[str] | None = None
    """What is ranked, as TEI calls it: the answer is TEI's then."""
    documents: Items[str | NamedText] | None = None
    """What is ranked, as Cohere, Jina and vLLM call it: texts, or objects with a `text`."""
    top_n: Integer | None = None
    """Answer with the best so many only."""
    return_text: bool | None = None
    """TEI's: answer with the texts, too."""
    return_documents: bool | None = None
    """Cohere's: the same. False if absent."""

    @property
    def ranked(self) -> list[str]:
        """All texts; raises ValidationError."""
        if (self.texts is None) == (self.documents is None):
            raise ValidationError("send what is to be ranked as `texts` or as `documents`")
        if self.top_n is not None and self.top_n < 1:
            raise ValidationError(f"`top_n` must be at least 1, got {self.top_n}")
        if not self.query:
            raise ValidationError("`query` must not be empty")
        if self.texts is not None:
            return texts_of("texts", self.texts)
        given = self.documents or []
        texts = [each if isinstance(each, str) else each.text for each in given]
        return texts_of("documents", texts)


class ScoreBody(ScoredBody):
    """Texts to compare: one with several, or each with another."""

    text_1: str | Items[str]
    """A text, or as many as `text_2` has."""
    text_2: str | Items[str]
    """What it is compared with."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared with what; raises ValidationError."""
        first = texts_of("text_1", [self.text_1] if isinstance(self.text_1, str) else self.text_1)
        second = texts_of("text_2", [self.text_2] if isinstance(self.text_2, str) else self.text_2)
        if len(first) not in (1, len(second)):
            raise ValidationError(
                f"`text_1` must be one text or as many as `text_2`: it has {len(first)}, and `text_2` "
                f"{len(second)}"
            )
        return list(zip(first * (len(second) // len(first)), second, strict=True))


def texts_of(name: str, given: list[str] | None) -> list[str]:
    """Return the texts of a field; ValidationError if there are none, too many, or empty ones."""
    if not given:
        raise ValidationError(f"`{name}` must not be empty")
    if len(given) > MAX_TEXTS:
        raise ValidationError(f"`{name}` takes at most {MAX_TEXTS} texts, got {len(given)}")
    if "" in given:
        raise ValidationError(
            f"`{name}` must not have empty texts: number {given.index('')} is one"
        )
    return given
