"""What is made of hidden states, on the wire and back: ``*_to_proto`` and ``*_from_proto`` pairs."""

from __future__ import annotations

from typing import TypeVar

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind, VectorFacts
from lorax_contract.step import OutputKind
from lorax_proto import generate_pb2 as pb

SomeKind = TypeVar("SomeKind", OutputKind, Pooling, ScoreKind)


def known(kinds: type[SomeKind], number: int, what: str) -> SomeKind:
    """Return the kind of a number; raises ValidationError for one that is not known."""
    try:
        return kinds(number)
    except ValueError:
        raise ValidationError(f"{what} of the kind {number} is not known") from None


def head_to_proto(head: HeadFacts) -> pb.HeadFacts:
    """Return a classification head as the wire has it."""
    return pb.HeadFacts(
        pooling=pb.Pooling.Name(head.pooling),
        labels=head.labels,
        scores=pb.ScoreKind.Name(head.scores),
    )


def head_from_proto(message: pb.HeadFacts) -> HeadFacts:
    """Return a classification head; raises ValidationError for what is unknown of it."""
    return HeadFacts(
        pooling=known(Pooling, message.pooling, "a pooling"),
        labels=tuple(message.labels),
        scores=known(ScoreKind, message.scores, "scores"),
    )


def vector_facts_to_proto(facts: VectorFacts) -> pb.VectorFacts:
    """Return what vectors a model was made for, as the wire has it."""
    return pb.VectorFacts(
        size=facts.size,
        pooling=pb.Pooling.Name(facts.pooling),
        normalize=facts.normalize,
        prompts=dict(facts.prompts),
        default_prompt=facts.default_prompt,
    )


def vector_facts_from_proto(message: pb.VectorFacts) -> VectorFacts:
    """Return what vectors a model was made for; raises ValidationError for what is unknown of it."""
    return VectorFacts(
        size=message.size,
        pooling=known(Pooling, message.pooling, "a pooling"),
        normalize=message.normalize,
        prompts=tuple(sorted(message.prompts.items())),
        default_prompt=message.default_prompt,
    )
