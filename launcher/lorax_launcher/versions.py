"""What `--env` prints: versions and platform, for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from lorax_launcher.facts import DeviceFacts

_DISTRIBUTIONS = (
    "lorax-py", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "grpcio",
    "protobuf", "fastapi", "uvicorn", "flash-attn", "triton",
)  # fmt: skip


def describe_environment(facts: DeviceFacts) -> list[str]:
    """Return the lines; they hold no environment variables, which may be secret."""
    lines = [
        f"python: {sys.version.split()[0]} ({platform.python_implementation()})",
        f"platform: {platform.platform()}",
        f"cores: {facts.num_cores}",
        f"memory: {facts.memory_bytes / 2**30:.1f} GiB",
    ]
    gpus = [f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in facts.gpus]
    lines.append(f"gpus: {', '.join(gpus) or 'none'}")
    lines.append(f"torch built for CUDA: {'yes' if facts.torch_has_cuda else 'no'}")
    return lines + [f"{name}: {_version(name)}" for name in _DISTRIBUTIONS]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
