"""Layers whose sums are computed together with the norms at their sides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.helpers.fused_models import adapted_logits, logits_of, make_model
from tests.helpers.fused_together import NAME, FusedTogether, together  # noqa: F401 - a fixture
from torch import nn

from lorax_shard.fused import install
from lorax_shard.lora import model as lora
from lorax_shard.model.families import TESTED_FAMILIES

CPU = torch.device("cpu")
# Of two layers.
LAYERS = {
    **dict.fromkeys(TESTED_FAMILIES, 2),
    "granitemoe": 0,
    # LayerNorm, or attention and MLP beside each other.
    **dict.fromkeys(
        ["cohere", "cohere2", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "phi", "starcoder2"], 0
    ),
}


pytestmark = pytest.mark.usefixtures("together")


def close(found: torch.Tensor, own: torch.Tensor) -> None:
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES))
def test_a_family_computes_the_same_with_chained_layers(family: str) -> None:
    model = make_model(family)
    own, classes = logits_of(model), [type(module) for module in model.modules()]
    fused = install(model, NAME, CPU, torch.float32)
    assert fused.counts["decoder layers"] == LAYERS[family]
    close(logits_of(model), own)
    fused.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits_of(model), own)


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 1), ("gemma2", 1), ("glm4", 1), ("granite", 1), ("olmo2", 4)]
)
def test_norms_beside_sums_are_computed_with_them(
    family: str,
    norms: int,
    together: type[FusedTogether],  # noqa: F811
) -> None:
    """Left alone are the first of all, and those of queries and keys."""
    model = make_model(family)
    install(model, NAME, CPU, torch.float32)
    together.calls.clear()
    logits_of(model)
    assert (together.calls["add_norms"], together.calls["rms_norm"]) == (4, norms)


@torch.inference_mode()
def hidden_states_of(model: Any) -> list[torch.Tensor]:
    """Return all that the layers took and returned, and what the last norm made of it."""
    ids = torch.arange(40).view(1, 40) % 300
    return list(model(ids, use_cache=False, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "granite"])
def test_what_layers_return_is_what_it_was_for_whoever_looks_at_it(family: str) -> None:
    model = make_model(family)
    own = hidden_states_of(model)
    install(model, NAME, CPU, torch.float32)
    for found, expected in zip(hidden_states_of(model), own, strict=True):
        close(found, expected)


def sneak_into_layers(model: Any) -> None:
    """Change what a layer returns, and what a norm is given, as hooks do."""
    layers = model.model.layers
    layers[0].register_forward_hook(lambda _layer, _given, output: output * 1.5)
    layers[1].register_forward_hook(lambda _layer, _given, output: output.add(0.25))
    for name, norm in layers[1].named_children():
        if name.startswith("post_"):
            norm.register_forward_pre_hook(lambda _norm, given: (given[0] - 0.5,))
            norm.register_forward_hook(lambda _norm, _given, output: output * 0.9)


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "olmo2"])
def test_hooks_on_layers_and_norms_take_effect(family: str) -> None:
    plain, model = make_model(family), make_model(family)
    unhooked = logits_of(plain)
    assert install(model, NAME, CPU, torch.float32).counts["decoder layers"] == 2
    sneak_into_layers(plain)
    sneak_into_layers(model)
    own = logits_of(plain)
    assert not torch.allclose(own, unhooked, atol=0.01)
    close(logits_of(model), own)


def test_fewer_layers_than_there_are_compute_the_same() -> None:
    model = make_model("llama")
    model.config.num_hidden_layers = 1
    own = logits_of(model)
    install(model, NAME, CPU, torch.float32)
    close(logits_of(model), own)


class OtherLayer(nn.Module):
    """Has the names of a decoder layer; ``compute`` says what it does with them."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RmsNormLike(12), RmsNormLike(12)
        self.self_attn, self.mlp, self.compute = nn.Identity(), nn.Identity(), compute

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return self.compute(self, hidden_states, kwargs)


class RmsNormLike(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def usual(layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x))


def scaled(layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    x = x + 0.5 * layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x))


def beside_each_other(layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
    return x + attended + layer.mlp(layer.post_attention_layernorm(x))


def from_what_is_normed(layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    normed = layer.input_layernorm(x)
    x = normed + layer.self_attn(hidden_states=normed, **kwargs)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x))


def told_something_else(layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    return usual(layer, x, {**kwargs, "is_last": True})


def two_results(layer: Any, x: torch.Tensor, kwargs: Any) -> tuple[torch.Tensor, None]:
    return usual(layer, x, kwargs), None


@pytest.mark.parametrize(
    ("compute", "is_known"),
    [
        (usual, True), (scaled, False), (beside_each_other, False), (from_what_is_normed, False),
        (told_something_else, False), (two_results, False),
    ],
)  # fmt: skip
def test_a_layer_is_known_by_what_it_computes(compute: Any, is_known: bool) -> None:
    layer = OtherLayer(compute)
    own = type(layer)
    fused = install(nn.Sequential(nn.ModuleList([layer])), NAME, CPU, torch.float32)
    assert fused.counts == Counter({"norms": 2} | ({"decoder layers": 1} if is_known else {}))
    assert (type(layer) is own) is not is_known
    # What stood in for them is gone.
    assert "forward" not in layer.self_attn.__dict__
    assert "forward" not in layer.mlp.__dict__


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "olmo2", "qwen3"])
def test_adapters_of_norms_change_chained_layers_as_they_change_a_model_s_own(family: str) -> None:
    plain, model = make_model(family), make_model(family)
    expected = adapted_logits(plain, lora.install(plain, "torch", CPU, torch.float32))
    assert install(model, NAME, CPU, torch.float32).counts["decoder layers"] == 2
    slots = lora.install(model, "torch", CPU, torch.float32)
    close(adapted_logits(model, slots), expected)


# Triton's interpreter computes in numpy.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_16_bits_are_those_of_norms_apart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton does not run on this platform")
    from lorax_shard.fused.triton.backend import TritonElementwise

    logits = []
    for adds_with_norms in (False, True):
        monkeypatch.setattr(TritonElementwise, "adds_with_norms", adds_with_norms)
        model = make_model(family).to(torch.float16)
        fused = install(model, "triton", CPU, torch.float16)
        assert fused.counts["decoder layers"] == (2 if adds_with_norms else 0)
        logits.append(logits_of(model, num_tokens=4))
    assert torch.equal(*logits)
