"""Tiny models of several families with adapters: the device beside the CPU reference.

The reference computes the same weights in the same dtype by the ``torch`` backends. In 16 bits
two right answers differ by rounding, and a router of experts may turn over where two are nearly
as good; there the median token counts, in float32 every token. A decode step is also captured in
a graph, whose replay must give what the same launches gave without it, bit for bit.

Each family is a process of its own: most of the time goes into compiling kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench.gpu_check.machine import ROOT
from bench.gpu_check.models import BLOCK_SIZE, device_of
from bench.gpu_check.report import FAILED, OK, RUNNING, Report
from bench.gpu_check.steps import ModelStep
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.triton_interpreter import mend_interpreter

from lorax_contract.config import Device, ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import registry as attention
from lorax_shard.lora import registry as lora
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.sites import Kind, Site
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model

FAMILIES = ("llama", "gemma2", "gpt_oss", "mixtral")
RANKS = (4, 1, 16)
# Largest ||got - reference|| / ||reference|| of a token's logits, as it is counted.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
# Rows are prompts of these lengths; then each decodes one token.
LENGTHS = (19, 1, 7, 33, 12)
SLOTS = (0, None, 1, 2, 0)
_COLUMNS = ("model", "dtype", "attention", "LoRA", "median", "largest", "counted", "allowed",
            "graph")  # fmt: skip


class Choice(NamedTuple):
    """Backends that compute together."""

    attention: str
    lora: str


def run(report: Report, *, small: bool) -> None:
    """Compare every family in a process of its own, and put together what they found."""
    report.table("Error of a token's logits", _COLUMNS)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in FAMILIES[: 1 if small else None]}
        flags = ["--small"] if small else []
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-m", "bench.gpu_check.parity", name, str(path), *flags], cwd=ROOT
            )
            for name, path in paths.items()
        }
        for name, process in processes.items():
            code = process.wait()
            found = json.loads(paths[name].read_text()) if paths[name].exists() else {}
            for table in found.get("tables", ()):
                for row in table["rows"]:
                    report.row(*row)
            for note in found.get("notes", ()):
                report.note(note)
            if found.get("status", RUNNING) != OK:
                wrong.append(found.get("text") or f"{name} ended with code {code}")
    if wrong:
        report.end(FAILED, "; ".join(wrong))


def run_family(report: Report, family: str, *, small: bool) -> None:
    """Compare every dtype and pair of backends."""
    device = device_of(small)
    report.table("Error of a token's logits", _COLUMNS)
    wrong = []
    for dtype, allowed in TOLERANCES.items():
        with tempfile.TemporaryDirectory() as folder:
            model_dir = make_tiny_model(family, Path(folder) / family)
            expected = logits_of(load(model_dir, "cpu", dtype, Choice("torch", "torch")))
            for choice in choices(device, dtype, small):
                try:
                    model = load(model_dir, device.type, dtype, choice)
                except StartupError as error:
                    if error.exit_code is not ExitCode.BACKEND_UNAVAILABLE:
                        raise
                    report.note(f"{family}: {error}")
                    continue
                difference = errors(logits_of(model), expected)
                exact = dtype is torch.float32
                counted = float(difference.max() if exact else difference.median())
                replayed = replays(report, model)
                report.row(
                    family, str(dtype)[6:], *choice, float(difference.median()),
                    float(difference.max()), "largest" if exact else "median", allowed, replayed,
                )  # fmt: skip
                if not counted <= allowed or replayed == "differs":
                    words = f"{family} {str(dtype)[6:]} {'+'.join(choice)}: {counted:.2g}"
                    wrong.append(words + ", graph differs" * (replayed == "differs"))
    if wrong:
        report.end(FAILED, f"too far from the reference: {'; '.join(wrong)}")


def replays(report: Report, model: HFPagedModel) -> str | None:
    """Return whether a graph of a decode step gives the very same logits; None: there is none."""
    if model.lora_backend != "triton":
        return None
    step = ModelStep(model, 4, 1, 33, list(range(len(RANKS))))
    # Captured, and compared with the same launches.
    replay = step.graph()
    if replay is None:
        report.note(
            f"{model.model_type} by {model.attention_backend} has no graph; the log says why"
        )
        return None
    numbers = step.numbers()
    with torch.inference_mode():
        assert model.graphs is not None
        found = model.graphs.run(numbers)
        assert found is not None
        error = float(errors(found.float().cpu(), launched(model, numbers).float().cpu()).max())
    return "same" if error <= TOLERANCES[model.dtype] else "differs"


def choices(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Choice]:
    """Yield each attention backend that runs here with the best LoRA backend, and the others."""
    loras = [
        name for name in lora.BACKENDS.names if lora.BACKENDS.probe(name, device, dtype) is None
    ]
    attentions = [
        name
        for name in attention.BACKENDS.names
        if attention.BACKENDS.probe(name, device, dtype) is None
    ]
    if small:
        attentions, loras = ["sdpa"], loras[:1]
    for name in attentions:
        yield Choice(name, loras[0])
    for name in loras[1:]:
        yield Choice(attentions[0], name)


def load(model_dir: Path, device: Device | str, dtype: torch.dtype, choice: Choice) -> HFPagedModel:
    """Return a model with adapters in its slots."""
    config = ShardConfig(
        model_dir=str(model_dir), model_id="tiny", shard_uris=["unix:/unused"],
        device="cuda" if device == "cuda" else "cpu", dtype=str(dtype)[6:],
        attention_backend=choice.attention, lora_backend=choice.lora, linear_backend="torch",
    )  # fmt: skip
    model = load_paged_model(config)
    assert model.lora is not None
    for slot, rank in enumerate(RANKS):
        model.lora.load(slot, adapter(model.lora, rank, slot))
    return model


def adapter(model: LoraModel, rank: int, seed: int) -> HostAdapter:
    """Return a random adapter of all linears but the head, of experts and of routers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(site: Site, *shape: int) -> torch.Tensor:
        stack = (site.num_experts,) if site.kind is Kind.EXPERTS else ()
        return torch.randn((*stack, *shape), generator=generator)

    modules = {
        name: ModuleDelta(
            a=draw(site, rank, site.in_features) * site.in_features**-0.5,
            b=draw(site, site.out_features, rank) * rank**-0.5,
            scaling=0.5,
        )
        for name, site in model.sites.items()
        if site.kind in (Kind.LINEAR, Kind.EXPERTS, Kind.ROUTER) and not site.is_head
    }
    return HostAdapter(digest=f"random-{seed}", modules=modules)


def logits_of(model: HFPagedModel) -> torch.Tensor:
    """Return the logits of all tokens: two ragged steps of prompts, then one of decodes."""
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


def main() -> int:
    """Compare one family; its report says how it ended."""
    family, path, *flags = sys.argv[1:]
    if "--small" in flags:
        mend_interpreter()
    report = Report(Path(path))
    try:
        run_family(report, family, small="--small" in flags)
    except Exception as error:
        report.end(FAILED, f"{family}: {type(error).__name__}: {error}")
        raise
    report.end(OK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
