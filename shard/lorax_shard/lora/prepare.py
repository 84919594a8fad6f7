"""Checks an adapter against the model and turns it into what the step computes with.

DoRA needs the row norms of W + scaling * B A. They depend on constants only, so they are
computed here, once, and become a factor of the base's output and of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from lorax_shard.lora.arena import Copy, stack
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.errors import AdapterMismatchError
from lorax_shard.lora.placing import make_placement
from lorax_shard.lora.prepared import (
    EmbeddingChange,
    LinearChange,
    PreparedAdapter,
    VectorChange,
)
from lorax_shard.lora.sites import Kind, Site


class Cut(Protocol):
    """What a model needs that is a part of a whole one."""

    def cut(self, adapter: HostAdapter) -> HostAdapter:
        """Return what concerns this part of an adapter that fits the whole; any thread."""


class _LowRank(NamedTuple):
    """A linear's low-rank part: scale * (x a^T) b."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class Preparer:
    """Knows the model's places, its dtype and its device; safe to use from any thread."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        groups: Sequence[Sequence[Site]],
        dtype: torch.dtype,
        device: torch.device,
        cut: Cut | None = None,
        *,
        keeps_stored: bool = False,
        pack: Copy | None = None,
    ) -> None:
        self._sites, self._groups = sites, groups
        self._dtype, self._keeps_stored = dtype, keeps_stored
        self._placement = make_placement(dtype, device, keeps_stored=keeps_stored, pack=pack)
        self._cut = cut

    @torch.inference_mode()
    def prepare(self, adapter: HostAdapter) -> PreparedAdapter:
        """Check and convert an adapter; AdapterMismatchError says what does not fit."""
        with self._placement.within():
            return self._placement.place(self._convert(adapter))

    def _convert(self, adapter: HostAdapter) -> PreparedAdapter:
        """Return what steps compute with, wherever it was computed, in whatever dtype."""
        for name, delta in adapter.modules.items():
            self._check(name, delta)
        num_logits = self._num_logits(adapter)
        if self._cut is not None:
            adapter = self._cut.cut(adapter)
        linears, low_rank = self._linears(adapter)
        embeddings = {
            name: self._embedding(self._sites[name], delta)
            for name, delta in adapter.modules.items()
            if self._sites[name].kind is Kind.EMBEDDING
        }
        vectors = {
            name: self._vector(delta)
            for name, delta in adapter.modules.items()
            if self._sites[name].kind is Kind.VECTOR
        }
        return PreparedAdapter(
            digest=adapter.digest,
            groups=self._stack(low_rank),
            routers={
                name: self._router(delta) for name, delta in self._of_kind(adapter, Kind.ROUTER)
            },
            experts={
                name: self._experts(delta) for name, delta in self._of_kind(adapter, Kind.EXPERTS)
            },
            linears=linears,
            embeddings=embeddings,
            vectors=vectors,
            num_logits=num_logits,
            max_rank=max((delta.rank for delta in adapter.modules.values()), default=0),
        )

    def _of_kind(self, adapter: HostAdapter, kind: Kind) -> Iterator[tuple[str, ModuleDelta]]:
        return (each for each in adapter.modules.items() if self._sites[each[0]].kind is kind)

    def _check(self, name: str, delta: ModuleDelta) -> None:
        site = self._sites.get(name)
        if site is None:
            raise AdapterMismatchError(
                f"it changes {name!r}, and the model has no such linear, embedding or norm "
                "whose rows are the tokens of a step"
            )
        checks = {
            Kind.LINEAR: _check_linear,
            Kind.EMBEDDING: _check_embedding,
            Kind.VECTOR: _check_vector,
            Kind.ROUTER: _check_router,
            Kind.EXPERTS: _check_experts,
        }
        checks[site.kind](site, delta)

    def _linears(self, adapter: HostAdapter) -> tuple[dict[str, LinearChange], dict[str, _LowRank]]:
        """Return the changes by name, and the low-rank parts of those that have one."""
        changes, low_rank = {}, {}
        for name, delta in adapter.modules.items():
            site = self._sites[name]
            if site.kind is not Kind.LINEAR:
                continue
            factor = _dora_factor(site, delta)
            change = self._linear(site, delta, factor)
            if not change.is_empty:
                changes[name] = change
            if delta.a is not None and delta.b is not None:
                low_rank[name] = self._low_rank(delta, delta.a, delta.b, factor)
        return changes, low_rank

    def _low_rank(
        self, delta: ModuleDelta, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None
    ) -> _LowRank:
        """Fold into B what scales it; not the scaling where B may be of 16 bits, which would round."""
        if self._keeps_stored:
            b = b if factor is None else b.float() * factor.cpu()[:, None]
            return _LowRank(a, b.T, delta.scaling)
        b = b.float() * delta.scaling
        if factor is not None:
            b *= factor.cpu()[:, None]
        return _LowRank(a, b.to(self._dtype).T, 1.0)

    def _router(self, delta: ModuleDelta) -> GroupWeights:
        assert delta.a is not None
        assert delta.b is not None
        a, b, scale = self._low_rank(delta, delta.a, delta.b, None)
        return GroupWeights(a, (b,), (scale,) if self._keeps_stored else None)

    def _experts(self, delta: ModuleDelta) -> ExpertsWeights:
        assert delta.a is not None
        assert delta.b is not None
        _, rank, width_in = delta.a.shape
        if self._keeps_stored:
            stored = torch.promote_types(delta.a.dtype, delta.b.dtype)
            return ExpertsWeights(stack(delta.a, delta.b.mT, stored), width_in, rank, delta.scaling)
        b = (delta.b.float() * delta.scaling).mT
        return ExpertsWeights(stack(delta.a, b, self._dtype), width_in, rank)

    def _linear(self, site: Site, delta: ModuleDelta, factor: torch.Tensor | None) -> LinearChange:
        bias = _sum(site.bias if delta.bias is None else delta.bias, _constant(delta))
        tokens = self._tokens(delta, factor)
        if delta.weight is not None:
            weight = delta.weight.T if site.is_transposed else delta.weight
            if factor is not None:
                weight = weight.float() * factor.to(weight.device)[:, None]
            return LinearChange(weight=weight, bias=bias, **tokens)
        return LinearChange(
            scale=factor,
            shift=self._shift(site, delta, factor),
            **tokens,
        )

    def _tokens(self, delta: ModuleDelta, factor: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if delta.token_ids is None or delta.token_rows is None:
            return {}
        ids, rows = delta.token_ids.long(), delta.token_rows.float()
        if factor is not None:
            rows = rows * factor.cpu()[ids][:, None]
        return {"token_ids": ids, "token_rows": rows}

    def _shift(
        self, site: Site, delta: ModuleDelta, factor: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what makes the scaled output end in the new bias, and B's own on top of it.

        That is bias' - factor * bias + scaling * b.
        """
        if site.bias is None or (delta.bias is None and factor is None):
            return _constant(delta)
        base = site.bias.float().cpu()
        new = base if delta.bias is None else delta.bias.float()
        return _sum(new - base if factor is None else new - factor.cpu() * base, _constant(delta))

    def _embedding(self, site: Site, delta: ModuleDelta) -> EmbeddingChange:
        scale = site.embed_scale
        weight = delta.weight
        factor = _dora_factor(site, delta)
        parts: dict[str, torch.Tensor] = {}
        if weight is not None:
            parts["weight"] = weight.float() * scale
        if delta.token_ids is not None and delta.token_rows is not None:
            order = delta.token_ids.argsort()
            parts["token_ids"] = delta.token_ids[order].long()
            parts["token_rows"] = delta.token_rows[order].float() * scale
        if factor is not None:
            parts["scale"] = factor
        if delta.a is not None and delta.b is not None:
            b = delta.b.float() * (delta.scaling * scale)
            parts["a"] = delta.a.T
            parts["b"] = (b if factor is None else b * factor.cpu()[:, None]).T
        return EmbeddingChange(**parts)

    def _vector(self, delta: ModuleDelta) -> VectorChange:
        parts = {"weight": delta.weight, "bias": delta.bias}
        return VectorChange(
            parameters={name: part for name, part in parts.items() if part is not None}
        )

    def _stack(self, low_rank: Mapping[str, _LowRank]) -> dict[int, GroupWeights]:
        """Return the matrices by group, in the order in which a step reads them."""
        members = {
            number: [low_rank.get(site.name) for site in group]
            for number, group in enumerate(self._groups)
            if any(site.name in low_rank for site in group)
        }
        return {
            number: GroupWeights(
                torch.cat([member.a for member in each if member is not None]),
                tuple(None if member is None else member.b for member in each),
                tuple(1.0 if member is None else member.scale for member in each)
                if self._keeps_stored
                else None,
            )
            for number, each in members.items()
        }

    def _num_logits(self, adapter: HostAdapter) -> int:
        """Return how many logits the adapter's rows have if not as many as the base's, else 0."""
        head = next((site for site in self._sites.values() if site.is_head), None)
        delta = None if head is None else adapter.modules.get(head.name)
        own = 0 if head is None else head.out_features
        num = own if delta is None or delta.weight is None else delta.weight.shape[0]
        if adapter.vocab_size > num:
            raise AdapterMismatchError(
                f"its tokenizer has {adapter.vocab_size} tokens, but its head computes {num}"
            )
        return 0 if num == own else num


def _constant(delta: ModuleDelta) -> torch.Tensor | None:
    """Return what a low-rank part adds whatever the input is."""
    return None if delta.b_bias is None else delta.b_bias.float() * delta.scaling


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.float().cpu() + other


def _dora_factor(site: Site, delta: ModuleDelta) -> torch.Tensor | None:
    """Return m / ||W' + scaling * B A|| by output, in float32; None without DoRA.

    An embedding's weight is vocabulary x dim, and its norms are those of its columns.
    """
    if delta.magnitude is None or delta.a is None or delta.b is None:
        return None
    if delta.norm is not None:
        return delta.magnitude.float() / delta.norm.float()
    weight = _weight(site, delta).float()
    a, b = delta.a.float().to(weight.device), delta.b.float().to(weight.device)
    is_embedding = site.kind is Kind.EMBEDDING
    change = a.T @ b.T if is_embedding else b @ a
    norm = torch.linalg.vector_norm(weight + delta.scaling * change, dim=0 if is_embedding else 1)
    factor: torch.Tensor = delta.magnitude.float().to(weight.device) / norm
    return factor


def _weight(site: Site, delta: ModuleDelta) -> torch.Tensor:
    """Return W': out' x in, or vocabulary' x dim."""
    weight = site.weight
    if delta.weight is not None:
        weight = delta.weight.T if site.is_transposed else delta.weight
    if delta.token_ids is not None and delta.token_rows is not None:
        rows = delta.token_rows.to(weight.device, weight.dtype)
        weight = weight.index_copy(0, delta.token_ids.to(weight.device, torch.int64), rows)
    return weight


def _check_linear(site: Site, delta: ModuleDelta) -> None:
    width_in, width_out = site.in_features, site.out_features
    if delta.weight is not None:
        if (site.is_head or site.has_any_width) and delta.weight.dim() == 2:
            # A head may have more tokens or labels than the base's, or fewer.
            width_out = delta.weight.shape[int(site.is_transposed)]
        own = (width_in, width_out) if site.is_transposed else (width_out, width_in)
        _expect(site, "weight", delta.weight, own)
    _check_low_rank(site, delta, (width_in, width_out))
    if delta.bias is not None:
        if site.bias is None and delta.weight is None:
            raise AdapterMismatchError(f"it brings a bias for {site.name!r}, which has none")
        _expect(site, "bias", delta.bias, (width_out,))
    elif site.bias is not None and width_out != site.out_features:
        raise AdapterMismatchError(
            f"its {site.name!r} has {width_out} outputs, but no bias for them"
        )
    _check_tokens(site, delta, width_out, width_in)
    if delta.token_ids is not None and site.bias is not None:
        # PEFT computes such a head without its bias, for all tokens.
        raise AdapterMismatchError(f"it replaces token rows of {site.name!r}, which has a bias")


def _check_embedding(site: Site, delta: ModuleDelta) -> None:
    vocabulary = site.in_features
    if delta.weight is not None:
        vocabulary = delta.weight.shape[0] if delta.weight.dim() else 0
        _expect(site, "weight", delta.weight, (vocabulary, site.out_features))
    if delta.bias is not None or delta.b_bias is not None:
        raise AdapterMismatchError(f"it brings a bias for the embedding {site.name!r}")
    _check_low_rank(site, delta, (vocabulary, site.out_features))
    _check_tokens(site, delta, vocabulary, site.out_features)


def _check_vector(site: Site, delta: ModuleDelta) -> None:
    others = (
        delta.a, delta.b, delta.b_bias, delta.magnitude, delta.token_ids, delta.token_rows,
    )  # fmt: skip
    if any(part is not None for part in others):
        raise AdapterMismatchError(
            f"it adapts {site.name!r}, a norm: only its parameters can change"
        )
    own = dict(site.module.named_parameters())
    for name, part in (("weight", delta.weight), ("bias", delta.bias)):
        if part is None:
            continue
        if name not in own:
            raise AdapterMismatchError(f"it brings a {name} for {site.name!r}, which has none")
        _expect(site, name, part, (site.out_features,))


def _check_router(site: Site, delta: ModuleDelta) -> None:
    _check_low_rank_alone(site, delta)
    _check_low_rank(site, delta, (site.in_features, site.out_features))


def _check_experts(site: Site, delta: ModuleDelta) -> None:
    _check_low_rank_alone(site, delta)
    if delta.a is None or delta.b is None:
        raise AdapterMismatchError(f"of {site.name!r} it has only one of A and B")
    _expect(site, "A", delta.a, (site.num_experts, delta.rank, site.in_features))
    _expect(site, "B", delta.b, (site.num_experts, site.out_features, delta.rank))


def _check_low_rank_alone(site: Site, delta: ModuleDelta) -> None:
    others = (
        delta.b_bias, delta.magnitude, delta.bias, delta.weight, delta.token_ids, delta.token_rows,
    )  # fmt: skip
    if any(part is not None for part in others):
        raise AdapterMismatchError(
            f"it changes more than A and B of {site.name!r}: of experts and routers only low-rank "
            "parts are computed"
        )


def _check_low_rank(site: Site, delta: ModuleDelta, widths: tuple[int, int]) -> None:
    if (delta.a is None) != (delta.b is None):
        raise AdapterMismatchError(f"of {site.name!r} it has only one of A and B")
    if delta.a is not None and delta.b is not None:
        _expect(site, "A", delta.a, (delta.rank, widths[0]))
        _expect(site, "B", delta.b, (widths[1], delta.rank))
    if delta.b_bias is not None:
        if delta.b is None or delta.magnitude is not None or delta.token_ids is not None:
            raise AdapterMismatchError(
                f"it has a bias of B for {site.name!r}, which has no plain low-rank part"
            )
        _expect(site, "bias of B", delta.b_bias, (widths[1],))
    if delta.magnitude is not None:
        if delta.a is None:
            raise AdapterMismatchError(f"it has a DoRA magnitude for {site.name!r} without A and B")
        _expect(site, "DoRA magnitude", delta.magnitude, (widths[1],))


def _check_tokens(site: Site, delta: ModuleDelta, vocabulary: int, width: int) -> None:
    if (delta.token_ids is None) != (delta.token_rows is None):
        raise AdapterMismatchError(f"of {site.name!r} it has only one of token ids and token rows")
    if delta.token_ids is None or delta.token_rows is None:
        return
    ids = delta.token_ids
    _expect(site, "token rows", delta.token_rows, (len(ids), width))
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise AdapterMismatchError(
            f"it replaces token rows of {site.name!r} outside its {vocabulary} tokens"
        )
    if len(set(ids.tolist())) != len(ids):
        raise AdapterMismatchError(f"it replaces a token row of {site.name!r} twice")


def _expect(site: Site, what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        found, wanted = (" x ".join(map(str, each)) for each in (tensor.shape, shape))
        raise AdapterMismatchError(
            f"its {what} of {site.name!r} is {found}, but the model asks for {wanted}"
        )
