"""Decode steps as graphs: captured once for some numbers of rows, then replayed with other numbers.

A step of R rows is computed by the smallest graph for at least R, filled up with rows that write
nothing and see nothing. Of each size there are two: without adapters, and with any mix of those
whose changes stand in the slots' table. What no graph computes is launched kernel by kernel.

A graph is used after its first replay gave the bits that the same launches give without it, on
this very machine, over numbers that it was not captured with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention.backend import FixedDecodes, StepMetadata
from lorax_shard.attention.kv_cache import PagedCache
from lorax_shard.lora.assignment import BASE
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.graphs.inputs import GraphInputs
from lorax_shard.model.graphs.recorder import GraphRecorder
from lorax_shard.model.graphs.trial import GraphDiffersError, GraphTrial
from lorax_shard.model.interface import GraphSettings, IdArray, PassNumbers
from lorax_shard.transfer import to_device

logger = logging.getLogger(__name__)

# From here on every so many rows have a graph, below powers of two.
_STEP = 8
_TELL_EVERY_S = 5.0
_ON_HOST = "the model looks at lengths on the host"


class _Key(NamedTuple):
    num_rows: int
    with_adapters: bool


Forward = Callable[[torch.Tensor, torch.Tensor, StepMetadata], torch.Tensor]


class DecodeGraphs:
    """Owns the graphs of one model over one KV pool; implements ``PassGraphs``.

    Args:
        forward: computes ids at positions (T int64 each) with the logits of all of them (T x V).
        decodes: attention whose launches follow from the number of rows.
        lora: the model's adapters; None: it has none.
    """

    def __init__(
        self,
        forward: Forward,
        decodes: FixedDecodes,
        cache: PagedCache,
        lora: LoraModel | None,
        settings: GraphSettings,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._forward, self._decodes, self._cache, self._lora = forward, decodes, cache, lora
        self._settings, self._device = settings, device
        max_blocks = -(-settings.max_context // cache.block_size)
        self._inputs = GraphInputs(decodes, settings.max_rows, max_blocks, device)
        self._logits = torch.zeros(
            settings.max_rows, vocab_size, dtype=torch.float32, device=device
        )
        self._replays: dict[_Key, Callable[[], None]] = {}
        self._version = 0
        # Adapters of which it was said that no graph computes them.
        self._told: set[str] = set()

    def run(self, numbers: PassNumbers) -> torch.Tensor | None:
        """Return the logits of a pass of decode rows; None: no graph computes it."""
        replay = self.prepared(numbers)
        if replay is None:
            return None
        replay()
        rows, num_rows = numbers.logit_rows, len(numbers.query_lens)
        if len(rows) == num_rows and (rows == np.arange(num_rows)).all():
            return self._logits[:num_rows]
        return self._logits[to_device(torch.from_numpy(rows), self._device)]

    def run_with_states(self, numbers: PassNumbers, tokens: IdArray) -> None:
        """Return None: rows that decode want no vectors."""

    def prepared(self, numbers: PassNumbers) -> Callable[[], None] | None:
        """Have the graph that computes a pass read it, and return its replay; None: there is none."""
        num_rows = len(numbers.query_lens)
        if numbers.num_decode_rows < num_rows or numbers.tables.shape[1] > self._inputs.max_blocks:
            return None
        with_adapters = any(slot is not None for slot in numbers.slots)
        if with_adapters and not self._compute_adapters(numbers):
            return None
        key = self._smallest(num_rows, with_adapters)
        if key is None:
            return None
        self._inputs.fill(numbers, _known(numbers.slots), key.num_rows)
        return self._replays[key]

    def _smallest(self, num_rows: int, with_adapters: bool) -> _Key | None:
        fitting = (
            key
            for key in self._replays
            if key.num_rows >= num_rows and key.with_adapters == with_adapters
        )
        return min(fitting, default=None)

    def _compute_adapters(self, numbers: PassNumbers) -> bool:
        """Return whether graphs compute what all adapters of a step change; say once which they don't."""
        lora = self._lora
        if lora is None or not any(key.with_adapters for key in self._replays):
            return False
        if lora.fixed_version != self._version:
            self._replays = {key: each for key, each in self._replays.items() if not key[1]}
            logger.warning(
                "more adapters are in effect at once than graphs have room for (%d): steps with "
                "adapters are launched kernel by kernel from now on; raise --max-active-adapters",
                self._settings.max_slots,
            )
            return False
        apart = {slot for slot in numbers.slots if slot is not None and not lora.is_fixed(slot)}
        for digest in {lora.digest(slot) for slot in apart} - self._told:
            self._told.add(digest)
            logger.info(
                "the adapter %s changes more than graphs compute (low-rank parts before the head, up to "
                "rank %d): steps with it are launched kernel by kernel", digest, self._settings.max_rank
            )  # fmt: skip
        return not apart

    @property
    def num_graphs(self) -> int:
        """How many there are, where none fails."""
        return len(self._keys(row_counts(self._settings.max_rows)))

    @torch.inference_mode()
    def capture(self, recorder: GraphRecorder, counts: Sequence[int] | None = None) -> None:
        """Capture and check graphs of so many rows each (None: of all); what fails is left out, in words.

        StartupError where the device is broken by it.
        """
        # The largest first: the others find room in its memory.
        counts = sorted(counts or row_counts(self._settings.max_rows), reverse=True)
        self._capture_all(recorder, self._keys(counts))

    def _capture_all(self, recorder: GraphRecorder, keys: list[_Key]) -> None:
        started = told = time.perf_counter()
        left_out: set[bool] = set()
        for number, key in enumerate(keys):
            if key.with_adapters in left_out:
                continue
            try:
                with self._fixed(key) as slots:
                    self._capture_one(recorder, key, slots)
            except Exception as error:  # noqa: BLE001 - whatever it is, steps can do without
                self._leave_out(key, error)
                if not isinstance(error, GraphDiffersError | torch.OutOfMemoryError):
                    # What fails for one number of rows fails for all.
                    left_out.add(key.with_adapters)
            if time.perf_counter() - told > _TELL_EVERY_S:
                told = time.perf_counter()
                logger.info("captured %d of %d graphs", number + 1, len(keys))
        logger.info(
            "captured %d graphs of decode steps of up to %d rows in %.1f s",
            len(self._replays), max((key.num_rows for key in self._replays), default=0),
            time.perf_counter() - started,
        )  # fmt: skip

    def _keys(self, counts: Sequence[int]) -> list[_Key]:
        kinds = (False, True) if self._lora is not None and self._settings.max_rank else (False,)
        return [_Key(count, kind) for count in counts for kind in kinds]

    @contextmanager
    def _fixed(self, key: _Key) -> Iterator[list[int]]:
        """Within, launches are fixed, and the slots returned hold adapters to try a graph with."""
        if not key.with_adapters:
            yield []
            return
        lora, settings = self._lora, self._settings
        assert lora is not None
        with (
            lora.fixed(settings.max_slots, settings.max_rank),
            loaded_samples(lora, settings.max_rank) as slots,
        ):
            self._version = lora.fixed_version
            yield slots

    def _capture_one(self, recorder: GraphRecorder, key: _Key, slots: list[int]) -> None:
        """Capture a graph and compare its first replay; GraphDiffersError if that is another."""
        # No position beyond the model's last one.
        whole_blocks = max(1, self._settings.max_context // self._cache.block_size)
        trial = GraphTrial(self._cache, key.num_rows, whole_blocks)
        compute = partial(self._compute, key)
        with trial.filled_cache():
            numbers = trial.numbers(slots, self._logits.shape[1])
            self._inputs.fill(numbers, _known(numbers.slots), key.num_rows)
            # Compiles, and makes what libraries keep.
            compute()
            replay = recorder.record(compute)
            # Not the numbers that it was captured with.
            numbers = trial.numbers(slots, self._logits.shape[1])
            self._inputs.fill(numbers, _known(numbers.slots), key.num_rows)
            logits = self._logits[: trial.num_rows]
            trial.compare(replay, compute, logits)
        self._replays[key] = replay

    def _compute(self, key: _Key) -> None:
        """Launch what a graph consists of, over the inputs' tensors."""
        inputs, rows = self._inputs, slice(0, key.num_rows)
        numbers = inputs.numbers
        metadata = StepMetadata(
            query_lens=[1] * key.num_rows,
            context_lens=LengthsOnDevice(),
            slots=numbers["kv_slots"][rows],
            block_tables=inputs.tables[rows],
            num_decode_rows=key.num_rows,
            cache=self._cache,
            backend=self._decodes.backend,
            scratch=self._decodes.scratch(
                key.num_rows, numbers["context_lens"], inputs.tables, numbers
            ),
        )
        adapters: AbstractContextManager[None] = nullcontext()
        if key.with_adapters:
            assert self._lora is not None
            adapters = self._lora.fixed_step(numbers["lora_slots"][rows])
        with adapters:
            logits = self._forward(numbers["input_ids"][rows], numbers["positions"][rows], metadata)
        self._logits[rows].copy_(logits)

    def _leave_out(self, key: _Key, error: Exception) -> None:
        kind = "with adapters" if key.with_adapters else "without adapters"
        words = (str(error).strip().splitlines() or [""])[0]
        logger.warning(
            "no graph computes steps of %d rows %s, they are launched kernel by kernel: %s: %s",
            key.num_rows, kind, type(error).__name__, words,
        )  # fmt: skip
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except Exception as broken:
                raise StartupError(
                    f"the device is broken since a graph was captured ({broken}); start with --eager",
                    ExitCode.DEVICE_BROKEN,
                ) from broken


class LengthsOnDevice(list[int]):
    """Stands for lengths that only the device knows: whoever asks for them cannot be captured."""

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError(_ON_HOST)

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError(_ON_HOST)

    def __len__(self) -> int:
        raise RuntimeError(_ON_HOST)


def row_counts(max_rows: int) -> list[int]:
    """Return the numbers of rows that have graphs: small ones close together, the largest last."""
    small = [size for size in (1, 2, 4) if size < max_rows]
    return [*small, *range(_STEP, max_rows, _STEP), max_rows]


def _known(slots: Sequence[int | None]) -> list[int]:
    return [BASE if slot is None else slot for slot in slots]
