"""N ranks beside one: logits of prompts and of what is generated, and the tokens chosen.

Rows use adapters of several ranks, or none. What follows a prompt is chosen by one rank and given
to N, so that every position has a reference. In float32 N ranks must choose the same token there,
but for near ties, where one rank's two scores lie closer than four times what scores usually differ
by (of each position the largest difference, of these the median); in 16 bits others are counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench.gpu_check.models import BLOCK_SIZE
from bench.gpu_check.parity import FAMILIES, LENGTHS, RANKS, TOLERANCES, errors, step
from bench.gpu_check.ranks import group
from bench.gpu_check.ranks.group import RankSeat
from bench.gpu_check.report import FAILED, Report
from safetensors.torch import load_file, save_file
from tests.helpers.tiny_models import make_tiny_model

from lorax_shard.model.hf_model import HFPagedModel

NUM_NEW_TOKENS = 24
_COLUMNS = (
    "model", "dtype", "ranks", "median error", "largest", "counted", "allowed", "between ranks",
    "tokens", "near ties", "other tokens",
)  # fmt: skip
_DTYPES = {str(dtype)[6:]: dtype for dtype in TOLERANCES}


class TokenVerdict(NamedTuple):
    """How the tokens that N ranks choose compare with one rank's."""

    num_tokens: int
    num_near_ties: int
    num_other: int


def run(report: Report, *, small: bool, ranks: int) -> None:
    """Compute every family by one rank and by N, and compare."""
    by = "gloo, on CPUs" if small else "nccl"
    report.note(f"{ranks} ranks over {by}, beside one; adapters of ranks {RANKS} and the base")
    report.table("Error of a token's logits, beside one rank", _COLUMNS)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in families(small):
            make_tiny_model(family, folder / family)
        group.run_group(__name__, 1, folder, small=small)
        several = group.run_group(__name__, ranks, folder, small=small)
        for family in families(small):
            for dtype in _DTYPES:
                key = f"{family}-{dtype}"
                one, *each = (load_file(path / key) for path in (folder / "alone", *several))
                wrong += compare(report, family, dtype, one, each)
    if wrong:
        report.end(FAILED, "; ".join(wrong))


def families(small: bool) -> tuple[str, ...]:
    """Return which are computed."""
    return FAMILIES[:2] if small else FAMILIES


def compute(seat: RankSeat) -> None:
    """Compute all families in all dtypes by this rank, and write logits.

    One rank alone writes them as "alone", with what it chose; a group is given that.
    """
    own = seat.folder / ("alone" if seat.world_size == 1 else f"rank-{seat.rank}")
    own.mkdir()
    for family in families(seat.small):
        for name, dtype in _DTYPES.items():
            key = f"{family}-{name}"
            chosen = None
            if seat.world_size > 1:
                chosen = load_file(seat.folder / "alone" / key)["chosen"]
            part = group.load(seat, seat.folder / family, dtype)
            group.load_adapters(part.model, RANKS)
            save_file(answers(part.model, chosen), own / key)
            part.close()


def answers(model: HFPagedModel, chosen: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the logits of all tokens of all rows, and which tokens follow the prompts.

    Prompts come in two ragged steps, then each row generates. ``chosen`` is rows x new tokens;
    None: the likeliest ones.
    """
    blocks = -(-(max(LENGTHS) + NUM_NEW_TOKENS) // BLOCK_SIZE)
    model.allocate_cache(len(LENGTHS) * blocks, BLOCK_SIZE)
    order = torch.randperm(len(LENGTHS) * blocks, generator=torch.Generator().manual_seed(5))
    tables = order.view(len(LENGTHS), blocks)
    draw = torch.Generator().manual_seed(6)
    ids = [torch.randint(1, model.vocab_size, (n,), generator=draw) for n in LENGTHS]
    done = [0] * len(LENGTHS)
    halves = [max(1, n // 2) for n in LENGTHS]
    rest = [n - half for n, half in zip(LENGTHS, halves, strict=True)]
    logits, last = [], {}
    for place in range(NUM_NEW_TOKENS + 2):
        counts = (halves, rest)[place] if place < 2 else [1] * len(LENGTHS)
        rows = sorted((row for row, n in enumerate(counts) if n), key=lambda row: counts[row] > 1)
        found = step(model, tables, ids, done, {row: counts[row] for row in rows})
        logits.append(found)
        ends = torch.tensor([counts[row] for row in rows]).cumsum(0) - 1
        last |= dict(zip(rows, found[ends], strict=True))
        if place >= 1:
            _extend(ids, last, place - 1, chosen)
    new = torch.stack([each[-NUM_NEW_TOKENS - 1 : -1] for each in ids])
    scores = torch.cat(logits[2:]).view(NUM_NEW_TOKENS, len(LENGTHS), -1)
    return {"logits": torch.cat(logits), "chosen": new.contiguous(), "scores": scores.contiguous()}


def _extend(
    ids: list[torch.Tensor],
    last: dict[int, torch.Tensor],
    place: int,
    chosen: torch.Tensor | None,
) -> None:
    """Append a token to each row: what was chosen by one rank, or what its logits say."""
    for row in range(len(ids)):
        is_given = chosen is not None and place < chosen.shape[1]
        token = chosen[row, place] if chosen is not None and is_given else last[row].argmax()
        ids[row] = torch.cat([ids[row], token.view(1)])


def compare(
    report: Report,
    family: str,
    dtype: str,
    one: dict[str, torch.Tensor],
    several: Sequence[dict[str, torch.Tensor]],
) -> list[str]:
    """Add a line, and return what is wrong with it."""
    error = torch.stack([errors(each["logits"], one["logits"]) for each in several])
    exact, allowed = dtype == "float32", TOLERANCES[_DTYPES[dtype]]
    counted = float(error.max() if exact else error.median())
    apart = max(float((each["logits"] - several[0]["logits"]).abs().max()) for each in several)
    tokens = judge_tokens(one["scores"], several[0]["scores"])
    report.row(
        family, dtype, len(several), float(error.median()), float(error.max()),
        "largest" if exact else "median", allowed, apart, *tokens,
    )  # fmt: skip
    wrong = []
    if not counted <= allowed:
        wrong.append(f"{family} {dtype}: {counted:.2g} from one rank's logits")
    if apart != 0.0:
        wrong.append(f"{family} {dtype}: the ranks' logits are {apart:.2g} apart")
    if exact and tokens.num_other:
        wrong.append(f"{family} {dtype}: {tokens.num_other} tokens are other ones")
    return wrong


def judge_tokens(one: torch.Tensor, several: torch.Tensor) -> TokenVerdict:
    """Compare the likeliest tokens; scores are places x rows x vocabulary."""
    mine, other = one.argmax(-1), several.argmax(-1)
    usual = float((one - several).abs().amax(-1).median())
    gap = (one.max(-1).values - one.gather(-1, other[..., None])[..., 0])[mine != other]
    num_near = int((gap <= 4 * usual).sum())
    return TokenVerdict(mine.numel(), num_near, gap.numel() - num_near)
