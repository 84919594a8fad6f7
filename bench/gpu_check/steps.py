"""Steps of a model that can be repeated: as the engine computes them, and as a graph would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from bench.gpu_check.models import BLOCK_SIZE

from lorax_shard.attention.backend import StepMetadata
from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.lora.assignment import LoraStep
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers


class ModelStep:
    """Rows with equally many new tokens, at the end of equally long contexts."""

    def __init__(
        self,
        model: HFPagedModel,
        rows: int,
        tokens: int,
        context: int,
        slots: Sequence[int] = (),
    ) -> None:
        """Take the adapters' slots in turn; none: the base model."""
        blocks = -(-context // BLOCK_SIZE)
        device = model.device
        tables = torch.arange(rows * blocks).view(rows, blocks)
        position = torch.arange(context - tokens, context).repeat(rows)
        row = torch.arange(rows).repeat_interleave(tokens)
        kv_slots = tables[row, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        self.model, self.rows = model, rows
        self._ids = ((torch.arange(rows * tokens) * 31 + 7) % model.vocab_size).to(device)
        self._positions = position.to(device)
        self._lens = [tokens] * rows, [context] * rows
        self._kv_slots, self._tables = kv_slots.to(device), tables.to(device)
        self._num_decodes = rows if tokens == 1 else 0
        self._logit_rows = torch.arange(tokens - 1, rows * tokens, tokens).to(device)
        self._slots = [slots[each % len(slots)] if slots else None for each in range(rows)]
        self.metadata = self._make_metadata()

    def _make_metadata(self) -> StepMetadata:
        return self.model.make_metadata(
            *self._lens, self._kv_slots, self._tables, self._num_decodes
        )

    def eager(self) -> torch.Tensor:
        """Compute it as the engine does, its layout included."""
        with self._with_adapters():
            return self._forward(self._make_metadata())

    def _with_adapters(self) -> AbstractContextManager[LoraStep | None]:
        assert self.model.lora is not None
        return self.model.lora.step(self._lens[0], self._slots, self._logit_rows)

    def _forward(self, metadata: StepMetadata) -> torch.Tensor:
        # The model's own: adapters are applied by whoever calls.
        return self.model.forward(self._ids, self._positions, metadata, self._logit_rows)

    def graph(self) -> Callable[[], None] | None:
        """Return the replay of the graph that the engine computes it by; None: there is none.

        Of decode steps. What it reads is there when this returns.
        """
        model, lora = self.model, self.model.lora
        assert lora is not None
        settings = GraphSettings(
            max_rows=self.rows, max_context=self._lens[1][0], max_rank=max_rank(lora),
            max_slots=3 + max(lora.slots, default=0),
        )  # fmt: skip
        recorder = None if model.device.type == "cuda" else CallAgain()
        model.capture_graphs(settings, recorder, (self.rows,))
        return None if model.graphs is None else model.graphs.prepared(self.numbers())

    def numbers(self) -> PassNumbers:
        """Return it as the engine tells it."""
        return PassNumbers(
            self._ids.cpu().numpy(), self._positions.cpu().numpy(), self._kv_slots.cpu().numpy(),
            self._tables.cpu().numpy(), *self._lens, self._num_decodes,
            self._logit_rows.cpu().numpy(), self._slots, self._lens[0],
        )  # fmt: skip


class CallAgain:
    """Stands for a graph where there are none: what was called is called again."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return it."""
        return call


def max_rank(lora: LoraModel) -> int:
    """Return the largest rank that a model's slots hold; 0: they are empty."""
    return max((adapter.max_rank for adapter in lora._slots.values()), default=0)


def products_alone(step: ModelStep) -> Callable[[], None]:
    """Return a call that computes the base's linears of a step, each stack once."""
    model = step.model
    kernels: dict[int, tuple[Any, int]] = {}
    for module in model._model.modules():
        if isinstance(module, PackedLinear):
            kernel: Any = module.kernel
            if isinstance(kernel, SiblingKernel):
                kernel = kernel.group.kernel
            kernels[id(kernel)] = kernel, module.in_features
    inputs = {
        width: torch.zeros(step.rows, width, dtype=model.dtype, device=model.device)
        for _, width in kernels.values()
    }

    def call() -> None:
        for kernel, width in kernels.values():
            kernel(inputs[width])

    return call


def attention_alone(step: ModelStep) -> Callable[[], None]:
    """Return a call that stores and attends in all layers of a decode step."""
    model, survey = step.model, step.model._survey

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(step.rows, heads, dim, dtype=model.dtype, device=model.device)

    layers = []
    for layer, spec in survey._specs.items():
        kv = survey.shapes[layer]
        query = zeros(survey._num_heads[layer], kv.key_dim)
        key, value = zeros(kv.num_heads, kv.key_dim), zeros(kv.num_heads, kv.value_dim)
        layers.append((query, key, value, layer, spec))

    def call() -> None:
        for query, key, value, layer, spec in layers:
            model._backend.store(key, value, layer, step.metadata)
            model._backend.attend(query, key, value, layer, spec, step.metadata)

    return call
