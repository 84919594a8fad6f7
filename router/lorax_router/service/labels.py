"""What classification heads say of texts, as clients get it: labels and their scores, named places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lorax_contract.errors import GenerationError, ValidationError
from lorax_contract.pooling import HeadFacts, ScoreKind
from lorax_router.service.results import GenerateResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Scores: TypeAlias = "NDArray[np.float64]"

# What no entity is made of.
OUTSIDE = "O"


class Label(NamedTuple):
    """A label, and how much speaks for it."""

    label: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A part of a text that a head for tokens named. ``start`` and ``end`` count bytes of its UTF-8."""

    entity_group: str
    # The mean over its tokens.
    score: float
    # As it stands in the text.
    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Tokens one behind the other that have one label."""

    group: str
    scores: tuple[float, ...]
    # Characters of the text.
    start: int
    end: int


def scores_of(result: GenerateResult, scale: ScoreKind | None = None) -> Scores:
    """Return the scores by label, of each token (n x k) where the head classifies tokens, else k.

    They are probabilities, unless the head gives numbers of another kind or another ``scale`` is
    wanted. GenerationError: they are not what the head should give.
    """
    import numpy as np

    head, raw_bytes = head_of(result), result.sequences[0].vector
    scores = np.frombuffer(raw_bytes or b"", dtype="<f4").astype(np.float64)
    num_labels = len(head.labels)
    num_rows = result.num_prompt_tokens if head.classifies_tokens else 1
    if len(scores) != num_rows * num_labels:
        text = f"{len(scores)} scores for {num_rows} x {num_labels}"
        raise GenerationError(text, public="")
    if head.classifies_tokens:
        scores = scores.reshape(num_rows, num_labels)
    return _scaled(scores, _scale_of(head) if scale is None else scale)


def head_of(result: GenerateResult) -> HeadFacts:
    """Return the head that gave an answer's scores."""
    if result.head is None:
        raise GenerationError("an answer has no scores", public="")
    return result.head


def labels_of(result: GenerateResult, scale: ScoreKind | None = None) -> list[Label]:
    """Return all labels of a text, best first; ValidationError if its tokens were classified."""
    head = text_head(head_of(result))
    scores = scores_of(result, scale)
    labels = map(Label, head.labels, scores.tolist())
    return sorted(labels, key=lambda each: each.score, reverse=True)


def text_head(head: HeadFacts) -> HeadFacts:
    """Return a head that classifies texts as a whole; ValidationError for one that does not."""
    if head.classifies_tokens:
        raise ValidationError(
            "the classification head is one for tokens, not for whole texts; send `inputs` to "
            "`/classify`"
        )
    return head


def relevance_of(result: GenerateResult, scale: ScoreKind | None = None) -> float:
    """Return the one score of a head that compares two texts; see ``check_compares``."""
    check_compares(head_of(result))
    return float(scores_of(result, scale)[0])


def check_compares(head: HeadFacts) -> None:
    """Raise ValidationError for a head that cannot say how much a text has to do with another."""
    text_head(head)
    if len(head.labels) != 1:
        raise ValidationError(
            f"to rank texts needs a head with one label, and this one has {len(head.labels)}; send "
            "`inputs` to `/predict` for the scores of all"
        )


def entities_of(result: GenerateResult, text: str, scale: ScoreKind | None = None) -> list[Entity]:
    """Return what a head for tokens named in a text, in its order.

    Labels may say where an entity begins (B-PER, I-PER): tokens one behind the other are one entity
    unless the next begins one, or is of another kind.
    """
    pieces = _merged(_tokens(result, scale))
    named = [piece for piece in pieces if piece.group != OUTSIDE]
    places = _byte_offsets(text, named)
    return [
        Entity(
            entity_group=piece.group,
            score=sum(piece.scores) / len(piece.scores),
            word=text[piece.start : piece.end],
            start=start,
            end=end,
        )
        for piece, (start, end) in zip(named, places, strict=True)
    ]


def _scale_of(head: HeadFacts) -> ScoreKind:
    """Return how a head's own scores become what clients get."""
    # Of one label alone the softmax would be 1, whatever its score is.
    is_alone = head.scores is ScoreKind.ONE_OF and len(head.labels) == 1
    return ScoreKind.ANY_OF if is_alone else head.scores


def _scaled(scores: Scores, scale: ScoreKind) -> Scores:
    import numpy as np

    if scale is ScoreKind.NUMBERS:
        return scores
    if scale is ScoreKind.ANY_OF:
        return np.exp(-np.logaddexp(0.0, -scores))
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def _tokens(result: GenerateResult, scale: ScoreKind | None) -> Iterator[tuple[bool, _Piece]]:
    """Yield whether an entity begins with it, and the piece, of each token that is of the text."""
    scores, labels = scores_of(result, scale), head_of(result).labels
    if scores.ndim != 2 or result.spans is None:
        raise ValidationError("the classification head is one for whole texts, not for tokens")
    best = scores.argmax(axis=1).tolist()
    for row, label, (start, end) in zip(scores, best, result.spans, strict=True):
        if start < end:
            mark, group = _group(labels[label])
            yield (
                mark == "B",
                _Piece(group=group, scores=(float(row[label]),), start=start, end=end),
            )


def _group(label: str) -> tuple[str, str]:
    """Take a label apart into its mark (B, I or none) and what it names."""
    mark, dash, group = label.partition("-")
    return (mark, group) if dash and mark in ("B", "I") else ("", label)


def _merged(tokens: Iterable[tuple[bool, _Piece]]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for begins, token in tokens:
        if pieces and not begins and pieces[-1].group == token.group:
            last = pieces[-1]
            pieces[-1] = replace(last, scores=last.scores + token.scores, end=token.end)
        else:
            pieces.append(token)
    return pieces


def _byte_offsets(text: str, pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
    """Return where pieces stand in a text's UTF-8; each character is looked at once."""
    marks = sorted({0, *(each.start for each in pieces), *(each.end for each in pieces)})
    known = {0: 0}
    for last, mark in pairwise(marks):
        known[mark] = known[last] + len(text[last:mark].encode("utf-8", "surrogatepass"))
    return [(known[each.start], known[each.end]) for each in pieces]
