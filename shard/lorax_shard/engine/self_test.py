"""Whether a device still computes, asked after a pass failed that no other row can be blamed for.

A device whose context is broken fails each pass from then on, the smallest too. Rows that end
one by one would then all get the blame, while the shard looks healthy.
"""

from __future__ import annotations

import torch

from lorax_contract.step import (
    BlockId,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_shard.engine.forward import run_pass
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.rows import ResidentBatch, make_row
from lorax_shard.model.interface import PagedModel

# One token of the base model. Whatever it is, models have this id.
_SPEC = RequestSpec(
    request_id=RequestId(0),
    prompt_ids=(0,),
    sampling=SamplingParams(),
    stopping=StoppingParams(max_new_tokens=1),
)


class DeviceBrokenError(Exception):
    """The device computes nothing any more; the process has to end. The text says what it says."""


def self_test(model: PagedModel, spare: BlockId, num_blocks: int, block_size: int) -> None:
    """Compute one token alone; DeviceBrokenError if that fails too.

    ``spare`` is a block of the pool that may be written to.
    """
    try:
        torch.ones(8, device=model.device).sum().item()
        row = make_row(NewRow(_SPEC, ()), vocab_size=model.vocab_size)
        batch = ResidentBatch(num_blocks, block_size)
        batch.add(row)
        batch.grant(row, [spare])
        # Waits for the device: what went wrong there is told here at the latest.
        run_pass(model, batch, [RowWork(row, 1)]).logits.sum().item()
    except Exception as error:
        raise DeviceBrokenError(
            f"the device fails at the smallest step too, so it is broken: "
            f"{type(error).__name__}: {error}"
        ) from error
