"""Tensor parallelism: two ranks, each holding half of the model, beside one that holds it all.

nccl refuses two ranks on one device. Ranks that are told to share one (``ranks_on_device``) meet
over gloo, which copies through the host: that shows right answers on a machine with one GPU, and
no speed worth a figure. Where shards cannot do that, the stage is skipped in their own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.models import device_of
from bench.gpu_check.report import FAILED, SKIPPED, Report
from bench.gpu_check.requests import router_service
from tests.helpers.shard_process import ShardProcess
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.step import FinishCode
from lorax_router.service.requests import GenerateParameters, GenerateRequest

PROMPTS = ("the quick brown fox", "adapters share one base model", "a", "blocks that a table lists")
NUM_TOKENS = 12
# What nccl says of two ranks on one device.
_ONE_DEVICE = ("Duplicate GPU", "ncclInvalidUsage")


class RanksDidNotStartError(Exception):
    """A rank ended before it was ready; the text is the end of its log."""


def run(report: Report, *, small: bool) -> None:
    """Compare greedy tokens of two ranks with those of one."""
    if "rendezvous" not in {field.name for field in dataclasses.fields(ShardConfig)}:
        report.end(SKIPPED, "this version's shards cannot meet as ranks")
        return
    device = device_of(small)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = make_tiny_model("llama", folder / "model")
        report.table("Greedy tokens", ("ranks", "seconds", "tokens", "as one rank's"))
        started = time.perf_counter()
        alone = generate(folder, model_dir, 1, device)
        report.row(1, time.perf_counter() - started, sum(map(len, alone)), None)
        started = time.perf_counter()
        try:
            both = generate(folder, model_dir, 2, device)
        except RanksDidNotStartError as error:
            refused = any(words in str(error) for words in _ONE_DEVICE)
            report.end(SKIPPED if refused else FAILED, str(error))
            return
        same = sum(a == b for one, two in zip(alone, both, strict=True)
                   for a, b in zip(one, two, strict=True))  # fmt: skip
        report.row(2, time.perf_counter() - started, sum(map(len, both)), same)
        if both != alone:
            report.end(FAILED, f"two ranks draw other tokens than one: {both} for {alone}")


def generate(
    folder: Path, model_dir: Path, num_ranks: int, device: torch.device
) -> list[list[int]]:
    """Return the tokens of each prompt from a group of so many ranks."""
    with shard_group(folder / f"of-{num_ranks}", model_dir, num_ranks, device) as uri:
        return asyncio.run(_generate(model_dir, uri))


async def _generate(model_dir: Path, uri: str) -> list[list[int]]:
    async with router_service(model_dir, uri) as parts:

        async def one(text: str) -> list[int]:
            parameters = GenerateParameters(max_new_tokens=NUM_TOKENS, ignore_eos_token=True)
            request = GenerateRequest(inputs=text, parameters=parameters)
            stream = await parts.service.generate_stream(request)
            ids: list[int] = []
            async with stream:
                async for chunk in stream:
                    ids += chunk.tokens.ids
                    if chunk.finish is not FinishCode.RUNNING:
                        break
            return ids

        return await asyncio.gather(*map(one, PROMPTS))


@contextlib.contextmanager
def shard_group(
    folder: Path, model_dir: Path, num_ranks: int, device: torch.device
) -> Iterator[str]:
    """Run ranks that compute as one; yields the address of rank 0."""
    folders = [folder / f"rank-{rank}" for rank in range(num_ranks)]
    for each in folders:
        each.mkdir(parents=True)
    settings: dict[str, Any] = {
        "world_size": num_ranks, "shard_uris": [f"unix:{each}/socket" for each in folders],
        "device": device.type, "dtype": "float32", "num_blocks": 64,
    }  # fmt: skip
    if num_ranks > 1:
        settings |= {"rendezvous": f"file://{folder}/meet", "ranks_on_device": num_ranks}

    def start(rank: int) -> ShardProcess:
        return ShardProcess(folders[rank], model_dir, rank=rank, **settings)

    # None is ready before all have met.
    with ThreadPoolExecutor(num_ranks) as pool:
        shards = list(pool.map(start, range(num_ranks)))
    with contextlib.ExitStack() as held:
        for shard in shards:
            held.callback(shard.__exit__, None, None, None)
        if dead := [shard for shard in shards if shard.facts is None]:
            raise RanksDidNotStartError(
                " / ".join(each.log_path.read_text()[-700:] for each in dead)
            )
        yield settings["shard_uris"][0]
