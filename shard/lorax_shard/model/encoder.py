"""Models that generate nothing, as the engine sees them: encoders, and decoders without a head of tokens.

They fit where a language model does: what they give for a token is a hidden state in place of
logits. An encoder computes rows whole and keeps nothing of them. Its cache has blocks without a byte
in them, so whoever plans counts them as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lorax_shard.attention.backend import AttentionBackend, StepMetadata
from lorax_shard.model.attention_hook import STEP_KEYWORD, AttentionSurvey
from lorax_shard.model.called_step import ADAPTERS_KEYWORD
from lorax_shard.model.families import generates, is_encoder
from lorax_shard.model.graphs.recorder import GraphRecorder
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings
from lorax_shard.model.relative_positions import has_relative_positions


class BackboneModel(HFPagedModel):
    """Owns a transformers model without a head of tokens; implements ``PagedModel``."""

    generates = False

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: StepMetadata,
        logit_rows: torch.Tensor,
        slots: Sequence[int | None] = (),
        slot_lens: Sequence[int] | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute one ragged step; return what the last layer gives for the asked tokens.

        S x hidden in float32, in the place of logits.
        """
        lens = slot_lens if slot_lens is not None else metadata.query_lens
        asked = logit_rows.to(input_ids.device)
        with torch.inference_mode(), self._adapters(lens, None, slots):
            return self._forward_some(input_ids, positions, metadata, asked, segments)[0]

    def _forward_some(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: StepMetadata,
        logit_rows: torch.Tensor,
        segments: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the last layer gives for some tokens, and for all."""
        arguments = self._arguments(input_ids, positions, segments)
        with self._no_pooler():
            output = self._model.base_model(**arguments, **{STEP_KEYWORD: metadata})
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden[logit_rows].float(), hidden

    def _arguments(
        self, input_ids: torch.Tensor, positions: torch.Tensor, _segments: torch.Tensor | None
    ) -> dict[str, Any]:
        """Return what the model's own forward is told of tokens."""
        ids, places = input_ids.unsqueeze(0), positions.unsqueeze(0)
        return {"input_ids": ids, "position_ids": places, "use_cache": False}

    @contextmanager
    def _no_pooler(self) -> Iterator[None]:
        """Within, nothing is made of the first token, which is that of the first row alone."""
        modules = self._model.base_model._modules
        pooler = modules.get("pooler")
        if pooler is None:
            yield
            return
        modules["pooler"] = None
        try:
            yield
        finally:
            modules["pooler"] = pooler

    def capture_graphs(
        self,
        settings: GraphSettings,
        recorder: GraphRecorder | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Make programs on a CPU; on other devices nothing: passes are prompts, of any length."""
        if self.device.type == "cpu":
            super().capture_graphs(settings)

    def graph_bytes(self, settings: GraphSettings) -> int:
        """Return 0: there are none."""
        return 0


class EncoderModel(BackboneModel):
    """Owns a transformers encoder; implements ``PagedModel``."""

    is_encoder = True

    def __init__(self, model: Any, survey: AttentionSurvey, backend: AttentionBackend) -> None:
        """Take a model with plugged attention and plain linears; see ``loader``."""
        super().__init__(model, survey, backend)
        self._first_position = first_position(model)
        self.max_positions = max(self.max_positions - self._first_position, 0)
        self.eos_token_ids = frozenset()
        self._tells_texts_apart = tells_texts_apart(model)

    def _arguments(
        self, input_ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor | None
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": self._positions(input_ids, positions).unsqueeze(0),
        }
        if self._tells_texts_apart:
            segments = torch.zeros_like(input_ids) if segments is None else segments
            arguments["token_type_ids"] = segments.unsqueeze(0)
        if has_relative_positions(self.model_type):
            arguments[ADAPTERS_KEYWORD] = self.lora
        return arguments

    def _positions(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the numbers that the model gives to tokens at these positions of their rows."""
        if not self._first_position:
            return positions
        padding = self._first_position - 1
        counts = input_ids != padding
        before = counts.cumsum(0) - counts.long()
        starts = torch.arange(len(positions), device=positions.device) - positions
        # A token that stands for padding has its number, and none is left out for it.
        own = before - before[starts] + self._first_position
        return own.masked_fill(~counts, padding)


def tells_texts_apart(model: Any) -> bool:
    """Return whether a model takes for each token which of two texts it belongs to."""
    takes = "token_type_ids" in inspect.signature(model.base_model.forward).parameters
    # RoBERTa takes them, and has one kind alone.
    return takes and getattr(model.config, "type_vocab_size", 0) > 1


def first_position(model: Any) -> int:
    """Return the number that a model gives to the first token of a text.

    Those that come from fairseq begin behind the number of their padding token.
    """
    embeddings = getattr(model.base_model, "embeddings", None)
    # MPNet has this one of them alone.
    if not hasattr(embeddings, "create_position_ids_from_inputs_embeds"):
        return 0
    return int(embeddings.padding_idx) + 1  # type: ignore[union-attr]


def paged_class(hf_config: Any) -> type[HFPagedModel]:
    """Return what serves models of a config."""
    if is_encoder(hf_config):
        return EncoderModel
    return HFPagedModel if generates(hf_config) else BackboneModel
