"""Decode steps as CUDA graphs: each replay gives what the same step gives when it is launched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.model.graphs.decode import row_counts
from lorax_shard.model.graphs.recorder import CudaRecorder
from lorax_shard.model.graphs.trial import GraphTrial
from lorax_shard.model.interface import GraphSettings
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

MAX_ROWS, MAX_BLOCKS = 40, 32


# transformers computes experts without waiting for the device in bfloat16 alone.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("gemma2", "float32"), ("llama", "bfloat16"), ("gpt_oss", "bfloat16")],
)
def test_graphs_are_captured_and_give_the_logits_of_launches(
    family: str, dtype: str, tmp_path: Path
) -> None:
    make_tiny_model(family, tmp_path)
    model = load_paged_model(
        ShardConfig(
            model_id="tiny", model_dir=str(tmp_path), shard_uris=["unix:///unused"], device="cuda",
            dtype=dtype, attention_backend="triton", lora_backend="triton",
        )
    )  # fmt: skip
    model.warm_up(16)
    model.allocate_cache(200, 16)
    settings = GraphSettings(
        max_rows=MAX_ROWS, max_context=MAX_BLOCKS * 16, max_rank=16, max_slots=8
    )
    assert model.graph_bytes(settings) > 0
    model.capture_graphs(settings)
    assert model.graphs is not None
    assert model.lora is not None
    assert len(model.graphs._replays) == 2 * len(row_counts(MAX_ROWS))
    for num_rows in (1, 3, 17, MAX_ROWS):
        trial = GraphTrial(model._pool, num_rows, MAX_BLOCKS)
        with torch.inference_mode(), trial.filled_cache(), loaded_samples(model.lora, 8) as slots:
            for used in ([], slots):
                numbers = trial.numbers(used, model.vocab_size)
                found = model.graphs.run(numbers)
                assert found is not None
                expected = launched(model, numbers)
                # Products of another number of rows may round otherwise.
                allowed = 1e-4 if dtype == "float32" else 0.1
                torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)


def test_a_capture_that_fails_leaves_the_device_as_it_was(tmp_path: Path) -> None:
    """One that waits for the device: memory is given back afterwards, and others are captured."""
    stream = torch.cuda.Stream()
    recorder = CudaRecorder(stream)
    number = torch.ones(1, device="cuda")
    with pytest.raises(Exception, match="captur"):
        recorder.record(lambda: print(number.item()))
    large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - (64 << 20)
    torch.randn(1, device="cuda")
    replay = recorder.record(lambda: number.add_(1))  # type: ignore[arg-type,return-value]
    replay()
    torch.cuda.synchronize()
    # Once to warm up, once by the replay; the capture computes nothing.
    assert number.item() == 3
