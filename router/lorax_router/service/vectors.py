"""Vectors of prompts as clients get them: cut to the dimensions they ask for, of length one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorax_contract.errors import GenerationError, ValidationError
from lorax_router.service.results import GenerateResult

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorShape:
    """How vectors look."""

    # The first so many, as models are trained to have them (Matryoshka, arXiv 2205.13147); None: all.
    dimensions: int | None = None
    # Divided by their length, after they were cut.
    normalize: bool = True

    def check(self) -> None:
        """Raise ValidationError for dimensions that no vector has."""
        if self.dimensions is not None and self.dimensions < 1:
            raise ValidationError(f"`dimensions` must be at least 1, got {self.dimensions}")

    def of(self, results: Sequence[GenerateResult]) -> list[Vector]:
        """Return the vector of each answer; ValidationError if one has too few dimensions."""
        return [self._shaped(result) for result in results]

    def _shaped(self, result: GenerateResult) -> Vector:
        raw = result.sequences[0].vector
        if raw is None:
            raise GenerationError("an answer has no vector", public="")
        vector = np.frombuffer(raw, dtype="<f4")
        wanted = self.dimensions
        if wanted is not None and wanted > len(vector):
            raise ValidationError(
                f"`dimensions` must be at most the model's {len(vector)}, got {wanted}"
            )
        vector = vector[:wanted]
        length = float(np.linalg.norm(vector.astype(np.float64)))
        return (vector / length).astype(np.float32) if self.normalize and length else vector
