"""Outputs of the embedded model, bound to schemas, patterns and choices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

import jsonschema
import pytest
from tests.helpers.constraints import choice, lark, regex, schema
from tests.helpers.default_model import default_model_dir
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.json_schemas import SCHEMAS
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import (
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.constraints.check_process import compiled, tokens_of
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS = 16, 512, 16


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    folder = default_model_dir()
    config = ShardConfig(model_dir=str(folder), model_id="test", shard_uris=["unix:/unused"])
    model = load_paged_model(config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = Engine(
        model,
        tokenizer,
        PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS),
        make_constraints=constraints_maker(tokenizer, model.vocab_size, model.eos_token_ids),
    )
    engine.warm_up(
        WarmupSpec(
            max_input_length=64, max_total_tokens=400, max_step_tokens=256, max_rows=MAX_ROWS
        )
    )
    yield engine
    assert engine.constraints is not None
    engine.constraints.close()


def answers(
    engine: Engine, constraints: Mapping[str, Constraint], num_blocks: int = NUM_BLOCKS
) -> dict[str, Answer]:
    """Run one request for each constraint, half of them drawn; return what each gets."""
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_step_tokens=256,
        max_rows=MAX_ROWS,
        depth=2,
    )
    tokens = tokens_of(str(default_model_dir() / "tokenizer.json"))
    specs = []
    for number, (name, constraint) in enumerate(constraints.items(), start=1):
        prompt = f"<|im_start|>user\nWrite JSON: {name}.<|im_end|>\n<|im_start|>assistant\n"
        grammar = Constraint(kind=ConstraintKind.LLGUIDANCE, text=compiled(constraint, tokens))
        specs.append(
            RequestSpec(
                request_id=RequestId(number),
                prompt_ids=engine.tokenizer.encode(prompt, add_special_tokens=False).ids,
                sampling=SamplingParams(do_sample=number % 2 == 0, seed=number, temperature=1.2),
                stopping=StoppingParams(max_new_tokens=300),
                constraint=grammar,
            )
        )
    done = serve(engine, scheduler, specs, at_once=True)
    return {name: done[spec.request_id] for name, spec in zip(constraints, specs, strict=True)}


@pytest.mark.slow
def test_every_output_ends_and_validates(engine):
    found = answers(engine, {name: schema(document) for name, document in SCHEMAS.items()})
    assert len(found) >= 30
    for name, answer in found.items():
        assert answer.finish == FinishCode.EOS_TOKEN, (name, answer.text, answer.error)
        jsonschema.validate(
            json.loads(answer.text), SCHEMAS[name], format_checker=jsonschema.FormatChecker()
        )


@pytest.mark.slow
def test_outputs_that_give_way_to_others_validate_too(engine):
    """The pool holds a few rows at once: they leave in the midst of their output and come back."""
    names = ["flat", "nested", "array", "union of objects", "uuid", "reference"]
    found = answers(engine, {name: schema(SCHEMAS[name]) for name in names}, num_blocks=22)
    plenty = answers(engine, {name: schema(SCHEMAS[name]) for name in names})
    for name, answer in found.items():
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
        assert answer.finish == plenty[name].finish == FinishCode.EOS_TOKEN


def test_patterns_choices_and_grammars(engine):
    found = answers(
        engine,
        {
            "phone": regex(r"\+[0-9]{2} [0-9]{3} [0-9]{4}"),
            "answer": choice("positive", "negative", "ich weiß nicht 🙂"),
            "sum": lark('start: NUM "+" NUM "=" NUM\nNUM: /[0-9]{1,3}/'),
        },
    )
    assert re.fullmatch(r"\+[0-9]{2} [0-9]{3} [0-9]{4}", found["phone"].text)
    assert found["answer"].text in ("positive", "negative", "ich weiß nicht 🙂")
    assert re.fullmatch(r"[0-9]{1,3}\+[0-9]{1,3}=[0-9]{1,3}", found["sum"].text)
    assert all(answer.finish == FinishCode.EOS_TOKEN for answer in found.values())
