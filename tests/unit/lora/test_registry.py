"""The choice of a LoRA backend."""

from __future__ import annotations

import logging

import pytest
import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.lora import cpp, registry

CPU = torch.device("cpu")


def test_an_unknown_name_is_refused_with_the_names() -> None:
    with pytest.raises(StartupError, match="choose auto or one of triton, cpp, cpu, torch") as info:
        registry.create("punica", CPU, torch.float32)
    assert info.value.exit_code is ExitCode.BACKEND_UNAVAILABLE


def test_a_named_backend_that_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(StartupError, match="computes float32, not bfloat16"):
        registry.create("cpp", CPU, torch.bfloat16)


def test_auto_takes_the_best_and_says_what_it_skipped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert registry.create("auto", CPU, torch.bfloat16).name == "cpu"
    assert "LoRA backend: cpu (not cpp: it computes float32, not bfloat16)" in caplog.text


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.create("auto", CPU, torch.float32).name in {"cpp", "cpu"}


def test_a_backend_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._CLASSES, "cpu", "no_such_package.at_all:Backend")
    assert "does not import" in str(registry.probe("cpu", CPU, torch.float32))


def test_cpp_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    cpp._kernel.cache_clear()
    try:
        assert "no C++ compiler" in str(registry.probe("cpp", CPU, torch.float32))
        assert registry.create("auto", CPU, torch.float32).name == "cpu"
    finally:
        cpp._kernel.cache_clear()
