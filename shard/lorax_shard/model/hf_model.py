"""A transformers causal model with paged attention, as the engine sees it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import HeadFacts
from lorax_shard import device_memory
from lorax_shard.attention.backend import AttentionBackend, StepMetadata
from lorax_shard.attention.kv_cache import FP8, PagedCache, block_bytes
from lorax_shard.attention.swap_space import SwapSpace
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.attention_hook import STEP_KEYWORD, AttentionSurvey
from lorax_shard.model.families import keeps_state
from lorax_shard.model.graphs.decode import DecodeGraphs
from lorax_shard.model.graphs.recorder import CudaRecorder, GraphRecorder
from lorax_shard.model.heads import Head
from lorax_shard.model.interface import GraphSettings, HiddenStates, PassGraphs
from lorax_shard.model.launch import launched
from lorax_shard.model.limits import position_limit
from lorax_shard.model.programs.passes import PassPrograms
from lorax_shard.peft.base import BaseDescription
from lorax_shard.transfer import to_device

logger = logging.getLogger(__name__)

# Of the driver, for each graph beside the memory that all of them share.
_BYTES_OF_A_GRAPH = 4 << 20
_KV_DTYPES = {"fp8_e4m3": FP8}


class HFPagedModel:
    """Owns the transformers model and its KV pool; implements ``PagedModel``."""

    is_encoder = False
    generates = True

    def __init__(self, model: Any, survey: AttentionSurvey, backend: AttentionBackend) -> None:
        """Take a model with plugged attention and plain linears; see ``loader``.

        Raises StartupError(MODEL_UNSUPPORTED) for one whose layers keep a state of their own.
        """
        if keeps_state(type(model)):
            raise StartupError(
                f"{type(model).__name__} cannot be served: its layers keep a recurrent state, "
                "which is no KV cache",
                ExitCode.MODEL_UNSUPPORTED,
            )
        config = model.config.get_text_config()
        self.model_type: str = model.config.model_type
        self.vocab_size = int(config.vocab_size)
        self.eos_token_ids = _eos_token_ids(model, config)
        self.max_positions = position_limit(config).max_positions
        self.window_size = _common_window(survey)
        self.dtype: torch.dtype = model.dtype
        self.kv_dtype = self.dtype
        self.device: torch.device = model.device
        self.weight_bytes = _weight_bytes(model)
        self.attention_backend = backend.name
        # Whoever replaces linears and what lies between them afterwards says by what.
        self.linear_backend = "torch"
        self.elementwise_backend = "torch"
        self.lora_backend = ""
        self.graphs: PassGraphs | None = None
        self._capturing: torch.cuda.Stream | None = None
        # Whoever installs adapters afterwards sets both.
        self.lora: LoraModel | None = None
        self.base: BaseDescription | None = None
        self.heads: dict[str, Head] = {}
        self._model = model
        self._shapes = {} if survey.is_encoder else survey.shapes
        self._survey = survey
        self._backend = backend
        self._cache: PagedCache | None = None
        self._swap_space: SwapSpace | None = None

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes that one KV block takes over all layers."""
        return block_bytes(self._shapes, block_size, self.kv_dtype)

    def store_kv_as(self, name: str) -> None:
        """Have later caches store K and V as ``auto`` (the model's dtype) or ``fp8_e4m3``.

        StartupError (BACKEND_UNAVAILABLE) when the attention backend does not read that.
        """
        kv_dtype = self.dtype if name == "auto" else _KV_DTYPES[name]
        reason = None
        if kv_dtype != self.dtype:
            reason = self._backend.refuses_cache(kv_dtype, self.device)
        if reason is not None:
            raise StartupError(
                f"the attention backend {self.attention_backend!r} cannot read a KV cache in {name}: "
                f"{reason}; use --attention-backend sdpa, or --kv-cache-dtype auto",
                ExitCode.BACKEND_UNAVAILABLE,
            )
        self.kv_dtype = kv_dtype

    def warm_up(self, block_size: int) -> None:
        """Compile whatever steps over blocks of this size may ask of the backends.

        Comes after ``store_kv_as`` and before requests, so that none waits for a compiler.
        """
        for layer in dict.fromkeys(self._survey.layers(block_size)):
            self._backend.warm_up(layer, self.device, self.dtype, self.kv_dtype)
        if self.lora is not None:
            self.lora.warm_up()

    def capture_graphs(
        self,
        settings: GraphSettings,
        recorder: GraphRecorder | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Capture decode steps over the pool in graphs, as far as that is possible, and use them.

        ``counts``: of so many rows each; None: of any number.
        """
        if self.device.type == "cpu" and recorder is None:
            self._record_programs(settings)
            return
        graphs = self.graphs = self._new_graphs(settings)
        if graphs is not None:
            graphs.capture(recorder or self._recorder(), counts)

    def _record_programs(self, settings: GraphSettings) -> None:
        rows = self._backend.reusable_rows()
        if rows is None:
            return
        programs = PassPrograms(
            self._forward_some, self._backend, rows, self._pool, self.lora, settings,
            is_whole=self.is_encoder,
        )  # fmt: skip
        programs.record(self.vocab_size, partial(launched, self))
        self.graphs = programs

    def graph_bytes(self, settings: GraphSettings) -> int:
        """Return about how many bytes graphs will take; over a pool that need not be the last."""
        if self.device.type == "cpu":
            return 0
        before = device_memory.free_bytes(self.device)
        graphs = self._new_graphs(settings)
        if graphs is None:
            return 0
        # They share the memory of the largest.
        graphs.capture(self._recorder(), (settings.max_rows,))
        torch.cuda.synchronize(self.device)
        taken = before - device_memory.free_bytes(self.device)
        return max(0, taken) + graphs.num_graphs * _BYTES_OF_A_GRAPH

    def _recorder(self) -> GraphRecorder:
        if self._capturing is None:
            # One for all times: libraries keep something for each stream.
            stream: Any = torch.cuda.Stream
            self._capturing = stream(self.device)
        return CudaRecorder(self._capturing)

    def _new_graphs(self, settings: GraphSettings) -> DecodeGraphs | None:
        layers = self._survey.layers(self._pool.block_size)
        decodes = self._backend.fixed_decodes(layers, settings.max_rows, self.device)
        if decodes is None:
            logger.warning(
                "the attention backend %s cannot be captured in graphs: steps are launched kernel by "
                "kernel", self.attention_backend,
            )  # fmt: skip
            return None
        return DecodeGraphs(
            self._forward_all, decodes, self._pool, self.lora, settings,
            vocab_size=self.vocab_size, device=self.device,
        )  # fmt: skip

    def _forward_all(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: StepMetadata
    ) -> torch.Tensor:
        """Return the logits of all tokens, by the model's own code and whatever is in effect."""
        output = self._model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=0,
            **{STEP_KEYWORD: metadata},
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _forward_some(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: StepMetadata,
        logit_rows: torch.Tensor,
        _segments: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of some tokens, and what the last layer gives for all."""
        with self.keeping_hidden() as kept:
            output = self._model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=logit_rows,
                **{STEP_KEYWORD: metadata},
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float(), kept.states

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the KV pool; a second call replaces it."""
        self.free_cache()  # before the new one is made, so that both never exist at once
        self._cache = PagedCache(
            self._shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self.kv_dtype,
            device=self.device,
        )

    def free_cache(self) -> None:
        """Give the KV pool back, and host memory for its blocks."""
        # Graphs hold its addresses.
        self._cache = self._swap_space = self.graphs = None

    def copy_blocks(self, source: list[int], destination: list[int]) -> None:
        """Copy KV blocks within the pool, over all layers."""
        with torch.inference_mode():
            self._pool.copy_blocks(source, destination)

    def allocate_swap_space(self, num_blocks: int) -> float:
        """Make host memory for blocks beside the empty pool, and measure the way there."""
        self._swap_space = None
        if not num_blocks:
            return 0.0
        self._swap_space = SwapSpace(self._pool, num_blocks)
        return self._swap_space.measure_block_s(self._pool.num_blocks)

    def swap_out(self, blocks: list[int], host_blocks: list[int]) -> None:
        """Copy KV blocks of the pool to host blocks, over all layers."""
        assert self._swap_space is not None
        self._swap_space.copy_out(blocks, host_blocks)

    def swap_in(self, host_blocks: list[int], blocks: list[int]) -> None:
        """Copy host blocks to KV blocks of the pool, over all layers."""
        assert self._swap_space is not None
        self._swap_space.copy_in(host_blocks, blocks)

    def head(self, kind: str) -> HeadFacts | None:
        """Return what the model's own head of a kind says; None: it has none."""
        head = self.heads.get(kind)
        return None if head is None else head.facts

    def score(
        self, kind: str, states: Sequence[torch.Tensor], slots: Sequence[int | None]
    ) -> list[torch.Tensor]:
        """Return what heads of a kind make of hidden states: n x hidden becomes n x labels.

        Those of ``states[i]`` are scored with the adapter in ``slots[i]``.
        """
        head, lens = self.heads[kind], [len(each) for each in states]
        with torch.inference_mode(), self._adapters(lens, None, slots):
            scores = head.scores(torch.cat([*states])).float()
        widths = self._num_labels(head, slots)
        parts = torch.split(scores, lens)
        return [
            part if width == scores.shape[1] else part[:, :width]
            for part, width in zip(parts, widths, strict=True)
        ]

    def _num_labels(self, head: Head, slots: Sequence[int | None]) -> list[int]:
        own = int(head.module.get_submodule(head.output).out_features)
        if (lora := self.lora) is None:
            return [own] * len(slots)
        name = head.output_name
        return [own if slot is None else lora.num_outputs(slot, name) or own for slot in slots]

    @contextmanager
    def keeping_hidden(self) -> Iterator[HiddenStates]:
        """Within, what the last layer gives in ``forward`` is kept, for all tokens."""
        kept = HiddenStates()

        def keep(_module: object, _arguments: object, output: Any) -> None:
            kept.states = output.last_hidden_state[0]

        hook = self._model.base_model.register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()

    def make_metadata(
        self,
        query_lens: list[int],
        context_lens: list[int],
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        num_decode_rows: int,
    ) -> StepMetadata:
        """Return the metadata of a step over this model's cache and backend."""
        return StepMetadata(
            query_lens=query_lens,
            context_lens=context_lens,
            slots=slots,
            block_tables=block_tables,
            num_decode_rows=num_decode_rows,
            cache=self._pool,
            backend=self._backend,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: StepMetadata,
        logit_rows: torch.Tensor,
        slots: Sequence[int | None] = (),
        slot_lens: Sequence[int] | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute one ragged step: write its KV, return the S x vocab logits of the asked tokens.

        The head, and what a family does to its output, runs on the S rows only.
        """
        arguments = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "use_cache": False,
            STEP_KEYWORD: metadata,
        }
        with (
            torch.inference_mode(),
            self._adapters(
                slot_lens if slot_lens is not None else metadata.query_lens, logit_rows, slots
            ),
        ):
            if logit_rows.numel() == 0:
                self._model.base_model(**arguments)
                return torch.empty(0, self.vocab_size, device=self.device)
            if logit_rows.device.type == "cpu":
                logit_rows = to_device(logit_rows, self.device)
            logits = self._model(**arguments, logits_to_keep=logit_rows).logits[0]
            return logits.float()  # type: ignore[no-any-return]

    def _adapters(
        self, lens: Sequence[int], logit_rows: torch.Tensor | None, slots: Sequence[int | None]
    ) -> AbstractContextManager[object]:
        """Within, runs of so many tokens compute with their adapters."""
        if self.lora is None or all(slot is None for slot in slots):
            return nullcontext()
        return self.lora.step(lens, slots, logit_rows)

    @property
    def slots(self) -> LoraModel | None:
        """Where adapters take effect."""
        return self.lora

    @property
    def _pool(self) -> PagedCache:
        assert self._cache is not None, "allocate_cache comes before any step"
        return self._cache


def _eos_token_ids(model: Any, config: Any) -> frozenset[int]:
    """Return the ids that end a text: generation_config's where it names any, else the config's."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _common_window(survey: AttentionSurvey) -> int | None:
    """Return the widest window when every layer has one: nothing further back is ever read."""
    windows = list(survey.windows.values())
    if any(window is None for window in windows):
        return None
    return max(window for window in windows if window is not None)


def _weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights and buffers, those that are tied counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
