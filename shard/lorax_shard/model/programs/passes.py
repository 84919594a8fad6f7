"""The passes of a model on a CPU, as programs; what no program computes the model's code does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.backend import AttentionBackend, ReusableRows, StepMetadata
from lorax_shard.attention.kv_cache import PagedCache
from lorax_shard.lora.assignment import BASE
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.interface import GraphSettings, IdArray, PassNumbers
from lorax_shard.model.programs.arena import LOGIT_ROWS, Arena
from lorax_shard.model.programs.asked import asked_rows
from lorax_shard.model.programs.program import Program
from lorax_shard.model.programs.recorder import NotAProgramError, record
from lorax_shard.model.programs.scaled import Size, Sizes
from lorax_shard.model.programs.trial import FEW_SIZES, ProgramTrial
from lorax_shard.threads import one_thread

logger = logging.getLogger(__name__)

# Of the recordings. No two numbers of a model are as far apart at each by chance.
_FIRST, _MORE_TOKENS, _MORE_LOGITS = Size(11, 3), Size(18, 3), Size(11, 8)

# Slots of the samples that a program is tried with, beside those of adapters.
_SAMPLES = 2

# Tokens that nobody asks for, of one layer: from here on to leave them out pays.
_MANY_UNASKED = 32

_NO_TOKENS = np.zeros(0, dtype=np.int64)

_Made = TypeVar("_Made")
# Of S tokens the logits (S x V float32), and of all of them what the last layer gives (T x hidden).
Results = tuple[torch.Tensor, torch.Tensor]
# What is done with a pass, and with its inputs.
_How = Callable[[Callable[[], Results], Mapping[str, torch.Tensor]], _Made]
# Computes ids at positions (T int64 each); the last says of each token which of two texts it is of.
Forward = Callable[[torch.Tensor, torch.Tensor, StepMetadata, torch.Tensor, torch.Tensor], Results]


class PassPrograms:
    """Owns the programs of one model over one KV pool; implements ``PassGraphs``."""

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        rows: ReusableRows,
        cache: PagedCache,
        lora: LoraModel | None,
        settings: GraphSettings,
        *,
        is_whole: bool = False,
    ) -> None:
        """``is_whole``: passes have rows whole, and keep nothing of them."""
        self._is_whole = is_whole
        self._forward, self._backend, self._rows, self._cache = forward, backend, rows, cache
        self._lora, self._settings = lora, settings
        self._num_slots = cache.num_blocks * cache.block_size
        self._arena = Arena()
        # Without adapters, and with those that change no more than low-rank parts add.
        self._programs: dict[bool, Program] = {}
        # Tokens that are left out of the last layer where as many of a pass are not asked for;
        # None: they never are.
        self._least_unasked: int | None = None

    def run(self, numbers: PassNumbers) -> torch.Tensor | None:
        """Return the logits of a pass (S x V float32); None: no program computes it.

        They are overwritten by the next run.
        """
        found = self.run_with_states(numbers, _NO_TOKENS)
        return None if found is None else found[0]

    def run_with_states(self, numbers: PassNumbers, tokens: IdArray) -> Results | None:
        """Return the logits of a pass and what the last layer gives for some tokens, as ``run``."""
        program, least = self._program_of(numbers), self._least_unasked
        if program is None:
            return None
        asked = np.concatenate([tokens, numbers.logit_rows])
        num_tokens = len(numbers.input_ids)
        if least is not None and num_tokens - len(asked) >= least:
            logits, states = self._run_narrowed(program, numbers, asked)
            return logits, states[: len(tokens)]
        logits, states = self._run(program, numbers)
        if 0 < len(tokens) < num_tokens:
            return logits, states[torch.from_numpy(tokens)]
        return logits, states[: len(tokens)]

    def _run(self, program: Program, numbers: PassNumbers) -> Results:
        self._tell_rows(numbers)
        found: Results = program.run(_size(numbers), _inputs(numbers))
        return found

    def _run_narrowed(self, program: Program, numbers: PassNumbers, asked: IdArray) -> Results:
        self._tell_rows(numbers)
        found: Results = program.run_narrowed(
            _size(numbers), _inputs(numbers), torch.from_numpy(asked),
            partial(self._narrow, numbers, asked),
        )  # fmt: skip
        return found

    def _tell_rows(self, numbers: PassNumbers) -> None:
        if numbers.kv_slots.max(initial=-1) >= self._num_slots:
            raise IndexError(f"the cache has no slot {numbers.kv_slots.max()}")
        self._rows.fill(numbers.query_lens, numbers.context_lens, torch.from_numpy(numbers.tables))

    def _narrow(self, numbers: PassNumbers, asked: IdArray) -> None:
        """Tell of the asked tokens alone, and of their adapters."""
        self._rows.narrow(*asked_rows(numbers, asked))
        if any(slot is not None for slot in numbers.slots):
            assert self._lora is not None
            self._lora.write_fixed_slots(_slot_of_token(numbers)[asked])

    def time_kernels(self, *, with_adapters: bool) -> tuple[list[str], NDArray[np.float64]] | None:
        """Time the kernels of passes from now on, see ``Program``; None: no program computes them."""
        program = self._programs.get(with_adapters)
        return None if program is None else program.time_kernels()

    def _program_of(self, numbers: PassNumbers) -> Program | None:
        """Return what computes a pass, told of its adapters; None: the model's code does."""
        slots = {slot for slot in numbers.slots if slot is not None}
        program = self._programs.get(bool(slots))
        if program is None or not slots:
            return program
        assert self._lora is not None
        if not all(map(self._lora.is_fixed, slots)):
            return None
        self._lora.write_fixed_slots(_slot_of_token(numbers))
        return program

    @torch.inference_mode()
    def record(self, vocab_size: int, launch: Callable[[PassNumbers], torch.Tensor]) -> None:
        """Make the programs and try them; what is none is left to ``launch``, in words."""
        lora = self._lora
        if lora is not None and self._settings.max_rank:
            self._try("with adapters", lambda: self._make_both(lora, vocab_size, launch))
        if not self._programs:
            self._try("without adapters", lambda: self._make_base(vocab_size, launch))

    def _try(self, which: str, make: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            with one_thread():
                make()
        except Exception as error:  # noqa: BLE001 - whatever a model's code does, steps can do without
            self._programs.clear()
            self._least_unasked = None
            words = str(error) if isinstance(error, NotAProgramError) else repr(error)
            logger.info("passes %s are computed kernel by kernel: %s", which, words)
            return
        numbers = ", ".join(str(each.num_calls) for each in self._programs.values())
        logger.info(
            "passes %s are programs (%s kernels), recorded in %.1f s",
            which, numbers, time.perf_counter() - started,
        )  # fmt: skip

    def _make_base(self, vocab_size: int, launch: Callable[[PassNumbers], torch.Tensor]) -> None:
        trial = self._new_trial(vocab_size)
        with trial.filled_cache():
            self._programs[False] = self._recorded(trial, [])
            trial.compare(self._all, launch, [])
            self._try_narrow(lambda: trial.compare(self.run, launch, []))

    def _make_both(
        self, lora: LoraModel, vocab_size: int, launch: Callable[[PassNumbers], torch.Tensor]
    ) -> None:
        """Make the program of passes with adapters; less their kernels it is that of all others."""
        trial = self._new_trial(vocab_size)
        with trial.filled_cache(), self._fixed(lora) as slots:
            self._programs[True] = self._recorded(trial, slots)
            self._programs[False] = self._programs[True].without(lora.kernels)
            trial.compare(self._all, launch, slots)
            # Its kernels are the same.
            trial.compare(self._all, launch, [], FEW_SIZES)

            def compare_narrowed() -> None:
                trial.compare(self.run, launch, slots)
                trial.compare(self.run, launch, [], FEW_SIZES)

            self._try_narrow(compare_narrowed)

    def _all(self, numbers: PassNumbers) -> torch.Tensor | None:
        program = self._program_of(numbers)
        return None if program is None else self._run(program, numbers)[0]

    def _try_narrow(self, compare: Callable[[], None]) -> None:
        """Leave tokens that nobody asks for out of the last layer if that gives the same."""
        if not all(each.can_narrow for each in self._programs.values()):
            return
        self._least_unasked = 1
        try:
            compare()
        except NotAProgramError as error:
            self._least_unasked = None
            logger.info("all tokens of a pass go through the whole last layer: %s", error)
        else:
            self._least_unasked = _MANY_UNASKED

    def _new_trial(self, vocab_size: int) -> ProgramTrial:
        max_context = self._settings.max_context
        return ProgramTrial(self._cache, vocab_size, max_context, is_whole=self._is_whole)

    def _recorded(self, trial: ProgramTrial, slots: Sequence[int]) -> Program:
        # What is made once is there when it is recorded.
        self._compute(trial.numbers(_FIRST, slots), lambda compute, _: compute())
        sizes = _FIRST, _MORE_TOKENS, _MORE_LOGITS
        first, *more = (self._compute(trial.numbers(each, slots), record) for each in sizes)
        return Program(Sizes(*sizes), (first, more[0], more[1]), self._arena)

    @contextmanager
    def _fixed(self, lora: LoraModel) -> Iterator[list[int]]:
        """Within, adapters are read when a program runs, and the slots returned hold samples."""
        settings = self._settings
        with (
            lora.fixed(settings.max_slots + _SAMPLES, settings.max_rank),
            loaded_samples(lora, settings.max_rank) as slots,
        ):
            yield slots

    def _compute(
        self,
        numbers: PassNumbers,
        how: _How[_Made],
    ) -> _Made:
        """Compute a pass by the model's code, as it is recorded."""
        inputs, tables = _inputs(numbers), torch.from_numpy(numbers.tables)
        self._rows.fill(numbers.query_lens, numbers.context_lens, tables)
        metadata = StepMetadata(
            query_lens=_Unknown(),
            context_lens=_Unknown(),
            slots=inputs["kv_slots"],
            block_tables=tables,
            num_decode_rows=0,
            cache=self._cache,
            backend=self._backend,
            scratch=self._rows.scratch(),
        )
        ids, positions, logit_rows, segments = (
            inputs[name] for name in ("input_ids", "positions", LOGIT_ROWS, "segments")
        )
        with self._adapters(numbers):
            return how(
                lambda: self._forward(ids, positions, metadata, logit_rows, segments), inputs
            )

    def _adapters(self, numbers: PassNumbers) -> AbstractContextManager[None]:
        if all(slot is None for slot in numbers.slots):
            return nullcontext()
        assert self._lora is not None
        return self._lora.fixed_step(torch.from_numpy(_slot_of_token(numbers)))


class _Unknown(list[int]):
    """Stands for lengths of rows: a program has those of each pass."""

    def _refuse(self, *_: Any) -> Any:
        raise NotAProgramError("the model's code looks at the lengths of rows")

    __iter__ = __getitem__ = __len__ = _refuse


def _size(numbers: PassNumbers) -> Size:
    return Size(len(numbers.input_ids), len(numbers.logit_rows))


def _slot_of_token(numbers: PassNumbers) -> IdArray:
    slots = [BASE if slot is None else slot for slot in numbers.slots]
    return np.repeat(np.array(slots, dtype=np.int64), numbers.slot_lens)


def _inputs(numbers: PassNumbers) -> dict[str, torch.Tensor]:
    input_ids = torch.from_numpy(numbers.input_ids)
    if numbers.unread is not None:
        unread = numbers.unread
        ids = unread.drawn[torch.from_numpy(unread.of)].clamp_(min=0)
        input_ids = input_ids.index_copy(0, torch.from_numpy(unread.at), ids)
    segments = numbers.segments
    return {
        "segments": torch.zeros_like(input_ids) if segments is None else torch.from_numpy(segments),
        "input_ids": input_ids,
        "positions": torch.from_numpy(numbers.positions),
        "kv_slots": torch.from_numpy(numbers.kv_slots),
        LOGIT_ROWS: torch.from_numpy(numbers.logit_rows),
    }
