"""Vectors of prompts as clients get them: cut to the dimensions they ask for, of length one.

numpy comes with the first of them: it is a tenth of a second of a router's start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lorax_contract.errors import GenerationError, ValidationError
from lorax_contract.pooling import Pooling
from lorax_router.service.results import GenerateResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Vector: TypeAlias = "NDArray[np.float32]"

# Of the vectors of one call's tokens: a text of a few kilobytes asks for megabytes of them.
MOST_TOKEN_NUMBERS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorShape:
    """How a vector is made and looks."""

    pooling: Pooling = Pooling.LAST
    # The first so many, as models are trained to have them (Matryoshka, arXiv 2205.13147); None: all.
    dimensions: int | None = None
    # Divided by their length, after they were cut.
    normalize: bool = True

    def finished(self, raw: bytes) -> bytes:
        """Return what a client gets of what a shard said, float32; ValidationError if that is too little."""
        import numpy as np

        vector = np.frombuffer(raw, dtype="<f4")
        wanted = self.dimensions
        if wanted is not None and wanted > len(vector):
            raise too_many_dimensions(wanted, len(vector))
        vector = vector[:wanted]
        if self.normalize:
            wide = vector.astype(np.float64)
            length = math.sqrt(wide @ wide)
            vector = (wide / length).astype("<f4") if length else vector
        return vector.tobytes()


def too_many_dimensions(wanted: int, size: int) -> ValidationError:
    """Return the error for dimensions that a model's vectors do not have."""
    return ValidationError(f"`dimensions` must be at most the model's {size}, got {wanted}")


def too_many_numbers(num: int) -> ValidationError:
    """Return the error for vectors of tokens that are too much for one answer."""
    return ValidationError(
        f"the vectors of all tokens have {num:,} numbers or more, and an answer takes {MOST_TOKEN_NUMBERS:,}; "
        "send fewer or shorter texts"
    )


def vectors_of(result: GenerateResult) -> NDArray[np.float32]:
    """Return the vectors of a text's tokens, n x size, of an answer to a request for those of each."""
    return vector_of(result).reshape(result.num_prompt_tokens, -1)


def vector_of(result: GenerateResult) -> Vector:
    """Return the vector of an answer to a request that asked for one."""
    raw = result.sequences[0].vector
    if raw is None:
        raise GenerationError("an answer has no vector", public="")
    import numpy as np

    return np.frombuffer(raw, dtype="<f4")
