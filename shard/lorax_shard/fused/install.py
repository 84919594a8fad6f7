"""Puts fused elementwise work into a model in place of its own, from outside."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fused import activations, encoders, gates, layers, norms
from lorax_shard.fused.backend import ElementwiseBackend, EncoderElementwise
from lorax_shard.fused.forwards import Exchange, Forward
from lorax_shard.fused.reference import TorchElementwise
from lorax_shard.fused.registry import BACKENDS
from lorax_shard.fused.rotary import RotaryFinder, Rotations
from lorax_shard.fused.trial import failure

logger = logging.getLogger(__name__)


class FusedModules:
    """What computes by a backend's kernels in one model, until it is put back."""

    def __init__(self, backend: ElementwiseBackend) -> None:
        self.backend = backend.name
        self.rotations = Rotations(backend)
        # How many of each kind.
        self.counts: Counter[str] = Counter()
        self._exchange = Exchange()

    @property
    def is_active(self) -> bool:
        """Whether anything computes by the kernels."""
        return bool(self.counts)

    def put(self, kind: str, module: nn.Module, forward: Forward) -> None:
        """Let a module compute by ``forward``."""
        self._exchange.put(module, forward)
        self.counts[kind] += 1

    def undo(self) -> bool:
        """Give the model its own code again; returns whether it had any other."""
        self.counts.clear()
        self.backend = "torch"
        return self._exchange.undo()


@torch.inference_mode()
def install(
    model: nn.Module,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_encoder: bool = False,
) -> FusedModules:
    """Let the modules of known forms compute by a backend's kernels; all others stay.

    An encoder's forms are other ones than a decoder's; a backend that has none of them leaves it.
    Comes after whatever replaces the model's linears. ``backend`` is 'auto' or a name of the
    registry; 'torch' leaves the model as it is. A module is known by its shape and by a trial:
    on random rows it computes what the kernel does. Raises StartupError (BACKEND_UNAVAILABLE).
    """
    chosen = BACKENDS.create(backend, device, dtype)
    like = torch.empty(0, device=device, dtype=dtype)
    if chosen.name != "torch" and (reason := failure(chosen, like)) is not None:
        chosen = _without(chosen, backend, reason)
    if is_encoder and not isinstance(chosen, EncoderElementwise):
        chosen = TorchElementwise()
    fused = FusedModules(chosen)
    if chosen.name == "torch":
        return fused
    if is_encoder:
        assert isinstance(chosen, EncoderElementwise)
        _install_encoders(model, chosen, like, fused)
    else:
        _install_decoders(model, chosen, like, fused)
    counted = ", ".join(f"{count} {kind}" for kind, count in fused.counts.items())
    logger.info(
        "elementwise work by %s: %s",
        chosen.name,
        counted or "nothing in this model has a known form",
        extra={"fields": {"event": "elementwise", "backend": chosen.name, "counts": fused.counts}},
    )
    return fused


def _install_encoders(
    model: nn.Module, chosen: EncoderElementwise, like: torch.Tensor, fused: FusedModules
) -> None:
    rotary = RotaryFinder(fused.rotations)
    for module in list(model.modules()):
        found = {
            "sums with norms": encoders.find_sum(module, chosen, like),
            "norms": encoders.find_norm(module, chosen, like),
            "activations": encoders.find_activation(module, chosen, like),
            "rotary attentions": rotary.find(module),
        }
        _put(found, module, fused)


def _install_decoders(
    model: nn.Module, chosen: ElementwiseBackend, like: torch.Tensor, fused: FusedModules
) -> None:
    rotary, ready = RotaryFinder(fused.rotations), {}
    for module in list(model.modules()):
        norm = norms.find(module, chosen, like)
        if norm is not None:
            ready[module] = norms.ReadyNorm(norm)
        found = {
            "norms": None if norm is None else ready[module].forward(chosen),
            "gated MLPs": gates.find(module, chosen, like),
            "activations": activations.find(module, like),
            "rotary attentions": rotary.find(module),
        }
        _put(found, module, fused)
    if chosen.adds_with_norms:
        for module, forward in layers.find(model, ready, chosen, like).items():
            fused.put("decoder layers", module, forward)


def _put(found: Mapping[str, Forward | None], module: nn.Module, fused: FusedModules) -> None:
    for kind, forward in found.items():
        if forward is not None:
            fused.put(kind, module, forward)


def _without(chosen: ElementwiseBackend, asked: str, reason: str) -> ElementwiseBackend:
    """Return what takes the place of a backend that fails; StartupError where it was named."""
    words = f"the elementwise backend {chosen.name!r} cannot run here: {reason}"
    if asked != "auto":
        raise StartupError(f"{words}; use auto or torch", ExitCode.BACKEND_UNAVAILABLE)
    logger.warning("%s. The model's own code computes", words)
    return TorchElementwise()
