"""A shard process whose device breaks at the first step; its argument is its configuration."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel, toy_tokenizer

from lorax_contract import logs
from lorax_contract.config import ShardConfig
from lorax_contract.step import WarmupSpec
from lorax_shard.app import ShardParts, Stopper, serve
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings


class BreakingModel(ToyModel):
    """Computes the warm-up, and fails at whatever comes then."""

    is_broken = False

    def forward(self, *arguments, **named):
        if self.is_broken:
            raise RuntimeError("an illegal memory access was encountered")
        return super().forward(*arguments, **named)


def main() -> int:
    logs.configure()
    config = ShardConfig.from_json(Path(sys.argv[1]).read_bytes())
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=64)
    model = BreakingModel()
    engine = Engine(model, toy_tokenizer(), pool)
    spec = {"max_input_length": 32, "max_total_tokens": 48, "max_step_tokens": 16, "max_rows": 4}
    engine.warm_up(WarmupSpec(**spec))
    model.is_broken = True
    return asyncio.run(serve(config, ShardParts(engine), Stopper()))


if __name__ == "__main__":
    sys.exit(main())
