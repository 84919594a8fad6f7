"""Finds decoder layers that add what attention and MLP compute to what they were given.

Such a layer is a chain of sums and norms around its attention and its MLP. Each sum is computed
together with the norms at its sides, and the norm that comes next finds its result ready; if it
is given anything else than that very sum, it computes by itself. So all that a layer takes and
returns is what it was, for whoever looks at it, and that norm's own adapters and hooks apply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from lorax_shard.fused.backend import ElementwiseBackend, WeightedNorm
from lorax_shard.fused.forwards import Forward, closest, noise
from lorax_shard.fused.norms import ReadyNorm

_ROWS = 3
_ATTENTION = "self_attn"
_MLPS = ("mlp", "feed_forward")


class _Form(NamedTuple):
    """The names of a layer's norms: before and behind its attention, before and behind its MLP."""

    before_attention: str | None
    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None


_FORMS = (
    _Form("input_layernorm", None, "post_attention_layernorm", None),
    _Form(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    _Form(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    _Form(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


def find(
    model: nn.Module,
    norms: Mapping[nn.Module, ReadyNorm],
    backend: ElementwiseBackend,
    like: torch.Tensor,
) -> dict[nn.Module, Forward]:
    """Return the layers whose sums and norms may be computed together, and what they compute then."""
    found: dict[nn.Module, Forward] = {}
    for parent in model.modules():
        for children in parent.children():
            if not isinstance(children, nn.ModuleList):
                continue
            # What follows the last layer; a guess costs nothing but time where it is wrong.
            last = [each for each in parent.children() if each in norms]
            chain = [*children, last[0] if len(last) == 1 else None]
            for layer, follower in pairwise(chain):
                if (forward := _find_one(layer, follower, norms, backend, like)) is not None:
                    found[layer] = forward
    return found


def _find_one(
    layer: nn.Module | None,
    follower: nn.Module | None,
    norms: Mapping[nn.Module, ReadyNorm],
    backend: ElementwiseBackend,
    like: torch.Tensor,
) -> Forward | None:
    if layer is None:
        return None
    children = dict(layer.named_children())
    own_norms = {name for name, child in children.items() if child in norms}
    mlp = next((name for name in _MLPS if name in children), None)
    form = next((form for form in _FORMS if own_norms == {*form} - {None}), None)
    if form is None or mlp is None or _ATTENTION not in children:
        return None
    chain = _Chain(layer, form, mlp, _first_norm(follower, norms), norms, backend)
    width = len(layer.get_submodule(next(iter(own_norms))).weight)  # type: ignore[arg-type]
    forward = _tried(layer, chain, noise(1, _ROWS, width, like=like))
    chain.forget()
    return None if forward is None else Forward(forward, (backend, layer))


def _first_norm(
    follower: nn.Module | None, norms: Mapping[nn.Module, ReadyNorm]
) -> nn.Module | None:
    """Return the norm that is given what a layer returns: a last one, or that of the next layer."""
    if follower is None or follower in norms:
        return follower
    children = dict(follower.named_children())
    firsts = (children.get(form.before_attention or "") for form in _FORMS)
    return next((norm for norm in firsts if norm in norms), None)


class _Chain:
    """Computes a layer: two sums, each with the norms at its sides."""

    def __init__(
        self,
        layer: nn.Module,
        form: _Form,
        mlp: str,
        last: nn.Module | None,
        norms: Mapping[nn.Module, ReadyNorm],
        backend: ElementwiseBackend,
    ) -> None:
        def norm(name: str | None) -> nn.Module | None:
            return None if name is None else layer.get_submodule(name)

        multiplier: Any = getattr(layer, "residual_multiplier", None)
        before = norm(form.before_mlp)
        self._own = type(layer).forward
        self.mlp = mlp
        self._form = form
        self._sums = (
            _Sum(backend, multiplier, norm(form.behind_attention), before, norms),
            _Sum(backend, multiplier, norm(form.behind_mlp), last, norms),
        )

    def forward(self, kept: frozenset[str]) -> Callable[..., torch.Tensor]:
        """Return what takes the place of the layer's forward.

        ``kept`` are arguments that it does not hand on to its attention.
        """
        own, form, mlp, (first, second) = self._own, self._form, self.mlp, self._sums

        def forward(
            layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            if args:
                # By their places only the layer itself knows them.
                return own(layer, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
            for name in kept:
                kwargs.pop(name, None)
            x, attention = hidden_states, getattr(layer, _ATTENTION)
            given = x if form.before_attention is None else getattr(layer, form.before_attention)(x)
            x = first.add(x, attention(hidden_states=given, **kwargs)[0])
            given = x if form.before_mlp is None else getattr(layer, form.before_mlp)(x)
            computed = getattr(layer, mlp)(given)
            # Some that route tokens to experts return more than what they computed.
            return second.add(x, computed[0] if isinstance(computed, tuple) else computed)

        return forward

    def forget(self) -> None:
        """Drop what the last sums left ready."""
        for each in self._sums:
            each.forget()


class _Sum:
    """Adds to the hidden states, with the norms at the sides of the sum."""

    def __init__(
        self,
        backend: ElementwiseBackend,
        multiplier: float | None,
        inner: nn.Module | None,
        outer: nn.Module | None,
        norms: Mapping[nn.Module, ReadyNorm],
    ) -> None:
        self._backend, self._multiplier = backend, multiplier
        self._inner, self._outer = (
            None if each is None else (each, norms[each]) for each in (inner, outer)
        )

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return the sum; the norm that comes next has its result ready."""
        inner = outer = None
        if delta.shape != x.shape:
            delta = delta.view(x.shape)
        if self._inner is not None:
            module, known = self._inner
            if _is_changed(module):
                # What an adapter or a hook does to a norm is done before the sum.
                delta = module(delta)
            else:
                inner = WeightedNorm(known.norm, module.weight)  # type: ignore[arg-type]
        if self._multiplier is not None:
            delta = delta * self._multiplier
        if self._outer is None:
            return self._backend.add_norms(x, delta, inner, None)[0]
        module, ready = self._outer
        outer = WeightedNorm(ready.norm, module.weight)  # type: ignore[arg-type]
        total, normed = self._backend.add_norms(x, delta, inner, outer)
        ready.put(total, normed)
        return total

    def forget(self) -> None:
        """Drop what the last sum left ready."""
        if self._outer is not None:
            self._outer[1].put(None, None)


def _is_changed(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


class _StandIns:
    """Stand in for a layer's attention and MLP, to see what it does around them."""

    def __init__(self, layer: nn.Module, mlp: str, x: torch.Tensor, *, is_tuple: bool) -> None:
        self._inside = layer.get_submodule(_ATTENTION), layer.get_submodule(mlp)
        self._added, self._gate = noise(2, *x.shape[1:], like=x)
        # Whether the MLP returns more than what it computed.
        self._is_tuple = is_tuple
        # Whatever attention was told.
        self.told: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for module, forward in zip(self._inside, (self._attend, self._compute), strict=True):
            module.__dict__["forward"] = forward
        return self

    def __exit__(self, *_error: object) -> None:
        for module in self._inside:
            del module.forward

    def _attend(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        # What is left out and what is said to be none are the same.
        self.told = {
            name: each for name, each in kwargs.items() if each is not None and each is not False
        }
        return hidden_states.flip(-1) + self._added, None

    def _compute(self, x: torch.Tensor) -> Any:
        y = x.roll(1, -1) * self._gate.view(x.shape)
        return (y, None) if self._is_tuple else y


def _tried(layer: nn.Module, chain: _Chain, x: torch.Tensor) -> Callable[..., Any] | None:
    """Return what computes the same as the layer, whatever its attention and MLP compute."""
    arguments = {name: object() for name in ("position_embeddings", "position_ids", "lorax_trial")}
    for is_tuple in (False, True):
        with _StandIns(layer, chain.mlp, x, is_tuple=is_tuple) as inside:
            try:
                layer(x, **arguments)
            except Exception:  # noqa: BLE001, S112 - what it raises whose MLP returns something else
                continue
            told = inside.told
            forward = chain.forward(frozenset(arguments.keys() - told.keys()))
            call = functools.partial(forward, layer, x, **arguments)
            if closest({"chain": call}, lambda: layer(x, **arguments)) and inside.told == told:
                return forward
    return None
