"""What computes by fused kernels in an encoder, and what stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.encoder_models import ENCODERS, make_tiny_encoder
from torch import nn

from lorax_shard.fused import install
from lorax_shard.fused.cpp import CppElementwise

CPU = torch.device("cpu")
KINDS = ("sums with norms", "norms", "activations", "rotary attentions")
# How many of each kind.
FORMS = {
    "albert": (0, 5, 2, 0),
    "bert": (4, 5, 2, 0),
    "deberta": (0, 0, 2, 0),
    "deberta-v2": (4, 6, 2, 0),
    "distilbert": (0, 5, 2, 0),
    "electra": (4, 5, 2, 0),
    "modernbert": (0, 7, 3, 3),
    "mpnet": (2, 5, 2, 0),
    "roberta": (4, 5, 2, 0),
    "xlm-roberta": (4, 5, 2, 0),
}

pytestmark = pytest.mark.skipif(
    CppElementwise.probe(CPU, torch.float32) is not None, reason="the kernels cannot run here"
)


def model_of(family: str, folder: Path) -> Any:
    made = make_tiny_encoder(family, folder)
    return transformers.AutoModel.from_pretrained(made).eval()


def states_of(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=ids).last_hidden_state
    return states


def installed(model: Any) -> Any:
    return install(model, "cpp", CPU, torch.float32, is_encoder=True)


def test_every_family_is_known() -> None:
    assert FORMS.keys() == ENCODERS.keys()


@pytest.mark.parametrize("family", sorted(FORMS))
def test_a_family_computes_the_same_until_its_own_code_is_back(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    own, classes = states_of(model), [type(module) for module in model.modules()]
    fused = installed(model)
    assert tuple(fused.counts[kind] for kind in KINDS) == FORMS[family]
    torch.testing.assert_close(states_of(model), own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert fused.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(states_of(model), own)


class Other(nn.Module):
    """An activation of no known form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() * x


def test_an_activation_of_another_form_stays(tmp_path: Path) -> None:
    model = model_of("bert", tmp_path)
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = Other()
    own = states_of(model)
    assert installed(model).counts["activations"] == 0
    torch.testing.assert_close(states_of(model), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["forward", "hook"])
def test_what_is_done_to_a_norm_is_done_in_its_sum(way: str, tmp_path: Path) -> None:
    model = model_of("bert", tmp_path)
    installed(model)
    plain = states_of(model)
    norm = model.encoder.layer[-1].output.LayerNorm
    if way == "hook":
        norm.register_forward_hook(lambda _module, _given, made: 2 * made)
    else:
        own = norm.forward
        norm.forward = lambda x: 2 * own(x)
    torch.testing.assert_close(states_of(model), 2 * plain)
