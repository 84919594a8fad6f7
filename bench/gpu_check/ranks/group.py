"""Groups of ranks as processes, each with its part of one model, in lockstep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.gpu_check.machine import ROOT

from lorax_contract.config import ShardConfig
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.parallel.group import TorchGroup

# Ranks that never meet, or lose each other, say so; they are not cut.
_MEETING_S, _STEP_S = 300.0, 120.0


class RankSeat(NamedTuple):
    """Which rank of how many this process is, and where the group keeps its files."""

    rank: int
    world_size: int
    folder: Path
    small: bool

    @property
    def device(self) -> str:
        """Where it computes; a rank sees one GPU."""
        return "cpu" if self.small else "cuda"

    @property
    def backend(self) -> str:
        """What the ranks meet by."""
        return "gloo" if self.small else "nccl"


class LoadedPart(NamedTuple):
    """A rank's model, and the group that it computes with; None where there is one rank."""

    model: HFPagedModel
    group: TorchGroup | None

    def close(self) -> None:
        """Leave the group."""
        if self.group is not None:
            self.group.close()


def load(seat: RankSeat, model_dir: Path, dtype: torch.dtype) -> LoadedPart:
    """Meet the others and load this rank's part, compared with transformers on the way."""
    backends = {"attention_backend": "sdpa", "lora_backend": "cpu"} if seat.small else {}
    # A file of its own for each model: ranks meet at it once.
    meeting = f"file://{seat.folder}/meeting-{model_dir.name}-{str(dtype)[6:]}"
    config = ShardConfig(
        model_dir=str(model_dir), model_id="random", rank=seat.rank, world_size=seat.world_size,
        shard_uris=["unix:/unused"] * seat.world_size, device="cpu" if seat.small else "cuda", rendezvous=meeting,
        dtype=str(dtype)[6:], linear_backend="torch" if seat.small else "auto", **backends,
    )  # fmt: skip
    group = None
    if seat.world_size > 1:
        group = TorchGroup(
            seat.rank, seat.world_size, meeting, torch.device(seat.device),
            timeout_s=_STEP_S, meeting_s=_MEETING_S,
        )  # fmt: skip
    model = load_paged_model(config, group)
    model.warm_up(config.block_size)
    return LoadedPart(model, group)


def load_adapters(model: HFPagedModel, ranks: Sequence[int]) -> None:
    """Put random adapters of all linears but the head into slots from 0 on, the same on all ranks."""
    base, lora = model.base, model.lora
    assert base is not None
    assert lora is not None
    for slot, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(slot)

        def draw(*shape: int, by: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=by)

        modules = {
            name: ModuleDelta(
                a=draw(rank, info.in_features) * info.in_features**-0.5,
                b=draw(info.out_features, rank) * rank**-0.5,
                scaling=0.5,
            )
            for name, info in base.modules.items()
            if info.kind == "linear" and name != base.output_head
        }
        # Cut by what holds a rank's part.
        lora.load(slot, lora.prepare(HostAdapter(digest=f"random-{slot}", modules=modules)))


def run_group(module: str, world_size: int, folder: Path, *, small: bool) -> list[Path]:
    """Run ``module``'s ``compute`` in each rank's process; return what each wrote, by rank.

    Raises RuntimeError if one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--small"] if small else []
    command = [sys.executable, "-m", "bench.gpu_check.ranks.run_rank", module, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), *flags], cwd=ROOT, env=environment(rank, small)
        )
        for rank in range(world_size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"the ranks of {world_size} ended with the codes {codes}")
    return [folder / f"rank-{rank}" for rank in range(world_size)]


def environment(rank: int, small: bool) -> dict[str, str]:
    """Return a rank's environment: it sees a GPU of its own, and on CPUs takes one thread."""
    values = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    values.pop("TRITON_INTERPRET", None)
    if small:
        return values | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(rank + 1)]
    return values | {"CUDA_VISIBLE_DEVICES": names[rank]}


def write_json(path: Path, document: Any) -> None:
    """Write what a rank found."""
    path.write_text(json.dumps(document))


def read_json(path: Path) -> Any:
    """Read what a rank found."""
    return json.loads(path.read_text())
