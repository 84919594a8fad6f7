"""Linears behind the pooling: vectors are what torch makes of transformers' own, by each pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_models import LONGEST, load_encoder, make_tiny_encoder
from tests.helpers.encoder_world import (
    BLOCK_SIZE,
    MAX_ROWS,
    MAX_STEP_TOKENS,
    NUM_BLOCKS,
    Text,
    specs_of,
    whole_scheduler,
)
from tests.helpers.tiny_models import VOCAB_SIZE
from tests.helpers.toy_paged_model import pooled
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import Pooling
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.dense import Projection, check_dense
from lorax_shard.model.loader import load_paged_model, read_config
from lorax_shard.model.vector_facts import read_vector_facts

HIDDEN = 48
OWN = "sentence_transformers.base.modules."
LINEARS = {
    "Tanh": torch.nn.Linear(HIDDEN, 24),
    "Identity": torch.nn.Linear(24, 12, bias=False),
}


def described(
    folder: Path, kinds: tuple[str, ...] = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
) -> Path:
    """Write the files of these steps, as sentence-transformers 6 does, and the weights of ``LINEARS``."""
    places = ["", *(f"{at}_{kind}" for at, kind in enumerate(kinds) if at)]
    types = [f"{OWN}{kind.lower()}.{kind}" for kind in kinds]
    steps = [{"path": place, "type": each} for place, each in zip(places, types, strict=True)]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    dense = [folder / place for place in places if "Dense" in place]
    for place, (name, linear) in zip(dense, LINEARS.items(), strict=False):
        write_dense(place, linear, f"torch.nn.modules.activation.{name}")
    return folder


def write_dense(folder: Path, linear: torch.nn.Linear, activation: str, **other: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "in_features": linear.in_features, "out_features": linear.out_features,
        "bias": linear.bias is not None, "activation_function": activation,
        "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**document, **other}))
    tensors = {f"linear.{name}": each.detach() for name, each in linear.named_parameters()}
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def test_vectors_are_projected_by_every_pooling(tmp_path: Path) -> None:
    folder = described(make_tiny_encoder("bert", tmp_path / "model"))
    config = ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"])
    assert read_vector_facts(folder, is_encoder=True).normalize
    paged = load_paged_model(config)
    projection = Projection.of(folder, paged.device)
    assert projection is not None
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = Engine(paged, tokenizer, pool, projection=projection)
    engine.warm_up(
        WarmupSpec(max_input_length=LONGEST, max_total_tokens=LONGEST + 1,
                   max_step_tokens=MAX_STEP_TOKENS, max_rows=MAX_ROWS)
    )  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    lengths = (1, 9, 30, 4, LONGEST, 12, 7)
    texts = [Text(torch.randint(VOCAB_SIZE, (n,), generator=draw).tolist()) for n in lengths]
    asked = specs_of(texts, tuple(Pooling))
    answers = serve(engine, whole_scheduler(0), asked, at_once=True)
    stock = load_encoder(folder)
    for text, spec in zip(texts, asked, strict=True):
        vector = pooled(
            stock(input_ids=torch.tensor([text.ids])).last_hidden_state[0], spec.pooling
        )
        if spec.pooling is not Pooling.EACH:
            vector = LINEARS["Identity"](torch.tanh(LINEARS["Tanh"](vector)))
        found = torch.frombuffer(
            bytearray(answers[spec.request_id].vector or b""), dtype=torch.float32
        )
        torch.testing.assert_close(found, vector, atol=1e-4, rtol=1e-4)


def test_a_folder_without_such_steps_has_no_projection(tmp_path: Path) -> None:
    described(tmp_path, ("Transformer", "Pooling"))
    assert Projection.of(tmp_path, torch.device("cpu")) is None
    check_dense(tmp_path, HIDDEN)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"activation_function": "my.own.Tanh"}, "names the activation 'my.own.Tanh'"),
        ({"activation_function": "torch.nn.modules.activation.Softplus"}, "Softplus"),
        ({"module_output_name": "token_embeddings"}, "other values than a text's vector"),
        ({"in_features": 40}, "it takes 40 numbers of 48"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_before_weights_are_read(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = described(make_tiny_encoder("bert", tmp_path / "model"))
    activation = {"activation": "torch.nn.modules.activation.Tanh"}
    if "activation_function" in other:
        activation = {"activation": other.pop("activation_function")}
    write_dense(folder / "2_Dense", LINEARS["Tanh"], **activation, **other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=words):
        read_config(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("Transformer", "Pooling", "Normalize", "Dense"), "has the steps"),
        (("Transformer", "Dense"), "has Dense without Pooling"),
    ],
)
def test_another_order_is_refused(kinds: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=words):
        read_vector_facts(described(tmp_path, kinds), is_encoder=True)


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        ("lost", ExitCode.MODEL_UNSUPPORTED, "does not exist; weights in other formats"),
        ("torn", ExitCode.MODEL_CORRUPT, "model.safetensors"),
        ("no bias", ExitCode.MODEL_CORRUPT, "it has not the bias"),
        ("other widths", ExitCode.MODEL_CORRUPT, "has not the widths"),
    ],
)
def test_damaged_weights_are_named(
    fault: str, exit_code: ExitCode, words: str, tmp_path: Path
) -> None:
    path = described(tmp_path) / "2_Dense/model.safetensors"
    linear = LINEARS["Tanh"]
    if fault == "lost":
        path.unlink()
    elif fault == "torn":
        path.write_bytes(path.read_bytes()[:40])
    elif fault == "no bias":
        save_file({"linear.weight": linear.weight.detach()}, path)
    else:
        save_file({"linear.weight": linear.weight.detach().T.contiguous()}, path)
    with pytest.raises(StartupError, match=words) as caught:
        Projection.of(tmp_path, torch.device("cpu"))
    assert caught.value.exit_code is exit_code


def test_a_pooling_that_was_not_fetched_is_no_mean(tmp_path: Path) -> None:
    (described(tmp_path) / "1_Pooling/config.json").unlink()
    with pytest.raises(StartupError, match="it is not there, and modules.json names it"):
        read_vector_facts(tmp_path, is_encoder=True)
