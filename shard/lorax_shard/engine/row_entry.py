"""A new row as it enters a shard: checked, with its adapter, its text, its grammar, its drafts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorax_contract.activation import activation_start
from lorax_contract.errors import ValidationError
from lorax_contract.step import NewRow, OutputKind, RequestSpec, SamplingParams
from lorax_shard.constraints.row import RowConstraint
from lorax_shard.constraints.tokens import OwnTokens
from lorax_shard.engine.active_adapters import ActiveAdapter
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.drafter import Drafter
from lorax_shard.engine.output import RowOutput
from lorax_shard.engine.rows import Row, make_row
from lorax_shard.model.interface import SEQUENCE, TOKENS, PagedModel

if TYPE_CHECKING:
    from lorax_shard.constraints.rows import ConstrainedRows

_SCORED = {SEQUENCE: "whole texts", TOKENS: "tokens"}
NO_TOKENS = "this model makes vectors of prompts or scores them, and no tokens"
UNBOUND = "output cannot be bound to a grammar here: the package llguidance is not installed"


class RowEntry:
    """Makes the rows of one rank.

    Args:
        model: which the rows are for.
        detokenizer: the base's; None: another rank draws and makes the texts.
        constraints: what binds rows to grammars; None: nothing can.
        drafter: what drafts tokens; None: nothing does.
    """

    def __init__(
        self,
        model: PagedModel,
        detokenizer: Detokenizer | None,
        constraints: ConstrainedRows | None,
        drafter: Drafter | None,
    ) -> None:
        self._model = model
        self._detokenizer = detokenizer
        self._constraints = constraints
        self._drafter = drafter

    def row_of(self, new: NewRow, adapter: ActiveAdapter | None, num_computed: int) -> Row:
        """Return the row, of which so many tokens are in the cache; ValidationError says why not."""
        model = self._model
        vocab_size = model.vocab_size if adapter is None else adapter.vocab_size
        eos_token_ids = model.eos_token_ids if adapter is None else adapter.eos_token_ids
        if not model.generates and not new.spec.output.pools:
            raise ValidationError(NO_TOKENS)
        self._check_positions(new)
        _check_alternatives(new.spec.sampling, vocab_size)
        constraint = self._constraint(new, adapter)
        if new.spec.constraint is not None:
            new = _ended_by_grammar(new)
        row = make_row(
            new, vocab_size=vocab_size, num_computed=num_computed, eos_token_ids=eos_token_ids
        )
        row.adapter, row.constraint = adapter, constraint
        row.adapter_start = _adapter_start(new.spec, adapter)
        if row.vector is not None and row.vector.is_scored:
            self._check_head(row.vector.head, adapter)
            row.vector.slot = None if adapter is None else adapter.slot
        # The same on all ranks, also on those that know no grammar.
        if self._drafter is not None and new.spec.constraint is None and row.draws:
            row.pace = self._drafter.new_pace()
        if self._detokenizer is not None:
            own = None if adapter is None else adapter.reader
            row.make_output = partial(
                RowOutput,
                own or self._detokenizer,
                new.spec.prompt_ids,
                new.spec.stopping,
                eos_token_ids,
                new.output_ids,
            )
        return row

    def _constraint(self, new: NewRow, adapter: ActiveAdapter | None) -> RowConstraint | None:
        """Return what a row is bound to; None: nothing, or another rank draws."""
        spec = new.spec
        if (
            spec.constraint is None
            or self._detokenizer is None
            or spec.output is not OutputKind.TOKENS
        ):
            return None
        if self._constraints is None:
            raise ValidationError(UNBOUND)
        own = None
        if adapter is not None and adapter.vocabulary is not None:
            own = OwnTokens(adapter.vocabulary, adapter.vocab_size, adapter.eos_token_ids)
        num_endless = math.inf if spec.stopping.ignore_eos else spec.stopping.min_new_tokens
        return self._constraints.enter(spec.constraint, own, new.output_ids, num_endless)

    def _check_head(self, kind: str, adapter: ActiveAdapter | None) -> None:
        """Refuse scores where neither the row's adapter nor the model has a head for them."""
        if self._model.head(kind) is None and (adapter is None or adapter.head != kind):
            of = "the model" if adapter is None else "neither the model nor the adapter"
            raise ValidationError(f"{of} has a classification head for {_SCORED[kind]}")

    def _check_positions(self, new: NewRow) -> None:
        """Refuse what the model has no positions for; the last token of an output needs none."""
        most, spec = self._model.max_positions, new.spec
        if most and spec.num_kv_tokens > most:
            raise ValidationError(
                f"{len(spec.prompt_ids)} prompt tokens and {spec.stopping.max_new_tokens} new ones "
                f"are more than the model's {most} positions"
            )


def _check_alternatives(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse more alternatives than there are tokens: room is made for as many as are asked for."""
    most = max(sampling.num_alternatives, sampling.num_prompt_alternatives)
    if most > vocab_size:
        raise ValidationError(f"{most} alternatives are more than the vocabulary's {vocab_size}")


def _adapter_start(spec: RequestSpec, adapter: ActiveAdapter | None) -> int:
    """Return the position from which on a row computes with its adapter."""
    if adapter is None:
        return 0
    if spec.adapter_start is not None:
        return spec.adapter_start
    return activation_start(spec.prompt_ids, adapter.invocation_ids)


def _ended_by_grammar(new: NewRow) -> NewRow:
    """Return a row whose masks say where it may end, and nothing beside them."""
    stopping = replace(new.spec.stopping, ignore_eos=False, min_new_tokens=0)
    return replace(new, spec=replace(new.spec, stopping=stopping))
