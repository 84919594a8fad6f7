"""Adapters through a whole shard process, driven by our plans over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.acceptance.reference import Reference, Served
from tests.helpers.in_loop import in_loop
from tests.helpers.peft_folders import load_adapter, load_model, save_adapter
from tests.helpers.plans import make_spec
from tests.helpers.shard_process import ShardProcess
from tests.helpers.shard_rows import ShardRows
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tokenizers import Tokenizer

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    Reason,
)
from lorax_contract.errors import ShardError, StaleEpochError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import AdapterHandle, FinishCode, WarmupSpec
from lorax_router.shards.grpc_client import GrpcShardClient

BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 4, 128, 10
GROWN_SIZE = VOCAB_SIZE + 6
LINEARS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "dora": {"r": 3, "use_dora": True, "target_modules": [*LINEARS, "embed_tokens"]},
    "whole": {
        "r": 5,
        "use_rslora": True,
        "target_modules": LINEARS,
        "modules_to_save": ["lm_head", "norm"],
        "trainable_token_indices": [3, 40],
    },
}
HANDLES = {name: AdapterHandle(number) for number, name in enumerate(ADAPTERS, start=1)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all local adapters."""
    folder = tmp_path_factory.mktemp("local")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        save_adapter(model_dir, folder / name, seed=seed, **options)
    return folder


@pytest.fixture(scope="module")
def seqs() -> Iterator[int]:
    """The numbers of the one shard's steps."""
    return itertools.count(1)


@pytest.fixture(scope="module")
def shard(model_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start(tmp_path_factory.mktemp("shard"), model_dir, root) as process:
        yield process


def start(folder: Path, model_dir: Path, root: Path, **settings: Any) -> ShardProcess:
    return ShardProcess(
        folder,
        model_dir,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        adapter_store_dir=str(folder / "store"),
        adapter_local_roots=[str(root)],
        **settings,
    )


@dataclasses.dataclass
class Session:
    """A client of a warm shard, and its rows."""

    client: GrpcShardClient
    rows: ShardRows
    parts: list[AdapterPart] = dataclasses.field(default_factory=list)

    async def fetch(self, name: str, *, refresh: bool = False) -> FetchedAdapter:
        query = AdapterQuery(ref=AdapterRef.of("local", name), refresh=refresh)
        fetched = await self.client.fetch_adapter(query)
        self.parts.append(fetched.part)
        return fetched

    async def prepare(self, handle: AdapterHandle, *parts: AdapterPart) -> LoadReport:
        return await self.client.prepare_adapter(handle, AdapterContent(parts=parts))

    async def load(self, *names: str) -> list[AdapterHandle]:
        """Make adapters ready under their handles."""
        for name in names:
            await self.prepare(HANDLES[name], (await self.fetch(name)).part)
        return [HANDLES[name] for name in names]


@contextlib.asynccontextmanager
async def connected(shard: ShardProcess, seqs: Iterator[int]) -> AsyncIterator[Session]:
    """Connect to a shard and warm it up; nothing is left in it afterwards."""
    client = GrpcShardClient(shard.uri)
    try:
        await client.info()
        await client.warmup(
            WarmupSpec(max_input_length=64, max_total_tokens=96, max_step_tokens=64, max_rows=8)
        )
        rows = ShardRows(client, seqs, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        session = Session(client, rows)
        try:
            yield session
        finally:
            handles = list((await client.adapter_tiers([])).device)
            await rows.step(drop=list(rows.rows), deactivate=handles)
            for handle in handles:
                await client.release_adapter(handle)
            await client.release_adapter(AdapterHandle(1), session.parts)
    finally:
        await client.close()


# --- what is computed ------------------------------------------------------------------------


class PeftReference(Reference):
    """The rule of teacher forcing, against PEFT's model instead of the stock one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def served(session: Session, handle: int) -> list[Served]:
    """Return the answers of an adapter's rows; all of them are whole."""
    found = [row for row in session.rows.rows.values() if row.spec.adapter == handle]
    assert found
    assert all(row.finish == FinishCode.LENGTH for row in found)
    return [Served(row.spec.prompt_ids, row.output, row.logprobs) for row in found]


@in_loop
async def test_mixed_rows_compute_what_peft_computes(
    shard: ShardProcess, seqs: Iterator[int], model_dir: Path, root: Path
) -> None:
    """Chunks and decodes of three kinds of adapters and of the base, some computed twice."""
    async with connected(shard, seqs) as session:
        handles = [AdapterHandle(0), *await session.load(*ADAPTERS)]
        texts = prompts(12)
        session.rows.add(
            *(
                make_spec(number, texts[number - 1], max_new_tokens=NEW_TOKENS, ignore_eos=True,
                          adapter=handles[number % len(handles)])
                for number in range(1, 13)
            )
        )  # fmt: skip

        def decoding() -> dict[int, int]:
            """One row of each adapter that has given tokens and will give more."""
            rows = session.rows.rows.values()
            return {row.spec.adapter: row.spec.request_id for row in rows
                    if row.is_live and len(row.output) > 2}  # fmt: skip

        until = lambda: decoding().keys() == set(handles)  # noqa: E731
        await session.rows.run(12, activate=handles[1:], until=until)
        victims = list(decoding().values())
        assert len(victims) == len(handles)
        await session.rows.step(drop=victims)
        await session.rows.run(9)
        models = {name: load_adapter(model_dir, root / name) for name in ADAPTERS}
        for name, model in [("base", load_model(model_dir)), *models.items()]:
            answers = served(session, HANDLES.get(name, AdapterHandle(0)))
            verdict = PeftReference(model).check_greedy(answers)
            assert verdict.ok, f"{name}: {verdict}"
            if name != "base":
                # The comparison would see an adapter that is left out.
                assert not Reference(model_dir).check_greedy(answers).ok


@pytest.fixture(scope="module")
def grown(model_dir: Path, root: Path) -> Path:
    """An adapter that adds tokens, with a tokenizer that knows them."""
    folder = save_adapter(
        model_dir, root / "grown", seed=9, rows=GROWN_SIZE, r=3, target_modules=LINEARS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    missing = GROWN_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<own {number}>" for number in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@in_loop
async def test_an_adapter_with_tokens_of_its_own_beside_others(
    shard: ShardProcess, seqs: Iterator[int], model_dir: Path, grown: Path
) -> None:
    handle = AdapterHandle(9)

    async def beside(other: AdapterHandle) -> tuple[str, list[Served]]:
        """Return what a base row got beside an adapter, and the answers of that adapter."""
        async with connected(shard, seqs) as session:
            await session.load("plain")
            fetched = await session.fetch("grown")
            assert fetched.vocab_size == GROWN_SIZE
            await session.prepare(handle, fetched.part)
            session.rows.add(
                make_spec(1, [5, 9, 80], adapter=other, max_new_tokens=8, ignore_eos=True),
                make_spec(2, [7, 8, 9], max_new_tokens=8, ignore_eos=True, do_sample=True, seed=5,
                          temperature=1.3, num_alternatives=3, prompt_logprobs=True),
            )  # fmt: skip
            if other == handle:
                own = [GROWN_SIZE - 1, 40, GROWN_SIZE - 2]
                session.rows.add(make_spec(3, own, adapter=other, ignore_eos=True,
                                           max_new_tokens=8, prompt_logprobs=True))  # fmt: skip
            await session.rows.run(1, activate=[handle, HANDLES["plain"]])
            if other == handle:
                row = session.rows.rows[3]
                assert row.prompt_tokens.texts[0].startswith("<own ")
                assert row.text == tokenizer.decode(row.output)
            base = session.rows.rows[2]
            return repr(
                (base.output, base.logprobs, base.texts, base.alternatives, base.prompt_tokens)
            ), served(session, other)

    tokenizer = Tokenizer.from_file(str(grown / "tokenizer.json"))
    alone, _ = await beside(HANDLES["plain"])
    mixed, answers = await beside(handle)
    # Steps of one token: the base row is computed in a batch of its own both times.
    assert mixed == alone
    verdict = PeftReference(load_adapter(model_dir, grown, rows=GROWN_SIZE)).check_greedy(answers)
    assert verdict.ok, verdict


# --- tiers and failures ---------------------------------------------------------------------


@in_loop
async def test_the_tiers_say_where_adapters_lie(
    shard: ShardProcess, seqs: Iterator[int], root: Path
) -> None:
    async with connected(shard, seqs) as session:
        shutil.copytree(root / "plain", root / "twin")
        fetched = await session.fetch("twin")
        part = fetched.part
        one, two = AdapterHandle(21), AdapterHandle(22)
        reports = await asyncio.gather(*(session.prepare(one, part) for _ in range(4)))
        assert len({report.parse_s for report in reports}) == 1
        assert await session.prepare(one, part) == reports[0]
        # Equal content under another name and another handle shares the copies.
        again = await session.fetch("plain")
        assert again.part == part
        await session.prepare(two, again.part)
        tiers = await session.client.adapter_tiers([part])
        expected = (part.content_digest, reports[0].device_bytes)
        assert {one: expected, two: expected} == dict(tiers.device)
        assert 0 < reports[0].device_bytes <= fetched.device_bytes
        assert tiers.host[part.content_digest] > 0
        assert tiers.disk[part.store_digest] >= fetched.disk_bytes
        await session.client.release_adapter(one)
        assert set((await session.client.adapter_tiers([])).device) == {two}
        await session.client.release_adapter(two, [part])
        tiers = await session.client.adapter_tiers([part])
        assert two not in tiers.device
        assert part.content_digest not in tiers.host
        assert part.store_digest not in tiers.disk


@in_loop
async def test_calls_for_another_incarnation_are_refused(
    shard: ShardProcess, seqs: Iterator[int]
) -> None:
    async with connected(shard, seqs) as session:
        fetched = await session.fetch("plain")
        other = GrpcShardClient(shard.uri)
        await other.info()
        other._epoch = 99
        content = AdapterContent(parts=(fetched.part,))
        for call in (other.prepare_adapter(AdapterHandle(5), content),
                     other.release_adapter(AdapterHandle(5))):  # fmt: skip
            with pytest.raises(StaleEpochError):
                await call
        await other.close()
        assert not (await session.client.adapter_tiers([])).device


@in_loop
async def test_what_is_in_effect_is_not_released(shard: ShardProcess, seqs: Iterator[int]) -> None:
    async with connected(shard, seqs) as session:
        (handle,) = await session.load("plain")
        await session.rows.step(activate=[handle])
        with pytest.raises(ShardError, match="deactivate it in a step first"):
            await session.client.release_adapter(handle)
        session.rows.add(make_spec(1, [4, 5], adapter=handle), make_spec(2, [4, 5]))
        await session.rows.step({1: 2, 2: 2})
        await session.rows.step({1: 1, 2: 1}, deactivate=[handle])
        assert session.rows.rows[1].finish == FinishCode.ERROR
        assert len(session.rows.rows[2].output) == 2
        await session.client.release_adapter(handle)


@in_loop
async def test_files_that_left_the_store_or_changed_there_are_brought_anew(
    shard: ShardProcess, seqs: Iterator[int]
) -> None:
    store = Path(shard.uri.removeprefix("unix:")).parent / "store"
    async with connected(shard, seqs) as session:
        fetched = await session.fetch("dora")
        entry = store / "entries" / fetched.part.store_digest
        shutil.rmtree(entry)
        with pytest.raises(AdapterUnavailableError) as caught:
            await session.prepare(AdapterHandle(31), fetched.part)
        assert caught.value.reason is Reason.EVICTED
        again = await session.fetch("dora")
        assert again.downloaded
        assert again.part == fetched.part
        weights = entry / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(AdapterUnavailableError) as caught:
            await session.prepare(AdapterHandle(31), fetched.part)
        assert caught.value.reason is Reason.CORRUPT
        assert (await session.fetch("dora")).downloaded
        await session.prepare(AdapterHandle(31), fetched.part)


# --- the process ------------------------------------------------------------------------------


@in_loop
async def test_memory_of_unloaded_adapters_is_freed(
    shard: ShardProcess, seqs: Iterator[int], model_dir: Path, root: Path
) -> None:
    save_adapter(model_dir, root / "large", r=512, target_modules="all-linear")
    process = psutil.Process(shard.process.pid)
    resident: list[int] = []
    async with connected(shard, seqs) as session:
        for number in range(1, 51):
            handle = AdapterHandle(100 + number)
            fetched = await session.fetch("large")
            report = await session.prepare(handle, fetched.part)
            session.rows.add(make_spec(number, [4, 5, 6], adapter=handle, max_new_tokens=1))
            await session.rows.step({number: 3}, activate=[handle])
            assert len(session.rows.rows[number].output) == 1
            await session.rows.step(drop=[number], deactivate=[handle])
            await session.client.release_adapter(handle, [fetched.part])
            resident.append(process.memory_info().rss)
    assert report.device_bytes > 2 << 20
    assert resident[49] - resident[9] < report.device_bytes, resident


def test_a_killed_shard_leaves_no_process(model_dir: Path, root: Path, tmp_path: Path) -> None:
    with start(tmp_path, model_dir, root) as shard:
        children = psutil.Process(shard.process.pid).children
        while not (found := children(recursive=True)):
            assert shard.process.poll() is None
        shard.process.kill()
        shard.wait()
        gone, alive = psutil.wait_procs(found, timeout=60)
    assert found
    assert not alive
    assert set(gone) == set(found)


def test_a_stopped_shard_ends_its_fetcher_first(
    model_dir: Path, root: Path, tmp_path: Path
) -> None:
    with start(tmp_path, model_dir, root) as shard:
        children = psutil.Process(shard.process.pid).children
        while not (found := children(recursive=True)):
            assert shard.process.poll() is None
        shard.process.send_signal(signal.SIGTERM)
        assert shard.wait() == ExitCode.OK
        assert not any(child.is_running() for child in found)
