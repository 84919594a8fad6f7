"""A token's attention is the same to the last bit, whatever it is computed with.

On matrix tiles it is so among chunks of many rows, and among few.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.helpers.paged_sequences import Sequences

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend, AttentionSpec
from lorax_shard.attention.cpp import StepRows

CPU = torch.device("cpu")
# With three query heads to a KV head, tokens of a chunk from which on its rows are many.
MANY_TOKENS = 11
LENGTHS = [300, 41, 9, 1100]
SPECS = {
    "plain": AttentionSpec(0.25),
    "window": AttentionSpec(0.25, window=70),
    "long window": AttentionSpec(0.25, window=600),
    "chunk": AttentionSpec(0.25, chunk=96),
    "everything": AttentionSpec(0.4, window=530, softcap=3.0, sinks=torch.linspace(2.0, -1.0, 6)),
}


@pytest.fixture(params=["cpp", "tiles"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if reason := registry.BACKENDS.probe(request.param, CPU, torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    return registry.create(request.param, CPU, torch.float32)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> AttentionSpec:
    return SPECS[request.param]


def sequences(lengths: list[int]) -> Sequences:
    return Sequences(lengths, key_dim=32, value_dim=64, device=CPU, block_size=16)


def in_chunks(
    backend: AttentionBackend, spec: AttentionSpec, size: int, lengths: list[int]
) -> list[torch.Tensor]:
    """Return each row's outputs, computed so many tokens at a time, the rows together."""
    rows = sequences(lengths)
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    while counts := {
        row: min(size, length - done)
        for row, (length, done) in enumerate(zip(lengths, rows.done, strict=True))
        if done < length
    }:
        for row, output in rows.step(backend, spec, counts).items():
            found[row].append(output)
    return [torch.cat(each) for each in found]


@pytest.mark.parametrize("size", [1, 7, 64, 333])
def test_chunks_of_any_size(backend: AttentionBackend, spec: AttentionSpec, size: int) -> None:
    if backend.name == "tiles" and size < MANY_TOKENS:
        pytest.skip("chunks of few rows are not computed on tiles")
    lengths = LENGTHS if size > 1 else [70, 41, 9, 530]
    whole = in_chunks(backend, spec, 5000, lengths)
    for found, expected in zip(in_chunks(backend, spec, size, lengths), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(
    backend: AttentionBackend, spec: AttentionSpec, num_threads: int
) -> None:
    counts = [{0: 299, 1: 40, 2: 8, 3: 1090}, {0: 1, 1: 1, 2: 1, 3: 10}]
    steps = []
    for count in (1, num_threads):
        torch.set_num_threads(count)
        rows = sequences(LENGTHS)
        steps.append([rows.step(backend, spec, each) for each in counts])
    for alone, shared in zip(*steps, strict=True):
        for row in alone:
            assert torch.equal(alone[row], shared[row])


@pytest.mark.usefixtures("threads")
def test_a_long_context_that_threads_share(backend: AttentionBackend) -> None:
    found = []
    for num_threads in (1, 4):
        torch.set_num_threads(num_threads)
        rows = sequences([2100])
        rows.fill(backend, {0: 2099})
        found.append(rows.step(backend, SPECS["plain"], {0: 1})[0])
    assert torch.equal(*found)
    expected = rows.expected(0, slice(2099, 2100), SPECS["plain"])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=2e-5)


def test_any_batch_mates(backend: AttentionBackend, spec: AttentionSpec) -> None:
    together, alone = sequences(LENGTHS), sequences(LENGTHS)
    for rows in (together, alone):
        rows.fill(backend, {0: 100, 1: 40, 3: 1091})
    counts = {0: 200, 1: 1, 2: 9, 3: 9}
    mixed = together.step(backend, spec, counts)
    for row, count in counts.items():
        assert torch.equal(alone.step(backend, spec, {row: count})[row], mixed[row])


def test_rows_of_another_step_at_the_same_address(backend: AttentionBackend) -> None:
    """A call that was packed once computes what the rows say that stand there by then."""
    spec, told = SPECS["plain"], StepRows()
    address = told.address
    expected = sequences(LENGTHS)
    found = sequences(LENGTHS)
    for counts in ({0: 1}, {0: 30, 1: 41, 2: 9, 3: 1}, {3: 2}):
        metadata = found.metadata(backend, counts)
        told.fill(metadata.query_lens, metadata.context_lens, metadata.block_tables)
        metadata.scratch["cpp.rows"] = told
        outputs = found.step(backend, spec, counts, metadata)
        for row, output in expected.step(backend, spec, counts).items():
            assert torch.equal(outputs[row], output)
        assert told.address == address


@pytest.mark.parametrize(
    "tables",
    [
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(1, 4, dtype=torch.int64),
        torch.zeros(4, 2, dtype=torch.int64).t(),
    ],
)
def test_tables_that_do_not_fit_are_refused(tables: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        StepRows().fill([1, 1], [5, 6], tables)


def test_a_sick_query_harms_its_own_heads_only(backend: AttentionBackend) -> None:
    """And is not hidden: what it computes is no number, by which its row is known to have failed."""
    spec = AttentionSpec(0.25, sinks=torch.zeros(6))
    healthy, sick = sequences([80]), sequences([80])
    sick.queries[0][50, 3] = float("nan")
    expected, found = (rows.step(backend, spec, {0: 80})[0] for rows in (healthy, sick))
    assert found[50, 3].isnan().all()
    found[50, 3] = expected[50, 3]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dims", [(64, 64), (96, 32), (128, 256)])
def test_tiles_are_as_exact_as_registers(spec: AttentionSpec, dims: tuple[int, int]) -> None:
    if reason := registry.BACKENDS.probe("tiles", CPU, torch.float32):
        pytest.skip(f"tiles: {reason}")
    off = {}
    for name in ("cpp", "tiles"):
        rows = Sequences([500, 90], key_dim=dims[0], value_dim=dims[1], device=CPU, block_size=16)
        rows.fill(registry.create(name, CPU, torch.float32), {0: 130})
        found = rows.step(registry.create(name, CPU, torch.float32), spec, {0: 370, 1: 90})
        off[name] = max(
            float((found[row].double() - rows.expected(row, tokens, spec)).square().mean().sqrt())
            for row, tokens in ((0, slice(130, 500)), (1, slice(0, 90)))
        )
    assert off["tiles"] <= 1.1 * off["cpp"]
    # It is the other computation, where a row has others beside it.
    assert off["tiles"] != off["cpp"]
