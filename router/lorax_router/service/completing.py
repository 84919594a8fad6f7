"""From a request that was let in, and its adapter, to one that can be run."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from lorax_contract.activation import activation_start
from lorax_contract.errors import GenerationError, ValidationError
from lorax_router.core.tenant_limits import TenantLimits
from lorax_router.service.chat.outputs import OutputsByTemplate
from lorax_router.service.constraints.readiness import Constraints
from lorax_router.service.open_request import OpenRequest
from lorax_router.service.requests import ChatPrompt, ValidRequest
from lorax_router.service.timeouts import deadline_of
from lorax_router.service.validation import Made, Validator


class RequestCompleter:
    """Makes ready what needs the prompt's tokens, or time.

    Args:
        validator: makes requests valid.
        outputs: what reads the answers in chats.
        constraints: makes ready what outputs are bound to; None: none is.
        tenant_limits: what a tenant may have waiting of whom the keys say nothing else.
    """

    def __init__(
        self,
        validator: Validator,
        outputs: OutputsByTemplate,
        constraints: Constraints | None,
        tenant_limits: TenantLimits,
    ) -> None:
        self._validator = validator
        self._outputs = outputs
        self._constraints = constraints
        self._tenant_limits = tenant_limits

    async def complete(self, opened: OpenRequest, made: Made | None = None) -> ValidRequest:
        """Return a request that can be run; raises what is wrong with it.

        ``made`` is the validator's.
        """
        checked, lease, text = opened.checked, opened.lease, opened.text
        request = checked.request
        started = perf_counter()
        _check_resumed(opened)
        valid = await self._validator.complete(
            checked,
            text,
            lease.head if lease else None,
            deadline=deadline_of(checked, opened.record),
            limits=request.caller.quotas.limits(self._tenant_limits),
            made=None if text.is_own else made,
        )
        opened.record.tokenized(started)
        if lease is not None and lease.invocation_ids:
            start = activation_start(valid.prompt_ids, lease.invocation_ids)
            valid = replace(valid, adapter_start=start)
        constraint = request.parameters.constraint
        if isinstance(prompt := request.prompt, ChatPrompt):
            parsers = self._outputs.of(text.chat_template)
            valid = replace(valid, new_parser=parsers.reading(prompt, valid.prompt_text))
            constraint = parsers.constraint(prompt, valid.prompt_text, constraint)
        if constraint is None:
            return valid
        if self._constraints is None:
            raise ValidationError(
                f"`{constraint.field_name}` is not offered by this server; leave it out"
            )
        has_own_tokens = lease is not None and lease.text.tokenizer is not None
        content = lease.content if lease is not None and has_own_tokens else None
        return replace(valid, constraint=await self._constraints.ready(constraint, content))


def _check_resumed(opened: OpenRequest) -> None:
    """Raise GenerationError if another adapter would go on with an output than began it."""
    resumed = opened.checked.request.resumption
    if resumed is not None and resumed.adapter_content != opened.adapter_content:
        text = "the adapter was replaced while its answer was written; ask again"
        raise GenerationError(text, public=text)
