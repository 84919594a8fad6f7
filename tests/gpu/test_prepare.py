"""Adapters prepared for a GPU on a stream of their own, while another stream computes."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.layered_lora import Layers, layered_adapter

from lorax_shard.lora.placing import _tensors
from lorax_shard.lora.prepare import Preparer
from lorax_shard.lora.sites import find_groups, find_sites

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def preparer(device: str) -> Preparer:
    torch.manual_seed(0)
    sites = find_sites(Layers().to(device))
    return Preparer(sites, list(find_groups(sites)), torch.bfloat16, torch.device(device))


def test_what_a_gpu_gets_is_what_a_cpu_gets() -> None:
    host, device = preparer("cpu"), preparer("cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    kept = []
    for rank in (3, 16, 5):
        adapter = layered_adapter(host._sites, rank)
        expected = host.prepare(adapter)
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        kept.append((expected, device.prepare(adapter)))
    for expected, placed in kept:
        for one, other in zip(_tensors(expected), _tensors(placed), strict=True):
            assert other.is_cuda
            assert other.data_ptr() % 16 == 0
            # DoRA's norms are summed on the device.
            torch.testing.assert_close(other.cpu(), one, rtol=1e-2, atol=1e-6)
