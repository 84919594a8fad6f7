"""Encoders over several ranks compute what one model computes, with adapters, and meet as seldom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_models import ENCODERS
from tests.helpers.encoder_world import (
    EncoderWorld,
    adapter_options,
    check_vectors,
    specs_of,
    whole_scheduler,
)
from tests.helpers.rank_models import read_parts
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.integration.test_activated_adapters import Ranks

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.engine.engine import Engine
from lorax_shard.model import rank_model
from lorax_shard.model.rank_model import meet

# The first DeBERTa's query, key and value are one linear, head by head.
SPREAD = sorted(ENCODERS.keys() - {"deberta"})


def served(world: EncoderWorld, world_size: int) -> float:
    """Serve base rows and rows of all adapters by ranks; return the largest difference."""
    parts = read_parts(world.config, world_size)

    def build(group: ThreadGroup) -> Engine:
        meet(parts[group.rank], group)
        return world.engine(parts[group.rank].paged, group)

    engine = Ranks(run_ranks(world_size, build))
    texts = world.texts(tuple(range(len(world.folders) + 1)))
    asked = specs_of(texts)
    answers = serve(engine, whole_scheduler(len(world.folders)), asked, at_once=True)
    return check_vectors(world, texts, asked, answers)


@pytest.fixture(scope="module", params=SPREAD)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncoderWorld:
    return EncoderWorld(request.param, tmp_path_factory.mktemp(request.param))


# Six heads: evenly, and two or one each.
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_vectors_of_several_ranks_equal_peft(world: EncoderWorld, world_size: int) -> None:
    print(f"FIGURE {world.family} on {world_size} ranks {served(world, world_size):.1e}")


def test_more_ranks_than_heads_are_refused_in_words(world: EncoderWorld) -> None:
    with pytest.raises(StartupError, match="6 query heads cannot be spread over 7 ranks") as caught:
        read_parts(world.config, 7)
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED


def test_ranks_hold_parts_of_each_layer_and_meet_twice_in_it(world: EncoderWorld) -> None:
    parts = read_parts(world.config, 3)
    sizes = [sum(p.numel() for p in part.loaded.model.parameters()) for part in parts]
    whole = sum(p.numel() for p in parts[0].loaded.whole.parameters())
    # Positions, token types and the pooler are whole.
    assert max(sizes) < 0.6 * whole

    def work(group: ThreadGroup) -> int:
        meet(parts[group.rank], group)
        paged = parts[group.rank].paged
        paged.allocate_cache(4, 4)
        metadata = paged.make_metadata([5], [5], torch.arange(5), torch.zeros(1, 2).long(), 0)
        paged.forward(torch.arange(5), torch.arange(5), metadata, torch.arange(5))
        return group.num_collectives

    layers = len(parts[0].paged._survey.shapes)
    assert run_ranks(3, work) == [2 * layers + 1] * 3


def one_by_one(function: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with lock:
            return function(*arguments, **named)

    return call


def test_ranks_that_agree_keep_their_kernels(
    world: EncoderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Models are not built in several threads at once.
    lock = threading.Lock()
    for owner, name in ((rank_model.miniature, "build"), (rank_model, "_load")):
        monkeypatch.setattr(owner, name, one_by_one(getattr(owner, name), lock))
    parts = read_parts(world.config, 3)
    backends = {part.exchanged.backend for part in parts}

    def probed(group: ThreadGroup) -> str:
        part = parts[group.rank]
        meet(part, group)
        rank_model._probe(part, world.config, torch.device("cpu"), group)
        return part.exchanged.backend

    assert set(run_ranks(3, probed)) == backends


@pytest.mark.parametrize("family", SPREAD)
def test_a_checkpoint_of_a_model_around_it_is_read(family: str, tmp_path: Path) -> None:
    """Its tensors have longer names, and it has no pooler."""
    # The others would change the pooler, too.
    adapters = [adapter_options(family)[number] for number in (1, 3)]
    world = EncoderWorld(family, tmp_path, adapters, around="MaskedLM")
    served(world, 3)


@pytest.mark.parametrize("around", ["", "MaskedLM"])
def test_old_names_of_norms_are_read(around: str, tmp_path: Path) -> None:
    world = EncoderWorld("bert", tmp_path, [], around=around)
    path = world.path / "model.safetensors"
    tensors = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in load_file(path).items()
    }
    assert any(key.endswith("LayerNorm.gamma") for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    served(world, 2)
