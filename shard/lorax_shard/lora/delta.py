"""What an adapter changes in the base model, module by module, in one normal form.

Made by ``adapters`` from what PEFT wrote, consumed by ``lora`` backends. Module names
are those of the transformers model, without PEFT's wrappers: for instance
``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorax_contract.pooling import HeadFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDelta:
    """The change of one linear, embedding, norm, router or stack of experts. Absent parts are None.

    W' is ``weight`` or the base's W, with the rows ``token_ids`` replaced by ``token_rows``.
    Linear, input x (T x in), base output y (T x out)::

        y' = x W'^T + bias'
        y' = y + scaling * ((x A^T) B^T + b)     plain LoRA
        y' = m / ||W' + scaling * B A||_row * (x (W' + scaling * B A)^T) + bias'    DoRA

    Embedding of token t, before the module's own ``embed_scale``::

        e' = W'[t] + scaling * B A[:, t]
        e' = m / ||W' + scaling * (B A)^T||_column * (W'[t] + scaling * B A[:, t])  DoRA

    Norm: ``weight`` and ``bias`` replace its own; there is nothing else.

    Router: as a linear, by A and B alone. Experts: expert e computes plain LoRA with A[e] and
    B[e]; the delta's name is the parameter's, such as ``model.layers.0.mlp.experts.down_proj``.

    A delta concerns its own module only: what a head that is tied to an embedding shares
    with it is listed under the head's name too.
    """

    # r x in (embedding: r x vocabulary) and out x r (embedding: dim x r); experts: one for each.
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    # Of B (PEFT's lora_bias), in linears without DoRA: out.
    b_bias: torch.Tensor | None = None
    # alpha / r, or alpha / sqrt(r) with rsLoRA; patterns applied.
    scaling: float = 1.0
    # DoRA's magnitude vector m: out (embedding: dim).
    magnitude: torch.Tensor | None = None
    # Replaces the base's bias (PEFT's bias="all" or "lora_only"): out.
    bias: torch.Tensor | None = None
    # Replaces the base's weight (modules_to_save), in the base's own layout.
    weight: torch.Tensor | None = None
    # Rows of an embedding, or of a head tied to one, that are replaced: n ids, n x dim values.
    token_ids: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None
    # What DoRA divides by, where only a part of the module is here: out (embedding: dim).
    norm: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank; 0 when there is no low-rank part."""
        return 0 if self.a is None else self.a.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (
            self.a, self.b, self.b_bias, self.magnitude, self.bias, self.weight,
            self.token_ids, self.token_rows, self.norm,
        )  # fmt: skip
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAdapter:
    """A parsed adapter in host memory."""

    # Names the content: configuration and weights.
    digest: str
    modules: Mapping[str, ModuleDelta]
    # Rows of the embedding and the head when the adapter adds tokens; 0: the base's.
    vocab_size: int = 0
    # Facts that the tensors do not show and that merging needs: "rslora" (scaled by the root
    # of the rank).
    traits: frozenset[str] = frozenset()
    # It acts from the last of these tokens in a prompt on; empty: on every token.
    invocation_ids: tuple[int, ...] = ()
    # The kind of classification head that its rows may ask for; "": none.
    head: str = ""
    # What that says; None: there is none, or nothing is known of it yet.
    head_facts: HeadFacts | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(delta.nbytes for delta in self.modules.values())
