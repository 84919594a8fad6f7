"""A workload: who asks for what, and when, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Whether those who share the server are tenants with an adapter each, or adapters of one tenant.
ClientKind = Literal["tenants", "adapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival; adapter 0 is the base model.

    ``limits`` is what requests ask for as max_new_tokens, ``outputs`` what they produce.
    """

    name: str
    times: Floats
    tenants: Ints
    adapters: Ints
    prompts: Ints
    outputs: Ints
    limits: Ints
    priorities: Ints
    tenant_names: tuple[str, ...]
    tenant_weights: tuple[float, ...]
    adapter_names: tuple[str, ...]
    adapter_ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        columns = (self.tenants, self.adapters, self.prompts, self.outputs, self.limits)
        if any(len(each) != len(self.times) for each in (*columns, self.priorities)):
            raise ValueError("the columns of a trace must be equally long")
        if not len(self.times):
            raise ValueError("the workload has no requests; make it longer or raise its rate")
        if np.any(np.diff(self.times) < 0) or self.times[0] < 0:
            raise ValueError("requests must be in order of arrival, the first at 0 or later")
        if min(self.prompts.min(), self.outputs.min()) < 1:
            raise ValueError("each request needs at least one prompt token and one output token")
        if np.any(self.limits < self.outputs):
            raise ValueError("an output is longer than its request asks for")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def client_kind(self) -> ClientKind:
        """What is compared: tenants; adapters where there is one tenant."""
        return "tenants" if len(self.tenant_names) > 1 else "adapters"

    @property
    def clients(self) -> Ints:
        """The client of each request, an index into ``client_names``."""
        return self.tenants if self.client_kind == "tenants" else self.adapters

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of those that are compared."""
        return self.tenant_names if self.client_kind == "tenants" else self.adapter_names

    @property
    def client_weights(self) -> tuple[float, ...]:
        """Their shares beside each other."""
        if self.client_kind == "tenants":
            return self.tenant_weights
        return (1.0,) * len(self.adapter_names)

    def asking_for(self, max_new_tokens: int) -> Self:
        """Return the same with requests that ask for so many tokens and end before."""
        return replace(self, limits=np.maximum(self.outputs, max_new_tokens))


def trace_of_clients(
    name: str,
    *,
    times: npt.ArrayLike,
    clients: npt.ArrayLike,
    prompts: npt.ArrayLike,
    outputs: npt.ArrayLike,
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    kind: ClientKind = "tenants",
) -> Trace:
    """Return a trace in which client i asks for adapter i, sorted by arrival.

    ``ranks`` has one entry a client; 0 stands for the base model.
    """
    order = np.argsort(np.asarray(times, dtype=np.float64), kind="stable")
    column = np.asarray(clients, dtype=np.int64)[order]
    lengths = np.asarray(outputs, dtype=np.int64)[order]
    handles = np.array([i + 1 if rank else 0 for i, rank in enumerate(ranks)], dtype=np.int64)
    each = range(len(ranks))
    return Trace(
        name=name,
        times=np.asarray(times, dtype=np.float64)[order],
        tenants=column if kind == "tenants" else np.zeros_like(column),
        adapters=handles[column],
        prompts=np.asarray(prompts, dtype=np.int64)[order],
        outputs=lengths,
        limits=lengths,
        priorities=np.zeros_like(column),
        tenant_names=tuple(f"tenant-{i}" for i in each) if kind == "tenants" else ("tenant-0",),
        tenant_weights=tuple(weights or (1.0,) * len(ranks)) if kind == "tenants" else (1.0,),
        adapter_names=("base", *(f"adapter-{i}" for i in each)),
        adapter_ranks=(0, *ranks),
    )
