"""The parts of a model of all ranks, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from lorax_contract.config import ShardConfig
from lorax_shard.model.loader import read_config
from lorax_shard.model.rank_model import RankPart, read_part


def read_parts(config: ShardConfig, world_size: int) -> list[RankPart]:
    """Read the parts one after another (building models is not safe in threads)."""
    device, dtype = torch.device("cpu"), torch.float32
    hf_config = read_config(Path(config.model_dir), trust_remote_code=False, task=config.task)
    return [
        read_part(config, hf_config, dtype, device, (rank, world_size))
        for rank in range(world_size)
    ]
