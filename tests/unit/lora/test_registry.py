"""The choice of a LoRA backend."""

from __future__ import annotations

import logging

import pytest
import torch

from lorax_shard.lora import cpp
from lorax_shard.lora.registry import BACKENDS

CPU = torch.device("cpu")


def test_auto_takes_the_best_and_says_what_it_skipped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert BACKENDS.create("auto", CPU, torch.bfloat16).name == "cpu"
    assert "LoRA backend: cpu (not cpp: it computes float32, not bfloat16)" in caplog.text


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKENDS.create("auto", CPU, torch.float32).name in {"cpp", "cpu"}


def test_cpp_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    cpp._library.cache_clear()
    try:
        assert "no C++ compiler" in str(BACKENDS.probe("cpp", CPU, torch.float32))
        assert BACKENDS.create("auto", CPU, torch.float32).name == "cpu"
    finally:
        cpp._library.cache_clear()
