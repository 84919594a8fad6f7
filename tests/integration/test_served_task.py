"""``--task``: a model as its backbone gives that one's vectors; one without the head is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.coded_models import store_coded
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_models import make_tiny_encoder
from tests.helpers.encoder_world import whole_scheduler
from tests.helpers.rank_models import read_parts
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tests.helpers.toy_paged_model import pooled
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig, Task
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model, read_config

LENGTHS = (1, 9, 17, 4)


def config_of(folder: Path, task: Task) -> ShardConfig:
    return ShardConfig(
        model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"], task=task
    )


def vectors(config: ShardConfig, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return the mean of each text's states, as an engine over the loaded model gives it."""
    paged = load_paged_model(config)
    assert not paged.generates
    assert (paged.head("sequence"), paged.head("tokens")) == (None, None)
    tokenizer = Tokenizer.from_file(f"{config.model_dir}/tokenizer.json")
    pool = PoolSettings(block_size=4, memory_fraction=0.5, num_blocks=200)
    engine = Engine(paged, tokenizer, pool)
    engine.warm_up(
        WarmupSpec(max_input_length=30, max_total_tokens=31, max_step_tokens=100, max_rows=8)
    )
    specs = [
        RequestSpec(
            request_id=RequestId(number), prompt_ids=ids, sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=0), output=OutputKind.VECTOR,
            pooling=Pooling.MEAN,
        )
        for number, ids in enumerate(texts, start=1)
    ]  # fmt: skip
    answers = serve(engine, whole_scheduler(0), specs, at_once=True)
    found = [answers[spec.request_id].vector or b"" for spec in specs]
    return [torch.frombuffer(bytearray(each), dtype=torch.float32) for each in found]


def saved(root: Path, around: str) -> Path:
    """Save a tiny encoder with a head, or a causal model, to a folder."""
    if around == "CausalLM":
        return make_tiny_model("llama", root)
    return make_tiny_encoder("bert", root, around=around)


@pytest.mark.parametrize("around", ["CausalLM", "SequenceClassification", "MaskedLM"])
def test_a_model_that_shall_embed_is_its_backbone(around: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, around)
    check_backbone(folder, folder)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_quantized_checkpoint_embeds_too(name: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "head_dim": 8}
    folder = make_tiny_model("llama", tmp_path / "model", **shape)
    # What it is stored in is decoded to the numbers that the first folder has from then on.
    coded = store_coded(folder, name)
    check_backbone(coded, folder)


def test_ranks_read_the_backbone_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(config_of(saved(tmp_path, "CausalLM"), "embed"), adapters=True)
    for part in read_parts(config, 2):
        assert not part.paged.generates
        assert type(part.loaded.whole).__name__ == "LlamaModel"


@torch.no_grad()
def check_backbone(folder: Path, plain: Path) -> None:
    """Fail unless a folder's vectors are those of transformers' backbone of the ``plain`` one."""
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(VOCAB_SIZE, (n,), generator=draw).tolist() for n in LENGTHS]
    stock: Any = transformers.AutoModel.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    found = vectors(config_of(folder, "embed"), texts)
    for ids, vector in zip(texts, found, strict=True):
        states = stock.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(vector, pooled(states, Pooling.MEAN), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("around", "task"),
    [
        ("CausalLM", "auto"),
        ("CausalLM", "generate"),
        ("SequenceClassification", "classify"),
        ("TokenClassification", "token-classify"),
    ],
)
def test_a_task_that_the_model_is_for_changes_nothing(
    around: str, task: Task, tmp_path: Path
) -> None:
    folder = saved(tmp_path, around)
    plain = read_config(folder, trust_remote_code=False)
    assert read_config(folder, trust_remote_code=False, task=task).to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    ("around", "task", "words"),
    [
        ("CausalLM", "classify", "LlamaForCausalLM has no classification head"),
        ("CausalLM", "rerank", "LlamaForCausalLM has no classification head"),
        ("MaskedLM", "generate", "BertForMaskedLM has no head that makes tokens"),
        ("MaskedLM", "token-classify", "BertForMaskedLM has no classification head"),
        ("SequenceClassification", "token-classify", r"one for texts \(--task classify\)"),
        ("TokenClassification", "classify", r"one for tokens \(--task token-classify\)"),
        ("SequenceClassification", "rerank", "a head with one label, and its own has 2"),
    ],
)
def test_a_task_without_its_head_is_refused(
    around: str, task: Task, words: str, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        load_paged_model(config_of(saved(tmp_path, around), task))
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert f"--task {task}" in str(caught.value)


def test_a_head_with_one_label_ranks(tmp_path: Path) -> None:
    folder = make_tiny_encoder("bert", tmp_path, around="SequenceClassification", num_labels=1)
    config = config_of(folder, "rerank")
    assert load_paged_model(config).head("sequence") is not None
    assert load_paged_model(dataclasses.replace(config, task="embed")).head("sequence") is None
