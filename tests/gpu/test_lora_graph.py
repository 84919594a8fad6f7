"""Adapters within a captured CUDA graph: slots and matrices change between replays."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.fixed_lora import FixedGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def test_a_graph_computes_with_what_is_loaded_at_its_replay() -> None:
    case = FixedGroup(9)
    # Compiles the kernels and makes all room: neither may happen while capturing.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.load(0, 8, 8)
        case.replay()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.replay()
    for slots, loads in (
        ([0] * 9, {}),
        ([2, -1, 31, 2, 2, -1, 31, 5, 2], {2: (8, 3), 31: (1, 23)}),
        ([5, 5, 5, 5, 5, 2, 31, -1, 0], {5: (0, 7)}),
    ):
        for slot, ranks in loads.items():
            case.load(slot, *ranks)
        case.slots.copy_(torch.tensor(slots))
        graph.replay()
        torch.cuda.synchronize()
        case.check()
