"""How much texts have to do with each other: by a head that compares two, else by their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from starlette.requests import Request

from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.model_body import ModelBody
from lorax_router.http_api.pooled.asking import AT_ONCE, pooled_request
from lorax_router.http_api.pooled.bodies import ScoredBody
from lorax_router.service.labels import check_compares, relevance_of
from lorax_router.service.requests import GenerateParameters, GenerateRequest
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import vector_of


class Compared(NamedTuple):
    """A score for each pair, and how many tokens they took."""

    scores: list[float]
    num_tokens: int


class Comparing:
    """Compares pairs of texts for routes."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def scores(
        self,
        request: Request,
        body: ScoredBody,
        parameters: GenerateParameters,
        pairs: Sequence[tuple[str, str]],
    ) -> Compared:
        """Return a score for each pair; raises what a request gets, and ClientGoneError.

        ``parameters`` are those of a vector. A model or an adapter with a classification head
        compares by it, and is refused if it has more than one label; another one by the cosine of
        the texts' vectors, each of which is made once.
        """
        if await self._has_head(
            request, body, pooled_request(request, pairs[0][0], parameters, second=pairs[0][1])
        ):
            return await self._by_head(request, body, parameters, pairs)
        return await self.by_vectors(request, body, parameters, pairs)

    async def _has_head(self, request: Request, body: ScoredBody, asked: GenerateRequest) -> bool:
        head = await self._calls.head_of(request, body, asked)
        if head is None:
            return False
        with self._calls.becoming_one(request):
            check_compares(head)
        return True

    async def _by_head(
        self,
        request: Request,
        body: ScoredBody,
        parameters: GenerateParameters,
        pairs: Sequence[tuple[str, str]],
    ) -> Compared:
        scoring = replace(parameters, output=OutputKind.SCORES)
        asked = [pooled_request(request, text, scoring, second) for text, second in pairs]
        results = await self._calls.generate(request, body, asked, AT_ONCE)
        scores = [relevance_of(result, body.scale) for result in results]
        return Compared(scores, _num_tokens(results))

    async def by_vectors(
        self,
        request: Request,
        body: ModelBody,
        parameters: GenerateParameters,
        pairs: Sequence[tuple[str, str]],
    ) -> Compared:
        """Return the cosine of each pair's vectors; raises as ``scores``."""
        texts = [*dict.fromkeys(text for pair in pairs for text in pair)]
        unit = replace(parameters, normalize=True)
        asked = [pooled_request(request, text, unit) for text in texts]
        results = await self._calls.generate(request, body, asked, AT_ONCE)
        vectors = dict(zip(texts, map(vector_of, results), strict=True))
        scores = [float(vectors[first] @ vectors[second]) for first, second in pairs]
        return Compared(scores, _num_tokens(results))


def _num_tokens(results: Sequence[GenerateResult]) -> int:
    return sum(result.num_prompt_tokens for result in results)
