"""From a request's constraint to one that the shards are ready for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from lorax_contract.adapters import AdapterContent, AdapterUnavailableError, Reason
from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_router.service.constraints.checker import CheckLimits, ConstraintChecker

logger = logging.getLogger(__name__)

Prepare = Callable[[Constraint, AdapterContent | None], Awaitable[None]]


class Constraints:
    """Checks constraints, then has the shard that draws compile them beside its steps.

    Args:
        prepare: the shards'.
        tokenizer_file: the model's tokenizer.
    """

    def __init__(
        self, prepare: Prepare, tokenizer_file: str, limits: CheckLimits | None = None
    ) -> None:
        self._prepare = prepare
        self._checker = ConstraintChecker(tokenizer_file, limits)

    async def ready(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> Constraint:
        """Return what a row can be bound to; raises ValidationError in words.

        ``content`` is that of an adapter with tokens of its own.
        """
        grammar = await self._checker.check(constraint)
        try:
            await self._prepare(grammar, content)
        except ValidationError as error:
            raise ValidationError(
                f"`{constraint.field_name}` is refused by the shards",
                public=f"`{constraint.field_name}`: {error}",
            ) from error
        except AdapterUnavailableError as error:
            # Its files left the disk: fetched again, it is compiled when the row enters.
            if error.reason is not Reason.EVICTED:
                raise
            logger.info("a constraint is compiled later: %s", error)
        return grammar

    async def close(self) -> None:
        """End the checker's processes."""
        await self._checker.close()
