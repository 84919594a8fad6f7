"""Programs for a GPU that is not there: steps as a server computes them, launch by launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench.gpu_check import models
from bench.gpu_check.steps import CallAgain
from tests.helpers.fake_gpu import Compiled, FakeGPU

from lorax_shard.attention.backend import AttentionLayer
from lorax_shard.attention.kv_cache import KVShape
from lorax_shard.attention.triton import backend as triton_attention
from lorax_shard.attention.triton.backend import TritonAttention
from lorax_shard.linear import replace as linears
from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.triton.backend import TritonLora
from lorax_shard.model import attention_hook
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings
from lorax_shard.model.probe import survey_attention

CPU = torch.device("cpu")
# Where the outputs of siblings begin in the stacked one.
STARTS = (0, 4096, 5120)


ROW_COUNTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 100, 128, 255, 256, 400, 512, 700, 2048)


def lora_steps(gpu: FakeGPU) -> list[Compiled]:
    """Return what a sweep of row counts, adapters and slots compiles after the warm-up."""
    backend = TritonLora()
    width, outs = 4096, (4096, 1024, 1024)
    groups = {num_members: backend.make_group(num_members) for num_members in (3, 1)}

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    for num_members, group in groups.items():
        group.warm_up(zeros(1, width), zeros(1, sum(outs[:num_members])), STARTS[:num_members])
    warm = len(gpu.binaries)
    for slot, rank in ((0, 8), (1, 3), (39, 64), (500, 16), (2, 200)):
        for num_members, group in groups.items():
            a, b = zeros(rank * num_members, width), (zeros(rank, out) for out in outs)
            group.load(slot, GroupWeights(a, tuple(b)[:num_members]))
        backend.commit(CPU)
        for count in (*range(1, 257, 5), *ROW_COUNTS):
            for num_slots in (1, 4, 40):
                rows = Assignment(np.arange(count, dtype=np.int64) % num_slots - 1, CPU)
                x, y = zeros(count, width), zeros(count, sum(outs))
                for num_members, group in groups.items():
                    shrunk = group.shrink(x, rows)
                    group.expand_all(shrunk, STARTS[:num_members], y, rows)
                    for member in range(num_members):
                        group.expand(shrunk, member, y[:, STARTS[member] :], rows)
    return gpu.binaries[warm:]


def model_steps(gpu: FakeGPU, *sizes: int) -> list[Compiled]:
    """Return what steps of a model compile after its warm-up: any rows, lengths and adapters.

    ``sizes`` are those of a ``LlamaShape``.
    """
    model = plugged_model(models.LlamaShape(*sizes))
    model.warm_up(models.BLOCK_SIZE)
    warm = len(gpu.binaries)
    assert warm > 0
    # As many as a large GPU has: splits of decode rows follow from them.
    triton_attention.num_processors = lambda device: 132
    model.allocate_cache(600, models.BLOCK_SIZE)
    for first, ranks in ((1, (8,)), (2, (3, 64, 200))):
        for slot in list(model.lora.slots):
            model.lora.unload(slot)
        models.load_adapters(model, ranks)
        loaded = [*range(len(ranks))]
        # One adapter for all rows, each in turn, the base model among them, and it alone.
        mixes = ([loaded[-1]], loaded, [None, *loaded], [*loaded, *[None] * 9], [None])
        for number, (rows, tokens, context) in enumerate((*STEPS, *sweep(first))):
            step(model, rows, tokens, context, mixes[number % len(mixes)])
    settings = GraphSettings(max_rows=256, max_context=9000, max_rank=200, max_slots=8)
    before = gpu.launches.copy()
    model.capture_graphs(settings, CallAgain(), (1, 2, 24, 64, 200, 256))
    assert (gpu.launches - before).keys() >= {"decode", "combine", "store", "shrink", "expand"}
    assert {"prompt", "decode", "combine", "store", "shrink", "expand"} <= gpu.launches.keys()
    return gpu.binaries[warm:]


def launches_of_steps(gpu: FakeGPU) -> list[Compiled]:
    """Return the kernels of steps that take as many launches whatever adapters their rows have."""
    shape = models.LlamaShape(256, 512, 2, 4, 2, 1000)
    model = plugged_model(shape)
    model.allocate_cache(600, models.BLOCK_SIZE)
    triton_attention.num_processors = lambda device: 132
    models.load_adapters(model, (8, 3, 64, 200))
    # q, k and v; o; gate and up; down.
    groups = 4 * shape.layers
    adapted = {"gather_rows": 1, "shrink": groups, "expand": groups}
    plain = {"store": shape.layers, "decode": shape.layers}
    for rows, context, mix, expected in (
        (200, 64, [None], plain),
        (200, 64, [0], plain | adapted),
        (200, 64, [0, 1, 2, 3, None], plain | adapted),
        (1, 9000, [2], plain | adapted | {"combine": shape.layers}),
    ):
        before = gpu.launches.copy()
        step(model, rows, 1, context, mix)
        assert gpu.launches - before == expected, (rows, mix, gpu.launches - before)
    return gpu.binaries


def sweep(first: int) -> Iterator[tuple[int, int, int]]:
    """Yield steps of every second number of rows, of short contexts, longer and long ones in turn."""
    for rows in range(first, 257, 2):
        yield rows, 1, (rows % 40 + 1, 500 + rows, 4000)[rows % 3]


# Rows, new tokens of each, and their context.
STEPS = (
    (1, 1, 1), (1, 1, 300), (1, 1, 9000), (2, 1, 700), (3, 1, 17), (5, 1, 9000), (16, 1, 33),
    (33, 1, 512), (130, 1, 64), (1, 2, 2), (1, 37, 300), (3, 16, 16), (7, 100, 700), (2, 600, 600),
    (1, 5, 9000), (3, 4, 5000), (2, 3, 40),
)  # fmt: skip


def plugged_model(shape: models.LlamaShape) -> HFPagedModel:
    """Return a random Llama with what a GPU computes it with, siblings stacked."""
    from transformers import AutoModelForCausalLM

    attention_hook.register()
    model = AutoModelForCausalLM.from_config(
        models.llama_config(shape), dtype=torch.bfloat16,
        attn_implementation=attention_hook.ATTENTION_NAME,
    ).eval().requires_grad_(False)  # fmt: skip
    paged = HFPagedModel(model, survey_attention(model), TritonAttention())
    for group in list(linears.find_groups(list(linears.find_targets(model)), linears.SIBLINGS)):
        plain = linears.TorchBackend()
        if len(group) > 1:
            linears._replace_siblings(group, plain)
        else:
            linears._replace_one(group[0], plain)
    paged.lora = LoraModel(model, TritonLora(), CPU, torch.bfloat16)
    return paged


def step(
    model: HFPagedModel, rows: int, tokens: int, context: int, slots: list[int | None]
) -> None:
    """Compute the last ``tokens`` of each row's context; rows share their blocks.

    What comes to the device at once lies there one after the other, wherever that begins.
    """
    size = models.BLOCK_SIZE
    position = torch.arange(context - tokens, context).repeat(rows)
    tables = torch.arange(-(-context // size)).repeat(rows, 1)
    parts = [torch.zeros(rows % 4, dtype=torch.int64), position, tables.ravel()]
    together = torch.cat(parts).to(torch.int32 if rows % 2 else torch.int64)
    _, kv_slots, of_tables = together.split([len(part) for part in parts])
    metadata = model.make_metadata(
        [tokens] * rows, [context] * rows, kv_slots.long(), of_tables.view_as(tables),
        rows if tokens == 1 else 0,
    )  # fmt: skip
    model.forward(
        torch.zeros_like(position), position, metadata,
        torch.arange(tokens - 1, rows * tokens, tokens),
        [slots[row % len(slots)] for row in range(rows)],
    )  # fmt: skip


def attention_kernels(
    gpu: FakeGPU, head_dim: int, dtype: str, kv_dtype: str, with_everything: bool
) -> list[Compiled]:
    """Return the kernels of a layer of 32 query heads and 8 KV heads."""
    rules = {"window": 4096, "softcap": 30.0, "has_sinks": True} if with_everything else {}
    kv = KVShape(8, head_dim, head_dim)
    layer = AttentionLayer(32, kv, models.BLOCK_SIZE, **rules)
    TritonAttention().warm_up(layer, CPU, getattr(torch, dtype), getattr(torch, kv_dtype))
    return gpu.binaries


def lora_kernels(gpu: FakeGPU, dtype: str) -> list[Compiled]:
    """Return the kernels of an 8B model's groups, after slots are fixed as for a graph."""
    backend = TritonLora()
    for width, outs in ((4096, (4096, 1024, 1024)), (14336, (4096,))):
        group = backend.make_group(len(outs))
        group.reserve(ranks=192, widths=list(outs))
        starts = (0, *outs[:1], sum(outs[:2]))[: len(outs)]
        x = torch.zeros(1, width, dtype=getattr(torch, dtype))
        group.warm_up(x, torch.zeros(1, sum(outs), dtype=x.dtype), starts)
    return gpu.binaries


def counted_compilations(gpu: FakeGPU) -> list[Compiled]:
    """Return the kernels of a warm-up, and of a layer of another kind; the GPU check counts them."""
    from bench.gpu_check.compilations import CompiledSince, variants

    layer = AttentionLayer(4, KVShape(2, 64, 64), models.BLOCK_SIZE)
    TritonAttention().warm_up(layer, CPU, torch.bfloat16, torch.bfloat16)
    warm = Counter(compiled.kernel for compiled in gpu.binaries)
    assert variants() == warm
    notes: list[str] = []
    report: Any = SimpleNamespace(note=notes.append)
    since = CompiledSince()
    TritonAttention(1).warm_up(layer, CPU, torch.bfloat16, torch.bfloat16)
    since.note(report)
    TritonAttention().warm_up(layer._replace(softcap=30.0), CPU, torch.bfloat16, torch.bfloat16)
    since.note(report)
    new = Counter(compiled.kernel for compiled in gpu.binaries) - warm
    names = ", ".join(f"{name} {count}" for name, count in sorted(new.items()))
    before = f"kernel variants compiled before the first step: {warm.total()}; after it: "
    assert {"decode", "prompt"} <= new.keys()
    assert notes == [before + "0", before + f"{new.total()} ({names})"], notes
    return gpu.binaries
