"""Classification heads: any mix of adapters, tasks and plain rows gives what PEFT gives of each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.head_world import (
    BLOCK_SIZE,
    FAMILIES,
    MAX_ROWS,
    MAX_TOKENS,
    HeadWorld,
)
from tests.helpers.toy_paged_model import pooled

from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    AdapterHandle,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_shard.engine.engine import Engine
from lorax_shard.model.hf_model import HFPagedModel

TOLERANCE = 1e-4


def scheduler(world: HeadWorld, engine: Engine, *, max_step_tokens: int) -> Scheduler:
    table = AdapterTable(max_resident=3)
    for handle in range(1, len(world.adapters) + 1):
        table.add(AdapterHandle(handle), 1)
    is_encoder = engine.model.is_encoder
    return Scheduler(
        num_blocks=engine.num_blocks, block_size=BLOCK_SIZE, max_rows=MAX_ROWS,
        max_step_tokens=max_step_tokens, adapters=table, whole_prompts=is_encoder,
        prefix_caching=not is_encoder,
    )  # fmt: skip


def asked(
    number: int, ids: list[int], handle: int, output: OutputKind, pooling: Pooling
) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(number), prompt_ids=ids, sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=0), adapter=AdapterHandle(handle),
        output=output, pooling=pooling,
    )  # fmt: skip


def first_or_last(engine: Engine) -> Pooling:
    """Return what heads for whole texts are given in a family."""
    head = engine.model.heads.get("sequence")
    return Pooling.FIRST if head is None else head.pooling


def mixture(world: HeadWorld, engine: Engine) -> list[RequestSpec]:
    """Return texts of mixed lengths, by turns with each adapter and none, for all that they have."""
    draw = random.Random(4)
    top = world.tokenizer.get_vocab_size()
    specs: list[RequestSpec] = []
    for length in (1, 2, 7, 7, 16, 33, MAX_TOKENS - 1):
        for handle in range(len(world.adapters) + 1):
            ids = [draw.randrange(3, top) for _ in range(length)]
            kind, pooling = OutputKind.VECTOR, Pooling.MEAN
            if handle and world.adapters[handle - 1].num_labels:
                kind = OutputKind.SCORES
                pooling = world.adapters[handle - 1].pooling or first_or_last(engine)
            specs.append(asked(len(specs), ids, handle, kind, pooling))
    draw.shuffle(specs)
    return specs


def expected(world: HeadWorld, spec: RequestSpec) -> torch.Tensor:
    ids, number = [*spec.prompt_ids], int(spec.adapter) - 1
    if spec.output is OutputKind.SCORES:
        return world.scores(number, ids).flatten()
    return pooled(world.states(None if number < 0 else number, ids), spec.pooling)


def assert_right(world: HeadWorld, spec: RequestSpec, answer: Answer) -> None:
    assert answer.error is None
    assert answer.vector is not None
    found = torch.from_numpy(np.frombuffer(answer.vector, dtype="<f4").copy())
    wanted = expected(world, spec)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mixture_of_heads_is_what_peft_gives(family: str, tmp_path: Path) -> None:
    world = HeadWorld(tmp_path, family)
    engine = world.engine()
    specs = mixture(world, engine)
    for at_once, most in ((False, MAX_TOKENS), (True, 2 * MAX_TOKENS)):
        core = scheduler(world, engine, max_step_tokens=most)
        answers = serve(engine, core, specs, at_once=at_once)
        for spec in specs:
            assert_right(world, spec, answers[spec.request_id])
        engine.clear()


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "deberta-v2", "distilbert", "modernbert", "mpnet", "llama"]
)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_model_s_own_head_beside_those_of_adapters(
    family: str, task: str, tmp_path: Path
) -> None:
    # BERT's classifier of tokens is saved without the pooler that its classifier of texts has.
    without = "SEQ_CLS" if (family, task) == ("bert", "TOKEN_CLS") else ""
    world = HeadWorld(tmp_path, family, head=task, without=without)
    engine = world.engine()
    kind = "sequence" if task == "SEQ_CLS" else "tokens"
    facts = engine.model.head(kind)
    assert facts is not None
    assert facts.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    ids = [5, 9, 40, 41, 7]
    own = asked(900, ids, 0, OutputKind.SCORES, facts.pooling)
    specs = [own, *(spec for spec in mixture(world, engine) if len(spec.prompt_ids) < 20)]
    core = scheduler(world, engine, max_step_tokens=2 * MAX_TOKENS)
    answers = serve(engine, core, specs, at_once=True)
    with torch.no_grad():
        wanted = world.stock(input_ids=torch.tensor([ids])).logits[0].flatten()
    found = torch.from_numpy(np.frombuffer(answers[own.request_id].vector, dtype="<f4").copy())
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    for spec in specs[1:]:
        assert_right(world, spec, answers[spec.request_id])


@pytest.mark.parametrize("fault", ["a wrong head: that of the next row"])
def test_a_wrong_head_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = HeadWorld(tmp_path, "bert", without="TOKEN_CLS")
    engine = world.engine()
    specs = [spec for spec in mixture(world, engine) if len(spec.prompt_ids) < 20]
    core = scheduler(world, engine, max_step_tokens=2 * MAX_TOKENS)
    answers = serve(engine, core, specs, at_once=True)
    for spec in specs:
        assert_right(world, spec, answers[spec.request_id])
    score = HFPagedModel.score

    def shifted(model: Any, kind: str, states: Any, slots: Any) -> Any:
        return score(model, kind, states, [*slots[1:], slots[0]])

    monkeypatch.setattr(HFPagedModel, "score", shifted)
    core = scheduler(world, engine, max_step_tokens=2 * MAX_TOKENS)
    engine.clear()
    wrong = serve(engine, core, specs, at_once=True)
    num_found = 0
    for spec in specs:
        try:
            assert_right(world, spec, wrong[spec.request_id])
        except AssertionError:
            num_found += 1
    assert num_found, fault
