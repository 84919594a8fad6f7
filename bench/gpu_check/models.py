"""Models and adapters with random weights, made where they are used: nothing is fetched or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_shard.attention import registry
from lorax_shard.linear import install
from lorax_shard.lora import model as lora_model
from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.lora.sites import find_groups
from lorax_shard.model import attention_hook, elementwise
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.probe import survey_attention
from lorax_shard.model.probe_run import run_chunked

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """A Llama's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def linear_params(self) -> int:
        """Parameters of all linears but the head."""
        keys = self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * self.hidden + 2 * keys + 3 * self.inner)

    @property
    def head_params(self) -> int:
        """Parameters of the head."""
        return self.hidden * self.vocab

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


LLAMA_8B = LlamaShape(4096, 14336, 32, 32, 8, 128256)
LLAMA_1B = LlamaShape(2048, 8192, 16, 32, 8, 32768)
TINY = LlamaShape(64, 96, 1, 4, 2, 384)


def device_of(small: bool) -> torch.device:
    """Return where a stage computes."""
    return torch.device("cpu" if small else "cuda")


def llama_config(shape: LlamaShape, max_positions: int = 16384) -> object:
    """Return the transformers config of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=max_positions, rope_theta=500000.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@torch.inference_mode()
def build(
    shape: LlamaShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lora: str = "auto",
    attention: str = "auto",
) -> HFPagedModel:
    """Return a plugged random model on the device, ready for adapters."""
    from transformers import AutoModelForCausalLM

    attention_hook.register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            llama_config(shape), dtype=dtype, attn_implementation=attention_hook.ATTENTION_NAME
        )
    model = model.to(device).eval().requires_grad_(False)
    survey = survey_attention(model)
    backend = registry.create(attention, device, dtype, survey.layers(BLOCK_SIZE))
    paged = HFPagedModel(model, survey, backend)
    paged.linear_backend = install(model, "torch" if device.type == "cpu" else "auto", device)[0]
    elementwise.install(model, "auto", device, dtype)
    # Some tokens compile what was installed, as those of the load-time probe do.
    run_chunked(
        paged, [torch.zeros(n, dtype=torch.long, device=device) for n in (4, 1)], BLOCK_SIZE
    )
    paged.lora = lora_model.install(model, lora, device, dtype)
    paged.lora_backend = paged.lora.backend
    paged.warm_up(BLOCK_SIZE)
    return paged


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.inference_mode()
def load_adapters(
    model: HFPagedModel, ranks: Sequence[int], *, modules: Sequence[str] = (), first_slot: int = 0
) -> dict[int, int]:
    """Put adapters of these ranks into slots from ``first_slot`` on; return the bytes of each.

    ``modules`` are the last parts of the names of linears that have one; none: all but the head.
    """
    lora = model.lora
    assert lora is not None
    generator = torch.Generator(model.device).manual_seed(1 + first_slot)

    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=model.device, dtype=model.dtype)
        return values * 0.01

    groups = [
        (number, sites)
        for number, sites in enumerate(find_groups(lora.sites))
        if not any(site.is_head for site in sites)
        and (not modules or sites[0].name.rpartition(".")[2] in modules)
    ]
    sizes = {}
    for slot, rank in enumerate(ranks, first_slot):
        weights = {
            number: GroupWeights(
                draw(rank * len(sites), sites[0].in_features),
                tuple(draw(rank, site.out_features) for site in sites),
            )
            for number, sites in groups
        }
        adapter = PreparedAdapter(
            digest=f"random-{slot}", groups=weights, linears={}, embeddings={}, vectors={},
            num_logits=0, max_rank=rank,
        )  # fmt: skip
        lora.load(slot, adapter)
        sizes[slot] = adapter.nbytes
    return sizes
