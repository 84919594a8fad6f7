"""Figures out of records: rates, percentiles, errors, and how much adapters cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorax_bench.records import Record

PERCENTILES = (50, 90, 99)
# Of each distribution, so that a curve can be drawn from a file: 0 %, 1 %, ... 100 %.
_CURVE = tuple(range(101))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A distribution of times in seconds: its mean, and its percentiles from 0 to 100."""

    num: int
    mean_s: float
    curve_s: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of values; None if there are none. Between two it is interpolated."""
        known = np.asarray(list(values), dtype=np.float64)
        if not known.size:
            return None
        curve = tuple(float(each) for each in np.percentile(known, _CURVE))
        return cls(num=known.size, mean_s=float(known.mean()), curve_s=curve)

    def at(self, percent: int) -> float:
        """Return a percentile in seconds."""
        return self.curve_s[percent]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run, or its part for one adapter, came to.

    Rates are over the time from the first request's sending to the last token. Failed requests
    count among the errors; the tokens that came of them count too, their times do not.
    """

    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Spread | None
    inter_token: Spread | None
    end_to_end: Spread | None
    errors: dict[str, int] = field(default_factory=dict)


def figures(records: Sequence[Record], seconds: float | None = None) -> Figures:
    """Return the figures of records; ``seconds``: of the run that they are a part of."""
    if seconds is None:
        seconds = run_seconds(records)
    whole = [record for record in records if record.error is None]
    num_output = sum(record.num_tokens for record in records)
    return Figures(
        num_requests=len(records),
        num_failed=len(records) - len(whole),
        num_prompt_tokens=sum(record.prompt_tokens for record in records),
        num_output_tokens=num_output,
        seconds=seconds,
        output_tokens_per_s=num_output / seconds if seconds else 0.0,
        requests_per_s=len(whole) / seconds if seconds else 0.0,
        ttft=Spread.of(time for each in whole if (time := each.ttft_s) is not None),
        inter_token=Spread.of(gap for each in whole for gap in each.gaps_s),
        end_to_end=Spread.of(time for each in whole if (time := each.end_to_end_s) is not None),
        errors=dict(Counter(each.error for each in records if each.error is not None)),
    )


def run_seconds(records: Sequence[Record]) -> float:
    """Return the time from the first request's sending to the last token; 0 if none came."""
    last = [record.token_times_s[-1] for record in records if record.token_times_s]
    return max(last) - min(record.sent_s for record in records) if last else 0.0


def by_adapter(records: Sequence[Record]) -> dict[int | None, Figures]:
    """Return the figures of each adapter, over the time of the whole run; None: the base model."""
    seconds = run_seconds(records)
    adapters = {record.adapter for record in records}
    ordered = sorted(adapters, key=lambda each: -1 if each is None else each)
    return {
        adapter: figures([each for each in records if each.adapter == adapter], seconds)
        for adapter in ordered
    }


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two systems' medians, and of the rounds that ran next to each other."""

    of_medians: float
    of_rounds: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest ratio of a round."""
        return min(self.of_rounds), max(self.of_rounds)


def ratio(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return how many times ``others`` are ``ours``, rounds in turns; retention is such a ratio."""
    if not ours or len(ours) != len(others):
        raise ValueError("a ratio needs as many rounds of the one as of the other, at least one")
    return Ratio(
        statistics.median(ours) / statistics.median(others),
        tuple(one / other for one, other in zip(ours, others)),
    )
