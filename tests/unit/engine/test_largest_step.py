"""The warm-up runs the largest step that the spec allows, in every respect at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from tests.helpers.toy_adapters import SlottedToy, ToyAdapter
from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel, new_row, toy_tokenizer
from torch.profiler import ProfilerActivity, profile

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import LogitBias, SamplingParams, WarmupSpec
from lorax_shard.engine import largest_step
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.largest_step import LargestStep
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.engine.rows import make_row
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.kernel import DrawKernel
from lorax_shard.sampling.sampler import Sampler


class NotingModel(ToyModel):
    """Notes the context lengths and the number of logit rows of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[list[int]] = []
        self.num_logits: list[int] = []

    def make_metadata(self, query_lens, context_lens, slots, block_tables, num_decode_rows):
        self.contexts.append(list(context_lens))
        return super().make_metadata(query_lens, context_lens, slots, block_tables, num_decode_rows)

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        self.passes.append(list(metadata.query_lens))
        self.num_logits.append(len(logit_rows))
        return torch.zeros(len(logit_rows), self.vocab_size)


def run(*, max_blocks=None, **values):
    spec = {"max_input_length": 32, "max_total_tokens": 41, "max_step_tokens": 16, "max_rows": 5}
    model = NotingModel()
    step = LargestStep(
        model,
        Sampler(model.vocab_size),
        WarmupSpec(**{**spec, **values}),
        block_size=BLOCK_SIZE,
        max_blocks=max_blocks,
    )
    step.run()
    return model


def test_all_tokens_and_rows_at_the_end_of_the_longest_sequence():
    model = run()
    assert model.passes == [[1, 1, 1, 1, 12]]
    # A resumed request may compute all but the last token of its output again.
    assert model.contexts == [[40] * 5]
    # Each row samples, and the prompt's other positions have logprobs.
    assert model.num_logits == [5 + 11]


def test_prompts_shorter_than_a_step_come_several_at_once():
    model = run(max_input_length=5, max_total_tokens=6, max_rows=6)
    assert model.passes == [[1, 1, 1, 3, 5, 5]]
    assert model.contexts == [[5] * 6]


def test_fewer_tokens_than_rows_still_make_a_step():
    assert run(max_step_tokens=3, max_rows=50).passes == [[1, 1, 1]]


def test_a_pool_of_few_blocks_bounds_the_sequences():
    model = run(max_blocks=4)
    assert model.contexts[0] == [16] * 5


def test_logits_of_prompts_are_no_more_than_one_pass_asks_for(monkeypatch):
    monkeypatch.setattr(largest_step, "MAX_PROMPT_LOGITS", 7)
    assert run(max_rows=3).num_logits == [3 + 7]


def test_single_tokens_read_no_more_together_than_backends_gather(monkeypatch):
    monkeypatch.setattr(largest_step, "_DECODE_CONTEXT", 20)
    assert run().contexts[0] == [5, 5, 5, 5, 40]


def test_neighbours_compute_with_different_adapters():
    model = SlottedToy()
    for slot in (3, 4):
        model.slots.load(slot, ToyAdapter(favourite=slot))
    spec = WarmupSpec(max_input_length=32, max_total_tokens=41, max_step_tokens=16, max_rows=5)
    sampler = Sampler(model.vocab_size)
    LargestStep(model, sampler, spec, block_size=BLOCK_SIZE, max_blocks=None).run()
    assert model.row_slots == [[3, 4, 3, 4, 3]]


def allocated_at_most(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that were alive at once while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("name", ["kernel", "tensors"])
def test_no_way_of_drawing_takes_more_than_the_largest_step_s(name):
    vocab_size, num_rows = 20_000, 8
    if name == "kernel" and (reason := DrawKernel.probe()):
        pytest.skip(reason)
    every = SamplingParams(
        do_sample=True, temperature=0.7, top_k=50, top_p=0.9, typical_p=0.9, min_p=0.05,
        repetition_penalty=1.2, frequency_penalty=0.2, presence_penalty=0.2, num_alternatives=5,
    )  # fmt: skip
    one_by_one = [
        replace(SamplingParams(), do_sample=True, **{name: getattr(every, name)})
        for name in ("top_k", "top_p", "typical_p", "min_p", "frequency_penalty")
    ]

    def peak(params: SamplingParams) -> int:
        rows = []
        for number in range(num_rows):
            new = new_row(number, range(50))
            new = replace(new, spec=replace(new.spec, sampling=params))
            rows.append(make_row(new, vocab_size=vocab_size))
        logits = torch.randn(num_rows, vocab_size)
        # A kernel of its own: it keeps what it once needed.
        method = DrawKernel() if name == "kernel" else draw_batch
        sampler = Sampler(vocab_size, method=method)
        with torch.inference_mode():
            return allocated_at_most(lambda: sampler.sample(logits.clone(), rows))

    largest = peak(largest_step._SAMPLING)
    assert largest >= 2 * num_rows * vocab_size * 4
    added = replace(every, logit_bias=LogitBias((3, 5), (1.0, 2.0)), watermark=True)
    for params in (every, added, replace(added, raw_logprobs=True), *one_by_one):
        # Beside the copies of the logits there is little.
        assert peak(params) <= largest + num_rows * vocab_size


def test_a_pool_that_cannot_be_had_is_said_in_words(monkeypatch):
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=11)
    model = NotingModel()
    engine = Engine(model, toy_tokenizer(), pool)
    allocate = model.allocate_cache

    def no_memory(num_blocks, block_size):
        if num_blocks == 11:
            raise MemoryError
        allocate(num_blocks, block_size)

    monkeypatch.setattr(model, "allocate_cache", no_memory)
    spec = WarmupSpec(max_input_length=8, max_total_tokens=16, max_step_tokens=8, max_rows=2)
    with pytest.raises(StartupError, match="11 blocks") as caught:
        engine.warm_up(spec)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
    assert engine.num_blocks == 0
