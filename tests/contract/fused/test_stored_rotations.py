"""Backends that turn keys and store them at once do what others do one after the other."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.paged_sequences import DEVICE

from lorax_contract.errors import StartupError
from lorax_shard.attention.kv_cache import FP8, NO_SLOT, KVShape, PagedCache
from lorax_shard.fused.backend import (
    ElementwiseBackend,
    KVSlots,
    PendingRotation,
    RotatingStore,
    Rotation,
)
from lorax_shard.fused.registry import BACKENDS

pytest.importorskip("triton", reason="triton does not run on this platform")

# After the question whether it can be.
from lorax_shard.attention.backend import StepMetadata
from lorax_shard.attention.triton.backend import TritonAttention

# Triton's interpreter computes in numpy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# What a GPU rounds to 32 bits depends on which product and sum it takes as one.
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
NUM_BLOCKS, BLOCK_SIZE = 5, 4
ROTATIONS = [
    Rotation(False, False),
    Rotation(True, False),
    Rotation(True, True),
    Rotation(False, True, is_short=True),
]


@pytest.fixture(params=BACKENDS.names)
def backend(request: pytest.FixtureRequest) -> ElementwiseBackend:
    try:
        found = BACKENDS.create(request.param, DEVICE, torch.float32)
    except StartupError as error:
        pytest.skip(str(error))
    if not isinstance(found, RotatingStore):
        pytest.skip("it turns and stores one after the other")
    return found


class Step:
    """Queries, keys and values as columns of one tensor, and slots for the latter."""

    def __init__(
        self,
        dtype: torch.dtype = DTYPE,
        kv_dtype: torch.dtype | None = None,
        *,
        tokens: int = 5,
        heads: tuple[int, int] = (3, 1),
        dims: tuple[int, int] = (16, 16),
        width: int = 16,
        rotation: Rotation = ROTATIONS[0],
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        (num_queries, num_keys), (dim, value_dim) = heads, dims
        widths = num_queries * dim, num_keys * dim, num_keys * value_dim
        parts = draw(1, tokens, sum(widths)).split(widths, dim=-1)
        query, key, self.value = (
            each.view(1, tokens, number, each.shape[-1] // number).transpose(1, 2)
            for each, number in zip(parts, (num_queries, num_keys, num_keys), strict=True)
        )
        cos, sin = draw(2, 1, tokens, width // 2 if rotation.is_short else width)
        self.pending = PendingRotation(query, key, cos, sin, rotation)
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:tokens]
        self.slots = slots.to(DEVICE)
        self.shape, self.kv_dtype = KVShape(num_keys, dim, value_dim), kv_dtype or dtype

    def cache(self) -> PagedCache:
        """Return an empty one, but for marks that show what was overwritten."""
        cache = PagedCache(
            {0: self.shape},
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=self.kv_dtype, device=DEVICE,
        )  # fmt: skip
        for pool in (cache.keys[0], cache.values[0]):
            pool.copy_(torch.full(pool.shape, 7.0))
        return cache

    def check(self, backend: ElementwiseBackend) -> None:
        """Compare all that comes out, bit by bit."""
        together, apart = self.cache(), self.cache()
        kept = KVSlots(together.keys[0], together.values[0], self.slots)
        found = backend.rotate_and_store(self.pending, self.value, kept)
        expected = backend.rotate(*self.pending)
        store = TritonAttention()
        key, value = (each[0].transpose(0, 1) for each in (expected[1], self.value))
        ones = [1] * len(self.slots)
        tables = torch.zeros(len(ones), 1, dtype=torch.long, device=DEVICE)
        store.store(
            key, value, 0, StepMetadata(ones, ones, self.slots, tables, len(ones), apart, store)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(together.raw_blocks(), apart.raw_blocks(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("dims", "width"), [((16, 16), 16), ((24, 8), 24), ((20, 5), 6)])
@pytest.mark.parametrize(("heads", "tokens"), [((1, 1), 1), ((6, 2), 5), ((2, 2), 0)])
def test_shapes(
    backend: ElementwiseBackend,
    rotation: Rotation,
    dims: tuple[int, int],
    width: int,
    heads: tuple[int, int],
    tokens: int,
) -> None:
    Step(tokens=tokens, heads=heads, dims=dims, width=width, rotation=rotation).check(backend)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float16, None), (torch.bfloat16, None), (DTYPE, FP8), (torch.bfloat16, FP8)],
)
def test_dtypes(
    backend: ElementwiseBackend, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    if kv_dtype is FP8 and (reason := TritonAttention.refuses_cache(FP8, DEVICE)):
        pytest.skip(reason)
    step = Step(dtype, kv_dtype)
    # Beyond the largest number of eight bits.
    step.value[0, 0, 1, :2] = torch.tensor([600.0, -5000.0], device=DEVICE)
    step.pending.key[0, 0, 2] *= 1000
    step.check(backend)


def test_what_is_not_finite_is_kept_as_0_and_goes_on_as_it_is(backend: ElementwiseBackend) -> None:
    step = Step(width=6)
    strange = torch.tensor([float("nan"), float("inf"), float("-inf")], device=DEVICE)
    # What turns, and what does not.
    step.pending.key[0, 0, 1, :3] = strange
    step.pending.key[0, 0, 2, 8:11] = strange
    step.value[0, 0, 3, :3] = strange
    step.pending.query[0, 0, 3, :3] = strange
    step.check(backend)


@pytest.mark.parametrize("without", [[2], [0, 4], range(5)], ids=["one", "some", "all"])
def test_a_token_without_a_slot_is_written_nowhere(
    backend: ElementwiseBackend, without: list[int]
) -> None:
    step = Step(width=6)
    step.slots[list(without)] = NO_SLOT
    step.check(backend)
