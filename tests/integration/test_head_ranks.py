"""Classification heads over several ranks: the model's own, and those of adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.drive_engine import serve
from tests.helpers.head_world import MAX_TOKENS, HeadWorld
from tests.helpers.rank_models import read_parts
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.integration.test_activated_adapters import Ranks
from tests.integration.test_heads import TOLERANCE, asked, assert_right, mixture, scheduler

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import OutputKind
from lorax_shard.engine.engine import Engine
from lorax_shard.model.rank_model import meet


def engines_of(world: HeadWorld, world_size: int) -> list[Engine]:
    parts = read_parts(world.config, world_size)

    def build(group: ThreadGroup) -> Engine:
        meet(parts[group.rank], group)
        return world.engine(parts[group.rank].paged, group)

    return run_ranks(world_size, build)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "deberta-v2", "distilbert", "modernbert", "mpnet", "llama"]
)
def test_any_mixture_of_heads_is_what_peft_gives(family: str, tmp_path: Path) -> None:
    world = HeadWorld(tmp_path, family)
    engines = engines_of(world, 3)
    specs = mixture(world, engines[0])
    core = scheduler(world, engines[0], max_step_tokens=2 * MAX_TOKENS)
    answers = serve(Ranks(engines), core, specs, at_once=True)
    for spec in specs:
        assert_right(world, spec, answers[spec.request_id])


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "electra", "modernbert", "llama"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_model_s_own_head_is_read_whole_by_each_rank(
    family: str, task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = "SEQ_CLS" if (family, task) == ("bert", "TOKEN_CLS") else ""
    world = HeadWorld(tmp_path, family, head=task, without=without)
    engines = engines_of(world, 2)
    assert "belong to no layer" not in caplog.text
    facts = engines[0].model.head("sequence" if task == "SEQ_CLS" else "tokens")
    assert facts is not None
    own = asked(900, [5, 9, 40, 41, 7], 0, OutputKind.SCORES, facts.pooling)
    specs = [own, *(spec for spec in mixture(world, engines[0]) if len(spec.prompt_ids) < 10)]
    core = scheduler(world, engines[0], max_step_tokens=2 * MAX_TOKENS)
    answers = serve(Ranks(engines), core, specs, at_once=True)
    with torch.no_grad():
        wanted = world.stock(input_ids=torch.tensor([[*own.prompt_ids]])).logits[0].flatten()
    found = torch.from_numpy(np.frombuffer(answers[own.request_id].vector, dtype="<f4").copy())
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    for spec in specs[1:]:
        assert_right(world, spec, answers[spec.request_id])


def test_a_head_without_its_weights_is_refused_by_name(tmp_path: Path) -> None:
    world = HeadWorld(tmp_path, "bert", head="SEQ_CLS")
    path = world.path / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"classifier\.bias") as caught:
        read_parts(world.config, 2)
    assert caught.value.exit_code is ExitCode.MODEL_CORRUPT
