"""What is made of the hidden states of a prompt: vectors, and what classification heads say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Pooling(IntEnum):
    """Which tokens a vector is made of, and how (the numbers are those of the wire)."""

    # What the last layer gives for the last token, which has seen all others.
    LAST = 0
    # The mean over all tokens of the prompt.
    MEAN = 1
    # What it gives for the first token, which in encoders has seen all others, too.
    FIRST = 2
    # In each dimension the largest value of any token.
    MAX = 3
    # The sum over all tokens, divided by the square root of their number.
    MEAN_SQRT = 4
    # The mean over all tokens, of which the one at position i counts i + 1 times (SGPT, arXiv
    # 2202.08904).
    WEIGHTED_MEAN = 5
    # A vector for each token, one after the other.
    EACH = 6

    @property
    def takes_all(self) -> bool:
        """Whether it is made of all tokens of a prompt, and not of one."""
        return self not in (Pooling.LAST, Pooling.FIRST)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFacts:
    """The vectors that a model was made for."""

    # How many numbers one has; 0: that is not said.
    size: int = 0
    pooling: Pooling = Pooling.LAST
    # Whether they have the length one.
    normalize: bool = True
    # What texts begin with, by the name that requests know it by; and the one of those that name none.
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str = ""


class ScoreKind(IntEnum):
    """What the scores of a head stand for (the numbers are those of the wire)."""

    # One label is right: their softmax are probabilities.
    ONE_OF = 0
    # Any number of labels is: each has a probability of its own, the sigmoid.
    ANY_OF = 1
    # They are no probabilities: a head was trained to give these numbers.
    NUMBERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFacts:
    """A classification head, of the model or of an adapter."""

    # What it is given: EACH for a head that classifies tokens.
    pooling: Pooling
    labels: tuple[str, ...]
    scores: ScoreKind = ScoreKind.ONE_OF

    @property
    def classifies_tokens(self) -> bool:
        """Whether each token has scores of its own."""
        return self.pooling is Pooling.EACH
