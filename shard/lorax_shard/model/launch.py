"""One pass, launched kernel by kernel by the model's own code."""

from __future__ import annotations

import torch

from lorax_shard.model.interface import PagedModel, PassNumbers
from lorax_shard.transfer import all_to_device


def launched(model: PagedModel, numbers: PassNumbers) -> torch.Tensor:
    """Compute a pass kernel by kernel."""
    arrays = [numbers.input_ids, numbers.positions, numbers.kv_slots, numbers.tables]
    if numbers.unread is not None:
        arrays += [numbers.unread.at, numbers.unread.of]
    elif numbers.segments is not None:
        arrays.append(numbers.segments)
    input_ids, positions, kv_slots, tables, *places = all_to_device(arrays, model.device)
    if numbers.unread is not None:
        at, of = places
        input_ids[at] = numbers.unread.drawn[of].clamp_(min=0)
    metadata = model.make_metadata(
        numbers.query_lens, numbers.context_lens, kv_slots, tables, numbers.num_decode_rows
    )
    return model.forward(
        input_ids, positions, metadata, torch.from_numpy(numbers.logit_rows),
        numbers.slots, numbers.slot_lens,
        places[0] if numbers.segments is not None else None,
    )  # fmt: skip
