"""The load-time probe: the plugged model must compute what transformers alone computes.

Rows of mixed lengths are computed by stock attention one by one, and by the
plugged model as one ragged batch and again in uneven chunks. One row goes beyond
every threshold (window, chunk) that the config or a layer names. A threshold too
far for that is probed on a miniature: the same class and config with few layers,
random weights and near thresholds.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention.backend import AttentionBackend
from lorax_shard.fused import FusedModules
from lorax_shard.mixture.layout import is_router
from lorax_shard.model import attention_hook, miniature
from lorax_shard.model.encoder import first_position
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.limits import attention_thresholds, position_limit
from lorax_shard.model.probe_run import run_chunked, run_ragged
from lorax_shard.model.relative_positions import has_relative_positions
from lorax_shard.parallel.group import GroupBrokenError

logger = logging.getLogger(__name__)

_ROW_LENGTHS = (9, 2, 33, 1)
# Thresholds up to this many tokens are probed on the model itself.
_NEAR = 128
# How far a row goes beyond a threshold.
_BEYOND = 9
# Logits are compared at this many last positions of each row.
_COMPARED = 16
# Largest difference that counts as rounding, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def survey_attention(model: Any, *, encoder: bool = False) -> attention_hook.AttentionSurvey:
    """Return what each attention layer of a plugged model, or of an encoder, keeps per token.

    Heads are left out of it.

    Raises StartupError(MODEL_UNSUPPORTED) naming what paged attention cannot compute.
    """
    survey = attention_hook.AttentionSurvey(is_encoder=encoder)
    config = model.config.get_text_config()
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    arguments: dict[str, Any] = {"position_ids": torch.arange(2, device=model.device).unsqueeze(0)}
    if not encoder:
        arguments["use_cache"] = False
    name = type(model).__name__
    try:
        with torch.inference_mode():
            model.base_model(input_ids=ids, **arguments, **{attention_hook.STEP_KEYWORD: survey})
    except attention_hook.UnsupportedAttentionError as error:
        raise _unsupported(name, str(error)) from error
    except TypeError as error:
        raise _unsupported(name, f"its forward does not pass arguments on ({error})") from error
    if not survey.shapes:
        raise _unsupported(name, "its attention does not use transformers' attention interface")
    others = sorted(set(range(config.num_hidden_layers)) - survey.shapes.keys())
    if others:
        raise _unsupported(name, f"layers {others} keep their state outside of paged attention")
    return survey


def miniature_dtype(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> torch.dtype:
    """Return what a miniature computes in: float32, which shows most, if the backend can."""
    return dtype if type(backend).probe(device, torch.float32) else torch.float32


class ModelProbe:
    """Compares one model with stock attention: ``record_stock``, then ``check``.

    What happens to the model between the two (packed linears) is probed with it.
    """

    def __init__(
        self,
        model: Any,
        survey: attention_hook.AttentionSurvey,
        backend: AttentionBackend,
        block_size: int,
        *,
        generates: bool = True,
    ) -> None:
        self._model = model
        self._generates = generates
        self._survey = survey
        self._backend = backend
        self._block_size = block_size
        self._config = model.config.get_text_config()
        self._limit = position_limit(self._config).max_positions
        if survey.is_encoder:
            self._limit = max(self._limit - first_position(model), 0)
        self._thresholds = _thresholds(self._config, survey)
        self._rows = self._make_rows()
        self._stock: list[torch.Tensor] = []

    def record_stock(self) -> None:
        """Compute the rows with transformers' own attention, then plug ours in again."""
        stock = _stock_logits if self._generates else _stock_states
        with attention_hook.stock_attention(self._model):
            self._stock = [stock(self._model, row) for row in self._rows]

    def check(self, paged: HFPagedModel, fused: FusedModules | None = None) -> None:
        """Raise StartupError(MODEL_MISMATCH) unless the plugged model computes the same.

        A difference that is gone once the model's own code takes the place of what is ``fused``
        costs the model that only.
        """
        difference = self._difference_of_fused(paged, fused) if fused else self._difference(paged)
        if difference is None and (self._far_thresholds() or self._may_turn_over(paged)):
            difference = self._difference_of_miniature(paged)
        if difference is not None:
            named = ", ".join(f"{name} {value}" for name, value in self._thresholds.items())
            raise StartupError(
                f"{type(self._model).__name__} cannot be served exactly: {difference} "
                f"(thresholds: {named or 'none'})",
                ExitCode.MODEL_MISMATCH,
            )

    def _difference_of_fused(self, paged: HFPagedModel, fused: FusedModules) -> str | None:
        """Return the difference; the model's own code takes over where that makes one."""
        if not fused.is_active:
            return self._difference(paged)
        try:
            difference = self._difference(paged)
        except GroupBrokenError:
            raise
        except Exception as error:  # noqa: BLE001 - what kernels raise is not known
            difference = f"the forward pass fails ({type(error).__name__}: {error})"
        if difference is None:
            return None
        fused.undo()
        logger.warning(
            "the elementwise work of %s is left to its own code: with fused kernels, %s",
            type(self._model).__name__,
            difference,
        )
        return self._difference(paged)

    def _make_rows(self) -> list[torch.Tensor]:
        near = [value + _BEYOND for value in self._thresholds.values() if value <= _NEAR]
        lengths = [*_ROW_LENGTHS, *near]
        if has_relative_positions(self._config.model_type):
            # Far ones share a bucket.
            lengths.append(_NEAR + _BEYOND)
        if self._limit:
            lengths = [min(length, self._limit) for length in lengths]
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(self._config.vocab_size, (n,), generator=generator).to(self._model.device)
            for n in lengths
        ]

    def _far_thresholds(self) -> list[str]:
        """Return the thresholds that a served row can pass and that no probed row passed."""
        return [
            f"{name} {value}"
            for name, value in self._thresholds.items()
            if value > _NEAR and (not self._limit or value < self._limit)
        ]

    def _difference_of_miniature(self, paged: HFPagedModel) -> str | None:
        small = miniature.build(
            self._model,
            self._model.device,
            miniature_dtype(self._backend, self._model.device, self._model.dtype),
        )
        survey = survey_attention(small, encoder=paged.is_encoder)
        probe = ModelProbe(
            small, survey, self._backend, self._block_size, generates=self._generates
        )
        probe.record_stock()
        difference = probe._difference(type(paged)(small, survey, self._backend))
        if unprobed := probe._far_thresholds():
            logger.warning("no row of the probe went beyond %s", ", ".join(unprobed))
        return difference and f"on a miniature with all thresholds near, {difference}"

    def _difference(self, paged: HFPagedModel) -> str | None:
        """Return in words where the paged logits differ from stock ones, or None.

        Of models that generate nothing what the last layer gives is compared, and rows of encoders
        are not cut.
        """
        scale = max(float(logits.abs().max()) for logits in self._stock)
        tolerance = _TOLERANCE[paged.dtype] * scale
        ways = [("one ragged batch", run_ragged), ("uneven chunks", run_chunked)]
        for way, run in ways[:1] if paged.is_encoder else ways:
            computed = run(paged, self._rows, self._block_size)
            rows = [
                (got[-_COMPARED:] - expected).abs().amax(-1)
                for expected, got in zip(self._stock, computed, strict=True)
            ]
            if self._may_turn_over(paged):
                rows = [torch.cat(rows).quantile(0.5).view(1)]
            for number, differences in enumerate(rows):
                # Written so that a NaN is refused too.
                if not (difference := float(differences.max())) <= tolerance:
                    what = f"a row of {len(self._rows[number])} tokens has"
                    return (
                        f"in {way}, {what if len(rows) > 1 else 'half of all tokens have'} logits "
                        f"{difference:.3g} away from transformers' own, of which the largest is "
                        f"{scale:.3g}"
                    )
        logger.debug("the probe agrees within %.3g on logits up to %.3g", tolerance, scale)
        return None

    def _may_turn_over(self, paged: HFPagedModel) -> bool:
        """Whether rounding may send a token to other experts, far from what they would have made.

        Then half of the tokens count, and a miniature in float32 shows the rest.
        """
        return paged.dtype is not torch.float32 and any(map(is_router, self._model.modules()))


def _thresholds(config: Any, survey: attention_hook.AttentionSurvey) -> dict[str, int]:
    """Return the config's thresholds, and the windows that layers use without its naming them."""
    thresholds = attention_thresholds(config)
    for layer, window in survey.windows.items():
        if window is not None and window not in thresholds.values():
            thresholds[f"window of layer {layer}"] = window
    return thresholds


def _stock_logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        kept = min(_COMPARED, len(row))
        logits = model(row.unsqueeze(0), use_cache=False, logits_to_keep=kept).logits[0]
        return logits.float()  # type: ignore[no-any-return]


def _stock_states(model: Any, row: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        states: torch.Tensor = model.base_model(input_ids=row.unsqueeze(0)).last_hidden_state[0]
        return states[-_COMPARED:].float()


def _unsupported(name: str, reason: str) -> StartupError:
    return StartupError(f"{name} cannot be served: {reason}", ExitCode.MODEL_UNSUPPORTED)
