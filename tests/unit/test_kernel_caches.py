"""What torch's libraries keep of kernels stays bounded, whatever numbers of rows come."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

NUM_SIZES = 150
# Linears of several shapes over many numbers of rows; prints by how many MiB the process grew.
PROGRAM = """
import sys
if sys.argv[1] == "bounded":
    from lorax_shard.kernel_caches import bound_kernel_caches
    bound_kernel_caches()
import torch

def resident():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

torch.set_num_threads(1)
linear = torch.ops.mkldnn._linear_pointwise.default
shapes = [(64, 96), (64, 64), (64, 192), (192, 64)]
weights = [torch.ops.mkldnn._reorder_linear_weight(torch.ones(out, width)) for width, out in shapes]
before = 0
for rows in range(17, 17 + int(sys.argv[2])):
    for (width, _), weight in zip(shapes, weights):
        linear(torch.ones(rows, width), weight, None, "none", [], "")
    before = before or resident()
print(resident() - before)
"""


def growth(kind: str) -> int:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", PROGRAM, kind, str(NUM_SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="this build of torch has no oneDNN")
def test_a_shard_does_not_grow_with_the_numbers_of_rows_that_its_steps_had() -> None:
    bounded, unbounded = growth("bounded"), growth("unbounded")
    print("FIGURE MiB more after", NUM_SIZES, "numbers of rows:", bounded, "for", unbounded)
    assert bounded <= 160
    assert bounded <= unbounded / 2
