"""The embedded model, really computed: what rows report of prompts, add to logits, and show.

Beside stock transformers on the same weights, with chunked prompts and preemptions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.toy_paged_model import new_row
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lorax_contract.config import ShardConfig
from lorax_contract.step import FinishCode, LogitBias, OutputKind, RequestSpec, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_BLOCKS = 12
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "Die Straße über den Fluß: naïve café Ω",
    "你好世界, 漢字 and かな are scripts of",
    "مرحبا بالعالم, שלום is how one says",
    "नमस्ते 🙂👩‍👩‍👧🇫🇷 emoji",
]


@pytest.fixture(scope="module")
def path() -> Path:
    """The folder of the model."""
    return default_model_dir()


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_file(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def stock(path: Path) -> torch.nn.Module:
    """The model as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(path: Path, tokenizer: Tokenizer) -> Engine:
    """The model as it is served, with a cache so small that rows give way."""
    config = ShardConfig(model_dir=str(path), model_id="default", shard_uris=["unix:///unused"])
    pool = PoolSettings(block_size=4, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
    engine = Engine(load_paged_model(config), tokenizer, pool)
    engine.warm_up(
        WarmupSpec(max_input_length=36, max_total_tokens=48, max_step_tokens=16, max_rows=8)
    )
    return engine


def run(engine: Engine, specs: list[RequestSpec]) -> tuple[list[Answer], int]:
    """Serve requests at once; return their answers and how often one gave way."""
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=4, max_step_tokens=16, max_rows=8, depth=2
    )
    answers = serve(engine, scheduler, specs, at_once=True)
    return [answers[spec.request_id] for spec in specs], scheduler.stats().num_preemptions


def own_logprobs(stock: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return transformers' logprobs at each position."""
    with torch.inference_mode():
        return torch.log_softmax(stock(torch.tensor([ids])).logits[0].double(), dim=-1)


def test_prompts_report_what_transformers_computes(
    engine: Engine, stock: torch.nn.Module, tokenizer: Tokenizer
) -> None:
    """Logprobs and the likeliest tokens, hence whether a prompt is what would be generated."""
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    specs = [
        new_row(
            number + 1, ids, max_new_tokens=0 if number % 2 else 16, ignore_eos=True,
            prompt_logprobs=True, num_prompt_alternatives=5,
        ).spec
        for number, ids in enumerate(prompts)
    ]  # fmt: skip
    answers, num_preemptions = run(engine, specs)
    assert num_preemptions > 0
    largest = 0.0
    for spec, answer in zip(specs, answers, strict=True):
        ids = list(spec.prompt_ids)
        assert answer.finish is FinishCode.LENGTH
        assert len(answer.tokens.ids) == spec.stopping.max_new_tokens
        assert answer.prompt_tokens is not None and answer.prompt_tokens.ids == ids
        own = own_logprobs(stock, ids)
        assert not answer.prompt_alternatives[0].ids
        for at in range(1, len(ids)):
            expected = own[at - 1]
            logprob = answer.prompt_tokens.logprobs[at]
            assert logprob == pytest.approx(float(expected[ids[at]]), abs=1e-3)
            largest = max(largest, abs(logprob - float(expected[ids[at]])))
            some = answer.prompt_alternatives[at]
            wanted = expected[torch.tensor(some.ids)]
            assert some.logprobs == pytest.approx(wanted.tolist(), abs=1e-3)
            # The k likeliest, but for those that differ by no more than rounding.
            least = float(expected.topk(5).values[-1])
            assert len(some.ids) == 5 and float(wanted.min()) >= least - 1e-3
            # Whether a greedy row would have gone on so.
            is_greedy = some.ids[0] == ids[at]
            gap = float(expected.max() - expected[ids[at]])
            assert is_greedy == (gap == 0.0) or abs(gap) < 1e-3
    print(f"largest difference of logprobs {largest:.1e}, {num_preemptions} preemptions")


def test_biases_and_least_lengths_hold(engine: Engine, tokenizer: Tokenizer) -> None:
    """Greedy and drawn, beside rows without them, which they leave as they are."""
    prompt = tokenizer.encode(TEXTS[0]).ids
    (plain,), _ = run(engine, [new_row(1, prompt, max_new_tokens=8, ignore_eos=True).spec])
    banned = plain.tokens.ids[0]
    eos = next(iter(engine.model.eos_token_ids))
    rows = [
        new_row(1, prompt, max_new_tokens=8, ignore_eos=True),
        new_row(2, prompt, max_new_tokens=8, logit_bias=LogitBias((banned,), (-100.0,))),
        new_row(3, prompt, max_new_tokens=8, logit_bias=LogitBias((banned,), (100.0,))),
        new_row(4, prompt, max_new_tokens=12, min_new_tokens=5,
                logit_bias=LogitBias((eos,), (100.0,))),
        new_row(5, prompt, max_new_tokens=12, min_new_tokens=5, do_sample=True, seed=3,
                logit_bias=LogitBias((eos,), (100.0,)), stop_sequences=(" ",)),
        new_row(6, prompt, max_new_tokens=6, watermark=True, raw_logprobs=True),
    ]  # fmt: skip
    answers, _ = run(engine, [row.spec for row in rows])
    assert answers[0].tokens.ids == plain.tokens.ids
    assert banned not in answers[1].tokens.ids
    assert answers[2].tokens.ids == [banned] * 8
    for answer in answers[3:5]:
        assert len(answer.tokens.ids) == 6
        assert answer.tokens.ids.index(eos) == 5
        assert answer.finish is FinishCode.EOS_TOKEN
    assert all(logprob <= 0.0 for logprob in answers[5].tokens.logprobs)


def test_texts_of_plain_tokens_add_up_wherever_they_are_cut(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    """Five scripts, prompts cut within characters, 1 to 12 tokens, stop strings."""
    specs = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        for limit in range(1, 13):
            row = new_row(
                len(specs) + 1, ids[: 4 + limit], max_new_tokens=limit, do_sample=True,
                temperature=3.0, seed=limit, stop_sequences=("e", "the", "世") if limit % 3 else (),
            )  # fmt: skip
            specs.append(row.spec)
    answers, _ = run(engine, specs)
    for answer in answers:
        tokens = answer.tokens
        plain = (text for text, special in zip(tokens.texts, tokens.special, strict=True)
                 if not special)  # fmt: skip
        assert "".join(plain) == answer.text


def test_a_row_without_tokens_leaves_its_neighbours_alone(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    with_others = [
        new_row(number, ids, max_new_tokens=6 if number % 2 else 0, ignore_eos=True).spec
        for number, ids in enumerate(prompts, start=1)
    ]
    answers, _ = run(engine, with_others)
    alone, _ = run(engine, [each for each in with_others if each.output is OutputKind.TOKENS])
    kept = [each for each in answers if each.tokens.ids]
    assert [each.tokens.ids for each in kept] == [each.tokens.ids for each in alone]
