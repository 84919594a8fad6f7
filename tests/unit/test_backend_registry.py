"""Backends by name: whatever kind they are of, one is chosen, or the reason why none is."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention.registry import BACKENDS as ATTENTION
from lorax_shard.backend_registry import BackendRegistry
from lorax_shard.fused.registry import BACKENDS as ELEMENTWISE
from lorax_shard.linear.registry import BACKENDS as LINEAR
from lorax_shard.lora.registry import BACKENDS as LORA

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Fast:
    reason: ClassVar[str | None] = None

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        return cls.reason


class Slow(Fast):
    reason = None


class Broken(Fast):
    reason = "it is broken"


@pytest.fixture
def registry() -> BackendRegistry[Fast]:
    classes = {name.lower(): f"{__name__}:{name}" for name in ("Fast", "Slow", "Broken")}
    classes["absent"] = "no_such_package.at_all:Backend"
    return BackendRegistry("toy", classes, {"cpu": ("absent", "broken", "slow")}, ("fast", "slow"))


@pytest.mark.parametrize("each", [ATTENTION, LORA, LINEAR, ELEMENTWISE], ids=lambda each: each.kind)
def test_all_that_are_named_exist_and_one_runs_here(each: BackendRegistry[Fast]) -> None:
    for name in each.names:
        reason = each.probe(name, CPU, torch.float32)
        assert reason is None or len(reason) > 10
    assert each.runnable(CPU, torch.float32)
    assert each.create("auto", CPU, torch.float32)


def test_auto_takes_the_first_that_runs_and_says_what_it_skipped(
    registry: BackendRegistry[Fast], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert type(registry.create("auto", CPU, torch.float32)) is Slow
        assert type(registry.create("auto", GPU, torch.float32)) is Fast
    assert caplog.messages == [
        (
            "toy backend: slow (not absent: it needs a package that does not import: "
            "No module named 'no_such_package'; not broken: it is broken)"
        ),
        "toy backend: fast",
    ]
    assert [type(each) for each in registry.runnable(CPU, torch.float32)] == [Slow]


def test_what_else_speaks_against_a_backend_counts(registry: BackendRegistry[Fast]) -> None:
    def refusal(backend: type[Fast]) -> str | None:
        return "it is too fast" if backend is Fast else None

    assert type(registry.create("auto", GPU, torch.float32, refusal)) is Slow
    with pytest.raises(StartupError, match="toy backend 'fast' cannot run here: it is too fast"):
        registry.create("fast", GPU, torch.float32, refusal)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fastest", "there is no toy backend 'fastest'; choose auto or one of fast, slow, broken"),
        (
            "broken",
            "the toy backend 'broken' cannot run here: it is broken; choose auto or another",
        ),
        ("absent", "'absent' cannot run here: it needs a package that does not import"),
    ],
)
def test_a_name_that_is_unknown_or_cannot_run_is_refused(
    name: str, words: str, registry: BackendRegistry[Fast]
) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        registry.create(name, CPU, torch.float32)
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE


def test_where_nothing_runs_all_reasons_are_told() -> None:
    classes = {"one": f"{__name__}:Broken", "other": f"{__name__}:Broken"}
    registry = BackendRegistry[Fast]("toy", classes, {}, ("one", "other"))
    words = "no toy backend can run here: one: it is broken; other: it is broken"
    with pytest.raises(StartupError, match=words) as caught:
        registry.create("auto", CPU, torch.float32)
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE
