"""Tiny models of several families with adapters: the device beside the CPU reference.

The reference computes the same weights in the same dtype by the ``torch`` backends. In 16 bits
two right answers differ by rounding, and a router of experts may turn over where two are nearly
as good; there the median token counts, in float32 every token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench.gpu_check.models import BLOCK_SIZE, device_of
from bench.gpu_check.report import FAILED, Report
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import Device, ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import registry as attention
from lorax_shard.lora import registry as lora
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.sites import Kind
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "gpt_oss", "phi3")
RANKS = (4, 1, 16)
# Largest ||got - reference|| / ||reference|| of a token's logits, as it is counted.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
# Rows are prompts of these lengths; then each decodes one token.
LENGTHS = (19, 1, 7, 33, 12)
SLOTS = (0, None, 1, 2, 0)


class Choice(NamedTuple):
    """Backends that compute together."""

    attention: str
    lora: str


def run(report: Report, *, small: bool) -> None:
    """Compare every family, dtype and pair of backends."""
    device = device_of(small)
    report.table(
        "Error of a token's logits",
        ("model", "dtype", "attention", "LoRA", "median", "largest", "counted", "allowed"),
    )
    wrong = []
    for family in FAMILIES[:1] if small else FAMILIES:
        for dtype, allowed in TOLERANCES.items():
            with tempfile.TemporaryDirectory() as folder:
                model_dir = make_tiny_model(family, Path(folder) / family)
                expected = logits_of(model_dir, "cpu", dtype, Choice("torch", "torch"))
                for choice in choices(device, dtype, small):
                    try:
                        got = logits_of(model_dir, device.type, dtype, choice)
                    except StartupError as error:
                        if error.exit_code is not ExitCode.BACKEND_UNAVAILABLE:
                            raise
                        report.note(f"{family}: {error}")
                        continue
                    error = errors(got, expected)
                    exact = dtype is torch.float32
                    counted = float(error.max() if exact else error.median())
                    report.row(
                        family, str(dtype)[6:], *choice, float(error.median()),
                        float(error.max()), "largest" if exact else "median", allowed,
                    )  # fmt: skip
                    if not counted <= allowed:
                        wrong.append(f"{family} {str(dtype)[6:]} {'+'.join(choice)}: {counted:.2g}")
    if wrong:
        report.end(FAILED, f"too far from the reference: {'; '.join(wrong)}")


def choices(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Choice]:
    """Yield each attention backend that runs here with the best LoRA backend, and the others."""
    loras = [name for name in lora.BACKENDS if lora.probe(name, device, dtype) is None]
    attentions = [
        name for name in attention.BACKENDS if attention.probe(name, device, dtype) is None
    ]
    if small:
        attentions, loras = ["sdpa"], loras[:1]
    for name in attentions:
        yield Choice(name, loras[0])
    for name in loras[1:]:
        yield Choice(attentions[0], name)


def logits_of(
    model_dir: Path, device: Device | str, dtype: torch.dtype, choice: Choice
) -> torch.Tensor:
    """Return the logits of all tokens: two ragged steps of prompts, then one of decodes."""
    config = ShardConfig(
        model_dir=str(model_dir), model_id="tiny", shard_uris=["unix:/unused"],
        device="cuda" if device == "cuda" else "cpu", dtype=str(dtype)[6:],
        attention_backend=choice.attention, lora_backend=choice.lora, linear_backend="torch",
    )  # fmt: skip
    model = load_paged_model(config)
    assert model.lora is not None
    for slot, rank in enumerate(RANKS):
        model.lora.load(slot, adapter(model.lora, rank, slot))
    return drive(model)


def adapter(model: LoraModel, rank: int, seed: int) -> HostAdapter:
    """Return a random adapter of all linears but the head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    modules = {
        name: ModuleDelta(
            a=draw(rank, site.in_features) * site.in_features**-0.5,
            b=draw(site.out_features, rank) * rank**-0.5,
            scaling=0.5,
        )
        for name, site in model.sites.items()
        if site.kind is Kind.LINEAR and not site.is_head
    }
    return HostAdapter(digest=f"random-{seed}", modules=modules)


def drive(model: HFPagedModel) -> torch.Tensor:
    """Compute every row in three steps and return all logits on the CPU."""
    blocks = -(-(max(LENGTHS) + 1) // BLOCK_SIZE)
    model.allocate_cache(len(LENGTHS) * blocks, BLOCK_SIZE)
    # Scattered, so that a wrong table shows.
    order = torch.randperm(len(LENGTHS) * blocks, generator=torch.Generator().manual_seed(5))
    tables = order.view(len(LENGTHS), blocks)
    draw = torch.Generator().manual_seed(6)
    ids = [torch.randint(1, model.vocab_size, (n + 1,), generator=draw) for n in LENGTHS]
    done = [0] * len(LENGTHS)
    logits: list[torch.Tensor] = []
    halves = [max(1, n // 2) for n in LENGTHS]
    rest = [n - half for n, half in zip(LENGTHS, halves, strict=True)]
    for counts in (halves, rest, [1] * len(LENGTHS)):
        rows = sorted((row for row, n in enumerate(counts) if n), key=lambda row: counts[row] > 1)
        logits.append(step(model, tables, ids, done, {row: counts[row] for row in rows}))
    return torch.cat(logits)


def step(
    model: HFPagedModel,
    tables: torch.Tensor,
    ids: list[torch.Tensor],
    done: list[int],
    counts: dict[int, int],
) -> torch.Tensor:
    """Compute the next ``counts[row]`` tokens of each row, single tokens first."""
    rows, device = list(counts), model.device
    spans = [torch.arange(done[row], done[row] + counts[row]) for row in rows]
    slots = [
        tables[row][span // BLOCK_SIZE] * BLOCK_SIZE + span % BLOCK_SIZE
        for row, span in zip(rows, spans, strict=True)
    ]
    for row in rows:
        done[row] += counts[row]
    metadata = model.make_metadata(
        [counts[row] for row in rows],
        [done[row] for row in rows],
        torch.cat(slots).to(device),
        tables[rows].to(device),
        sum(count == 1 for count in counts.values()),
    )
    tokens = torch.cat([ids[row][span] for row, span in zip(rows, spans, strict=True)])
    logits = model.forward(
        tokens.to(device),
        torch.cat(spans).to(device),
        metadata,
        torch.arange(len(tokens), device=device),
        [SLOTS[row] for row in rows],
    )
    return logits.float().cpu()


def errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return each token's relative error; a value that is not finite counts as infinite."""
    error = (got - expected).double().norm(dim=1) / expected.double().norm(dim=1)
    return error.nan_to_num(nan=float("inf"))
