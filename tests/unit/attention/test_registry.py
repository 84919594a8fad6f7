import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import cpp, registry, sdpa
from lorax_shard.attention.backend import AttentionBackend, AttentionLayer
from lorax_shard.attention.kv_cache import KVShape

CPU = torch.device("cpu")


def refusal(name: str, dtype: torch.dtype = torch.float32) -> StartupError:
    with pytest.raises(StartupError) as caught:
        registry.create(name, CPU, dtype)
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE
    return caught.value


def test_unknown_backend_names_the_choices() -> None:
    assert "auto or one of flash, triton, tiles, cpp, sdpa, torch" in str(refusal("flashy"))


def test_explicit_choice_that_cannot_run_says_why() -> None:
    assert "it computes float32, not bfloat16" in str(refusal("cpp", torch.bfloat16))


def test_auto_passes_over_what_cannot_run_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = registry.create("auto", CPU, torch.bfloat16)
    assert backend.name == "sdpa"
    assert "attention backend: sdpa (not tiles: it computes float32" in caplog.text
    assert "; not cpp: it computes float32" in caplog.text


class Plain(AttentionBackend):
    """Computes layers without sinks."""

    name = "plain"
    is_partial = True
    attend = sdpa.SdpaAttention.attend

    @classmethod
    def supports(
        cls, layer: AttentionLayer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        return "it knows no sinks" if layer.has_sinks else None


LAYERS = [AttentionLayer(4, KVShape(2, 8, 8), 16), AttentionLayer(4, KVShape(2, 8, 8), 16, 32)]
WITH_SINKS = [*LAYERS, LAYERS[0]._replace(has_sinks=True)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS.classes, "plain", f"{__name__}:Plain")
    monkeypatch.setitem(registry.BACKENDS.order, "cpu", ("plain", "sdpa"))


@pytest.mark.usefixtures("plain")
def test_auto_takes_the_first_that_computes_all_layers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert registry.create("auto", CPU, torch.float32, LAYERS).name == "plain"
        assert registry.create("auto", CPU, torch.float32, WITH_SINKS).name == "sdpa"
    assert "attention backend: sdpa (not plain: it knows no sinks)" in caplog.text


@pytest.mark.usefixtures("plain")
def test_auto_takes_no_chances_with_layers_it_does_not_know() -> None:
    assert registry.create("auto", CPU, torch.float32).name == "sdpa"


@pytest.mark.usefixtures("plain")
def test_a_named_backend_that_cannot_compute_a_layer_is_refused() -> None:
    assert registry.create("plain", CPU, torch.float32, LAYERS).name == "plain"
    with pytest.raises(StartupError, match="'plain' cannot run here: it knows no sinks"):
        registry.create("plain", CPU, torch.float32, WITH_SINKS)


def test_gpu_backends_say_that_they_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it computes on a GPU, not on cpu" in str(refusal("flash"))
    # What kernels are is settled when they are imported: as the others in this process need them.
    registry.BACKENDS.probe("triton", CPU, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "it computes on a GPU, not on cpu" in str(refusal("triton"))


def test_triton_says_what_it_and_its_interpreter_cannot_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "cannot multiply bfloat16" in str(refusal("triton", torch.bfloat16))
    assert "it does not compute float64" in str(refusal("triton", torch.float64))
    assert registry.BACKENDS.probe("triton", torch.device("cuda"), torch.bfloat16) is None


@pytest.fixture
def fresh_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    cpp._library.cache_clear()
    yield
    cpp._library.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
def test_cpp_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler is installed" in str(refusal("cpp"))


@pytest.mark.usefixtures("fresh_kernel")
def test_cpp_with_a_failing_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'cannot open the source' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "broken-compiler failed: cannot open the source" in str(refusal("cpp"))


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
@pytest.mark.usefixtures("fresh_kernel")
def test_cpp_without_a_writable_cache_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels").write_text("a file, not a folder")
    assert "cannot be stored or loaded" in str(refusal("cpp"))
