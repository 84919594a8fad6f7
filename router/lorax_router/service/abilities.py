"""What a model does with texts, and how it was made to do it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import HeadFacts, Pooling, VectorFacts
from lorax_contract.step import OutputKind, ShardInfo
from lorax_router.service.requests import GenerateParameters, GenerateRequest, Prompt, TextPrompt
from lorax_router.service.vectors import (
    MOST_TOKEN_NUMBERS,
    VectorShape,
    too_many_dimensions,
    too_many_numbers,
)

_TEI_POOLINGS = {Pooling.FIRST: "cls", Pooling.LAST: "last_token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What the base model does; an adapter may bring a classification head of its own."""

    # Whether it makes tokens.
    generates: bool = True
    # The vectors that it was made for.
    vectors: VectorFacts = field(default_factory=VectorFacts)
    # None: it has no classification head.
    head: HeadFacts | None = None

    @classmethod
    def of(cls, info: ShardInfo) -> Self:
        """Return what a shard group says of its model."""
        return cls(generates=info.generates, vectors=info.vectors, head=info.head)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it does, by the names that ``/info`` has."""
        does = {"generate": self.generates, "embed": True, "classify": self.head is not None}
        return tuple(name for name, is_done in does.items() if is_done)

    @property
    def task(self) -> str:
        """What it is mainly for, by the names that ``--task`` takes."""
        if self.head is None:
            return "generate" if self.generates else "embed"
        if self.head.classifies_tokens:
            return "token-classify"
        return "rerank" if len(self.head.labels) == 1 else "classify"

    @property
    def tei_type(self) -> dict[str, dict[str, Any]] | None:
        """What TEI's ``/info`` says of such a model; None: TEI has none that does its task."""
        if self.task == "embed":
            pooling = self.vectors.pooling
            return {"embedding": {"pooling": _TEI_POOLINGS.get(pooling, pooling.name.lower())}}
        if self.head is None or self.head.classifies_tokens:
            return None
        numbered = {str(number): label for number, label in enumerate(self.head.labels)}
        by_label = {label: int(number) for number, label in numbered.items()}
        kind = "reranker" if self.task == "rerank" else "classifier"
        return {kind: {"id2label": numbered, "label2id": by_label}}

    @property
    def pipeline_tag(self) -> str:
        """What the hub calls models that do what it is mainly for."""
        if self.head is not None:
            kind = "token" if self.head.classifies_tokens else "text"
            return f"{kind}-classification"
        return "text-generation" if self.generates else "feature-extraction"

    def check(self, request: GenerateRequest) -> None:
        """Raise ValidationError for what the model cannot do, whichever adapter is asked for."""
        params = request.parameters
        if not params.output.pools and not self.generates:
            does = "makes vectors of texts" + (" and classifies them" if self.head else "")
            raise ValidationError(
                f"this model generates no text: it {does}. Send texts to `/v1/embeddings` or "
                "`/embed`" + (", or to `/classify`" if self.head else "")
            )
        if params.output is OutputKind.VECTOR:
            self._check_dimensions(params.dimensions)
            self._check_prompt_name(request)

    def head_for(
        self, params: GenerateParameters, own: HeadFacts | None, *, has_adapter: bool
    ) -> HeadFacts | None:
        """Return what gives a request's scores, of its adapter's ``own`` head and the model's.

        None: it asks for none. Raises ValidationError if there is no head.
        """
        if params.output is not OutputKind.SCORES:
            return None
        head = own or self.head
        if head is None:
            lacks = "neither this model nor the adapter has"
            if not has_adapter:
                lacks = "this model does not have"
            raise ValidationError(
                f"{lacks} a classification head: name an adapter that has one (`adapter_id`), or ask "
                "for vectors (`/v1/embeddings`, `/embed`)"
            )
        return head

    def shape(self, params: GenerateParameters, head: HeadFacts | None) -> VectorShape:
        """Return how the vector of a request is made: what it does not say is as the model was made."""
        if head is not None:
            return VectorShape(pooling=head.pooling, normalize=False)
        made = self.vectors
        return VectorShape(
            pooling=made.pooling if params.pooling is None else params.pooling,
            dimensions=params.dimensions,
            normalize=made.normalize if params.normalize is None else params.normalize,
        )

    def check_size(self, shape: VectorShape, num_tokens: int) -> None:
        """Raise ValidationError for a prompt whose tokens' vectors are too much for one answer."""
        num = self.vectors.size * num_tokens
        if shape.pooling is Pooling.EACH and num > MOST_TOKEN_NUMBERS:
            raise too_many_numbers(num)

    def prompted(self, request: GenerateRequest) -> Prompt:
        """Return a prompt with what texts of its kind begin with; ids are taken as they are."""
        prompt, params = request.prompt, request.parameters
        if params.output is not OutputKind.VECTOR or not isinstance(prompt, TextPrompt):
            return prompt
        name = params.prompt_name
        made = self.vectors
        prefix = made.default_prompt if name is None else dict(made.prompts)[name]
        return replace(prompt, text=prefix + prompt.text) if prefix else prompt

    def _check_dimensions(self, wanted: int | None) -> None:
        if wanted is None:
            return
        if wanted < 1:
            raise ValidationError(f"`dimensions` must be at least 1, got {wanted}")
        if self.vectors.size and wanted > self.vectors.size:
            raise too_many_dimensions(wanted, self.vectors.size)

    def _check_prompt_name(self, request: GenerateRequest) -> None:
        name = request.parameters.prompt_name
        if name is None:
            return
        names = [known for known, _ in self.vectors.prompts]
        if not names:
            raise ValidationError("`prompt_name`: this model has no prompts; leave it out")
        if name not in names:
            shown = ", ".join(map(repr, names))
            raise ValidationError(f"`prompt_name` must be one of {shown}, got {name[:100]!r}")
        if not isinstance(request.prompt, TextPrompt):
            raise ValidationError("`prompt_name` goes with texts, not with token ids; leave it out")
