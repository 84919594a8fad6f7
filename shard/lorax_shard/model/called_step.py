"""What a model's call was told of a step, for modules that its own code does not hand it on to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lorax_shard.attention.backend import StepMetadata
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.attention_hook import STEP_KEYWORD, AttentionSurvey

# Under which a model's call is told of its adapters.
ADAPTERS_KEYWORD = "lorax_adapters"


class CalledStep:
    """Holds the step that a model computes, until its call returns."""

    def __init__(self, model: Any) -> None:
        self.step: StepMetadata | AttentionSurvey | None = None
        self._adapters: LoraModel | None = None
        self._variants: list[slice | torch.Tensor] | None = None
        model.register_forward_pre_hook(self._take, with_kwargs=True)
        model.register_forward_hook(self._drop, always_call=True)

    def _take(self, _module: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = dict(named)
        self.step = named.pop(STEP_KEYWORD, None)
        self._adapters = named.pop(ADAPTERS_KEYWORD, None)
        return args, named

    def _drop(self, *_call: Any) -> None:
        self.step = self._adapters = self._variants = None

    @property
    def metadata(self) -> StepMetadata | None:
        """The step, unless it is a survey."""
        return self.step if isinstance(self.step, StepMetadata) else None

    @property
    def is_of_base(self) -> bool:
        """Whether no token of the step has an adapter."""
        return self._adapters is None or not self._adapters.is_in_step

    @property
    def variants(self) -> list[slice | torch.Tensor]:
        """The tokens of the step, in as many parts as it has adapters, base rows being one."""
        if self._variants is None:
            adapters = self._adapters
            self._variants = [slice(None)] if adapters is None else adapters.tokens_by_slot
        return self._variants

    @contextmanager
    def for_each_variant(self, num_rows: int) -> Iterator[None]:
        """Within, modules compute so many rows for each variant, one variant's behind the other's."""
        if self._adapters is None:
            yield
            return
        with self._adapters.aside(num_rows):
            yield
