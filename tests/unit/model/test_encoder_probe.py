"""The load-time probe of encoders: windows near and far, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.encoder_faults import fewer_groups, fewer_rows
from tests.helpers.encoder_models import ENCODERS, make_tiny_encoder

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import ragged, whole
from lorax_shard.attention.ragged import encoder_attention
from lorax_shard.model.encoder import EncoderModel
from lorax_shard.model.loader import load_paged_model

# A window that rows of the probe pass, and one that only a miniature's do.
WINDOWS = (8, 600)


def config_of(folder: Path) -> ShardConfig:
    return ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"])


def refusal_of(folder: Path) -> StartupError:
    with pytest.raises(StartupError) as caught:
        load_paged_model(config_of(folder))
    assert caught.value.exit_code is ExitCode.MODEL_MISMATCH
    return caught.value


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_passed_by_some_row(
    window: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_encoder(
        "modernbert", tmp_path, local_attention=window, max_position_embeddings=2048
    )
    load_paged_model(config_of(folder))
    assert "no row of the probe went beyond" not in caplog.text


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_that_is_ignored_is_found(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(
        "modernbert", tmp_path, local_attention=window, max_position_embeddings=2048
    )
    for backend in (ragged.RaggedAttention, whole.WholeAttention):
        attend = backend.attend

        def without(*args, attend=attend):
            *before, spec, metadata = args
            return attend(*before, spec._replace(window=None), metadata)

        monkeypatch.setattr(backend, "attend", without)
    assert ("on a miniature" in str(refusal_of(folder))) == (window == max(WINDOWS))


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_wrong_positions_are_found(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(family, tmp_path)
    found = EncoderModel._positions

    def shifted(self: EncoderModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # But for the last ones of long texts, beyond which the model has none.
        return found(self, ids, positions) + ((positions > 0) & (positions < 20))

    monkeypatch.setattr(EncoderModel, "_positions", shifted)
    refusal_of(folder)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_attention_over_several_rows_is_found(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(family, tmp_path)
    monkeypatch.setattr(ragged, "_rows_of", fewer_rows)
    monkeypatch.setattr(whole, "_groups", fewer_groups)
    refusal_of(folder)


@pytest.mark.parametrize(
    ("option", "name"), [("attention_backend", "sdpa"), ("elementwise_backend", "triton")]
)
def test_a_named_backend_of_decoders_is_refused(option: str, name: str, tmp_path: Path) -> None:
    folder = make_tiny_encoder("bert", tmp_path)
    with pytest.raises(StartupError, match=f"{name} computes decoders") as caught:
        load_paged_model(replace(config_of(folder), **{option: name}))
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE


def test_a_backend_that_is_what_encoders_have_is_taken(tmp_path: Path) -> None:
    config = replace(config_of(make_tiny_encoder("bert", tmp_path)), elementwise_backend="torch")
    paged = load_paged_model(config)
    own = encoder_attention(torch.device("cpu"), torch.float32)
    assert (paged.attention_backend, paged.elementwise_backend) == (own.name, "torch")
