"""The workloads by name: a shape, which adapters are asked for, when requests are sent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from lorax_bench import shapes
from lorax_bench.arrivals import gamma_arrivals
from lorax_bench.popularity import choose
from lorax_bench.requests import BenchRequest, Workload
from lorax_bench.shapes import PromptSource, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What can be asked of any workload; None: as the workload has it."""

    adapters: int | None = None
    """How many adapters; 0: the base model alone."""
    law: str | None = None
    alpha: float | None = None
    concurrency: int | None = None
    """A closed loop of so many requests at once; 0: no limit."""
    rate: float | None = None
    """An open loop: requests per second; 0: all at once."""
    cv: float | None = None
    temperature: float | None = None
    top_p: float | None = None

    def over(self, others: LoadOptions) -> LoadOptions:
        """Return these, and where they say nothing, the others."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        known = {name: value for name, value in given.items() if value is not None}
        if known.get("concurrency"):
            known.setdefault("rate", 0.0)
        if known.get("rate"):
            known.setdefault("concurrency", 0)
        return replace(others, **known)


_PLAIN = LoadOptions(
    adapters=0, law="round-robin", alpha=1.0, concurrency=0, rate=0.0, cv=1.0, temperature=0.0,
    top_p=1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadKind:
    """A named workload: how its questions are made, and what it is if nothing else is asked."""

    make: Callable[..., list[Question]]
    summary: str
    defaults: LoadOptions = LoadOptions()
    by_shape: Mapping[str, str] = field(default_factory=dict)
    """Further defaults, by what of the shape they are: ``{"adapters": "ways"}``."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What its shape takes, and the values that hold if nothing is given."""
        found = list(inspect.signature(self.make).parameters.values())[1:]
        return {each.name: each.default for each in found}


KINDS: dict[str, WorkloadKind] = {
    "w1": WorkloadKind(
        make=shapes.w1,
        summary="32 requests at once, prompts of 16-128 tokens, answers of 16-96",
    ),
    "mixed": WorkloadKind(
        make=shapes.mixed, summary="40 requests at once, prompts of 8-300 tokens, answers of 8-160"
    ),
    "long-prompts": WorkloadKind(
        make=shapes.long_prompts, summary="prompts of 512-2,048 tokens, answers of 16-32"
    ),
    "long-answers": WorkloadKind(
        make=shapes.long_answers, summary="prompts of 16-64 tokens, answers of 256-512"
    ),
    "fixed": WorkloadKind(
        make=shapes.fixed, summary="all prompts of one length, all answers of one: for sweeps"
    ),
    "chat": WorkloadKind(
        make=shapes.chat,
        summary="conversations of several turns over one system prompt",
        by_shape={"concurrency": "conversations"},
    ),
    "interruption": WorkloadKind(
        make=shapes.interruption,
        summary="8 running streams, and 3 s later one prompt of 4,000 tokens",
    ),
    "fan-out": WorkloadKind(
        make=shapes.fan_out,
        summary="each prompt once for each of 8 adapters, answers of 4 tokens",
        by_shape={"adapters": "ways"},
    ),
    "slora": WorkloadKind(
        make=shapes.mixed,
        summary="S-LoRA's synthetic trace: Gamma arrivals, adapters by a power law",
        defaults=LoadOptions(adapters=100, law="power", rate=2.0),
    ),
}
_SLORA = {"requests": 600, "prompt": (8, 512), "output": (8, 512)}


def default_parameters(name: str) -> dict[str, Any]:
    """Return what a workload's shape takes, and with which values."""
    return kind_of(name).parameters | (_SLORA if name == "slora" else {})


def kind_of(name: str) -> WorkloadKind:
    """Return the workload of that name."""
    if name not in KINDS:
        raise ValueError(f"there is no workload {name!r}; there are {', '.join(KINDS)}")
    return KINDS[name]


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``fixed,prompt=128,requests=8`` into the name and the values of its shape."""
    name, *words = spec.split(",")
    values = default_parameters(name)
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or key not in values:
            raise ValueError(f"{name} has no option {word!r}; it takes {', '.join(values)}")
        values[key] = _value(key, text, values[key])
    return name, values


def _value(name: str, text: str, like: Any) -> int | tuple[int, int]:
    """Read a number, or bounds such as 8-512 where the default is such."""
    low, _, high = text.partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{name}={text} is neither a number nor bounds such as 8-512") from None
    if bounds[0] < 1 or bounds[1] < bounds[0]:
        raise ValueError(f"{name}={text}: the numbers must be at least 1 and in order")
    if isinstance(like, tuple):
        return bounds
    if high:
        raise ValueError(f"{name}={text}: this takes one number")
    return bounds[0]


def effective(spec: str, options: LoadOptions) -> LoadOptions:
    """Return what holds for a workload: what is asked for, else what it has of its own."""
    name, values = parse_spec(spec)
    kind = KINDS[name]
    own = LoadOptions(**{option: values[size] for option, size in kind.by_shape.items()})
    return options.over(own.over(kind.defaults.over(_PLAIN)))


def build(
    spec: str, *, options: LoadOptions = LoadOptions(), seed: int = 0, number: int = 0,
    last_id: int = shapes.LAST_ID,
) -> Workload:  # fmt: skip
    """Return round ``number`` of a workload: ids of its own, all else as in each other round.

    ``last_id`` is the highest token id of a prompt.
    """
    name, values = parse_spec(spec)
    chosen = effective(spec, options)
    questions = KINDS[name].make(PromptSource.of_round(seed, number, last_id), **values)
    rng = np.random.default_rng(seed)
    num = len(questions)
    num_adapters = chosen.adapters or 0
    adapters: list[int] | list[None] = [None] * num
    if num_adapters:
        adapters = choose(chosen.law or "", num_adapters, num, rng, chosen.alpha or 0.0)
    times = [question.at_s for question in questions]
    if chosen.rate:
        times = gamma_arrivals(chosen.rate, chosen.cv or 0.0, num, rng)
    requests = tuple(
        BenchRequest(
            prompt_ids=question.prompt_ids, max_tokens=question.max_tokens, adapter=adapter,
            at_s=at_s, temperature=chosen.temperature or 0.0,
            top_p=1.0 if chosen.top_p is None else chosen.top_p,
            seed=seed + place if chosen.temperature else None,
        )
        for place, (question, adapter, at_s) in enumerate(zip(questions, adapters, times))
    )  # fmt: skip
    return Workload(
        name=spec, requests=requests, concurrency=chosen.concurrency or None,
        num_adapters=num_adapters,
    )  # fmt: skip
