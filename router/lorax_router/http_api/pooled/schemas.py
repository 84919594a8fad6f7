"""Shapes of the answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class LabelAnswer(BaseModel):
    """A label of a text, best first."""

    label: str
    score: float


class EntityAnswer(BaseModel):
    """A part of a text that was named; places count bytes of its UTF-8."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class AdapterFault(BaseModel):
    """What is wrong with one of several adapters, or with the text for it."""

    adapter_id: str
    error: str
    error_type: str


class AdapterLabels(BaseModel):
    """What the head of one of several adapters says: labels of a text, or its entities."""

    adapter_id: str
    labels: list[LabelAnswer] | None = None
    entities: list[EntityAnswer] | None = None


class ClassUsage(BaseModel):
    """What it took, in tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ClassifiedText(BaseModel):
    """The likeliest label of one text, and the probabilities of all in the head's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationAnswer(BaseModel):
    """vLLM's answer."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedText]
    usage: ClassUsage


class RankAnswer(BaseModel):
    """TEI's: where a text stood, and how much it has to do with the query; best first."""

    index: int
    score: float
    text: str | None = None


class RankedDocument(BaseModel):
    """The same in Cohere's words."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Documents, best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: ClassUsage
    meta: dict[str, Any]


class ScoredPair(BaseModel):
    """How much two texts have to do with each other."""

    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(BaseModel):
    """vLLM's answer, in the order of the texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoredPair]
    usage: ClassUsage
