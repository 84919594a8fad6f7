"""What computes by fused kernels in a model, and what stays as it is."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import pytest
import torch
from tests.helpers.fused_models import adapted_logits, logits_of, make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fused import install
from lorax_shard.fused.backend import GateFunction
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.fused.registry import BACKENDS
from lorax_shard.lora import model as lora
from lorax_shard.model.families import TESTED_FAMILIES

CPU = torch.device("cpu")
# Norms, gated MLPs, rotary attentions and activations of two layers.
FORMS = {
    "cohere": (0, 2, 2, 0),
    "cohere2": (0, 2, 2, 0),
    "deepseek_v2": (9, 2, 0, 0),
    "deepseek_v3": (9, 2, 2, 0),
    "gemma": (5, 2, 2, 0),
    "gemma2": (9, 2, 2, 0),
    "gemma3_text": (13, 2, 2, 0),
    "glm4": (9, 2, 2, 0),
    "gpt2": (0, 0, 0, 2),
    "gpt_bigcode": (0, 0, 0, 0),
    "gpt_neox": (0, 0, 2, 0),
    "gpt_oss": (5, 0, 2, 0),
    "granite": (5, 2, 2, 0),
    "granitemoe": (5, 0, 2, 0),
    "llama": (5, 2, 2, 0),
    "llama4_text": (5, 2, 0, 0),
    "mistral": (5, 2, 2, 0),
    "mixtral": (5, 0, 2, 0),
    "olmo2": (9, 2, 2, 0),
    "olmoe": (9, 0, 2, 0),
    "opt": (0, 0, 0, 0),
    "phi": (0, 0, 2, 2),
    "phi3": (5, 2, 2, 0),
    "qwen2": (5, 2, 2, 0),
    "qwen2_moe": (5, 2, 2, 0),
    "qwen3": (9, 2, 2, 0),
    "qwen3_moe": (9, 0, 2, 0),
    "smollm3": (5, 2, 2, 0),
    "starcoder2": (0, 0, 2, 0),
}
KINDS = ("norms", "gated MLPs", "rotary attentions", "activations")

pytestmark = pytest.mark.skipif(
    CppElementwise.probe(CPU, torch.float32) is not None, reason="the kernels cannot run here"
)


def test_every_tested_family_is_known() -> None:
    assert FORMS.keys() == TESTED_FAMILIES


@pytest.mark.parametrize("family", sorted(FORMS))
def test_a_family_computes_the_same_until_its_own_code_is_back(family: str) -> None:
    model = make_model(family)
    own, classes = logits_of(model), [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    fused = install(model, "cpp", CPU, torch.float32)
    assert tuple(fused.counts[kind] for kind in KINDS) == FORMS[family]
    assert fused.is_active == any(FORMS[family])
    torch.testing.assert_close(logits_of(model), own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(module).__name__ for module in model.modules()] == [
        each.__name__ for each in classes
    ]
    assert fused.undo() == any(FORMS[family])
    assert fused.backend == "torch"
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits_of(model), own)
    assert not fused.undo()


class Dispatched(TorchDispatchMode):
    """Counts what torch computes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not any(a.alias_info for a in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_a_layer_has_less_than_half_of_its_operations() -> None:
    model = make_model("llama")

    def of_a_layer() -> int:
        numbers = []
        for layers in (2, 1):
            model.config.num_hidden_layers = layers
            with Dispatched() as dispatched:
                logits_of(model)
            numbers.append(dispatched.number)
        return numbers[0] - numbers[1]

    own = of_a_layer()
    install(model, "cpp", CPU, torch.float32)
    # Seven products, attention, two sums, and what kernels write to: two norms, a gate, q and k.
    fused = of_a_layer()
    assert own - fused >= 18
    assert fused < own / 2


def test_another_model_of_the_family_keeps_its_own_code() -> None:
    fused, other = make_model("llama"), make_model("llama")
    own = logits_of(other)
    install(fused, "cpp", CPU, torch.float32)
    assert torch.equal(logits_of(other), own)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("auto", torch.bfloat16)])
def test_a_model_keeps_its_own_code(backend: str, dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    classes = [type(module) for module in model.modules()]
    fused = install(model, backend, CPU, dtype)
    assert [type(module) for module in model.modules()] == classes
    assert not fused.is_active


class MeanNorm(nn.Module):
    """Looks like an RMS norm, and takes the mean off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class ReluMlp(nn.Module):
    """Has the names of a gated MLP, and another activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


class Ungated(ReluMlp):
    """Uses its linears in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))


class TwoInputs(MeanNorm):
    """A norm that is called with something else."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


def apply_rotary_pos_emb(q, k, cos, sin):
    return q * cos.unsqueeze(1) - sin.unsqueeze(1), k


class OtherRotation(nn.Module):
    """Calls a function of the usual name, which does something else."""

    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize(
    "module",
    [
        MeanNorm(12), TwoInputs(12), ReluMlp(12), Ungated(12), OtherRotation(),
        nn.LayerNorm(12), nn.LayerNorm(12, bias=False), nn.RMSNorm(12), nn.Linear(12, 12),
        nn.GELU(), nn.GELU(approximate="tanh"), nn.Identity(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_what_computes_something_else_stays(module: nn.Module) -> None:
    own = type(module)
    fused = install(nn.Sequential(module), "cpp", CPU, torch.float32)
    assert type(module) is own
    assert fused.counts == Counter()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_adapters_change_fused_modules_as_they_change_a_model_s_own(family: str) -> None:
    plain, model = make_model(family), make_model(family)
    expected = adapted_logits(plain, lora.install(plain, "torch", CPU, torch.float32))
    fused = install(model, "cpp", CPU, torch.float32)
    slots = lora.install(model, "torch", CPU, torch.float32)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(adapted_logits(model, slots), expected, rtol=0, atol=tolerance)
    # Also where a model gets its own code back beneath what adapters have put on it.
    fused.undo()
    for slot in (0, 1):
        slots.unload(slot)
    assert torch.equal(adapted_logits(model, slots), expected)


def test_an_unknown_name_is_refused_with_the_names() -> None:
    with pytest.raises(StartupError, match="choose auto or one of triton, cpp, torch") as caught:
        install(nn.Linear(2, 2), "fast", CPU, torch.float32)
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, torch.bfloat16, "computes float32, not bfloat16"),
        (torch.device("cuda"), torch.float32, "computes on a CPU, not on cuda"),
    ],
)
def test_a_named_backend_that_cannot_run_is_refused_with_the_reason(
    device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(StartupError, match=reason):
        install(nn.Linear(2, 2), "cpp", device, dtype)


class Broken(CppElementwise):
    """A backend whose kernels are not what they should be."""

    wrong: Exception | float = 0.0

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: GateFunction) -> torch.Tensor:
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return super().gated(gate, up, activation) + self.wrong


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            RuntimeError("no image for this device\nmore"),
            "fail .RuntimeError: no image for this dev",
        ),
        (0.01, "its gate is 0.01 away from torch's"),
        (float("nan"), "its gate is nan away from torch's"),
    ],
)
def test_a_backend_that_fails_its_trial_is_passed_over_or_refused(
    wrong: Exception | float,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Broken, "wrong", wrong)
    monkeypatch.setattr(BACKENDS, "load", lambda name: Broken)
    model = make_model("llama")
    assert not install(model, "auto", CPU, torch.float32).is_active
    assert re.search(words, caplog.text)
    assert "The model's own code computes" in caplog.text
    with pytest.raises(StartupError, match=words) as caught:
        install(model, "cpp", CPU, torch.float32)
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE


def test_auto_says_what_it_skipped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert BACKENDS.create("auto", CPU, torch.bfloat16).name == "torch"
        assert BACKENDS.create("auto", CPU, torch.float32).name == "cpp"
    assert "elementwise backend: torch (not cpp: it computes float32, not bfloat16)" in caplog.text
