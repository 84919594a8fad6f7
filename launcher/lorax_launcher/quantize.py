"""What ``--quantize`` asks for: LoRAX's names and ours, each served, mapped or refused."""

from __future__ import annotations

from typing import NamedTuple

from lorax_contract.config import Device, Quantize
from lorax_launcher.options import LauncherOptions, UsageError

# What to do instead, at the end of each refusal.
_ON_CPU = "use --quantize int8, or --quantize gguf with a GGUF file"
_PACKAGES = "its kernels come with packages for CUDA that are not used here"
_STATIC = (
    "it is how a checkpoint is stored, in the order of kernels for CUDA; serve the model that it was "
    "made from"
)
_NO_GPU = (
    "quantized weights are computed on CPUs only in this version; serve 16-bit weights with --dtype"
)

# Names that are served as another one, with the reason.
_MAPPED: dict[str, tuple[Quantize, str]] = {
    "bitsandbytes": ("int8", "weights in eight bits with a scale for each output, as with int8"),
    "eetq": ("int8", "EETQ is weights in eight bits with a scale for each output, as int8 is"),
}
# Names of how a checkpoint is stored: it says so itself, and is decoded while it is loaded.
_STORED = ("gptq", "awq")
_REFUSED = {
    "bitsandbytes-nf4": f"{_PACKAGES}; {_ON_CPU}",
    "bitsandbytes-fp4": f"{_PACKAGES}; {_ON_CPU}",
    "hqq-4bit": f"{_PACKAGES}; {_ON_CPU}",
    "hqq-3bit": f"{_PACKAGES}; {_ON_CPU}",
    "hqq-2bit": f"{_PACKAGES}; {_ON_CPU}",
    "exl2": f"{_STATIC}, and {_ON_CPU}",
    "fp8": f"a CPU computes no fp8; leave it out for an FP8 checkpoint, or {_ON_CPU}",
    "fp8-kv": "K and V in fp8 are --kv-cache-dtype fp8_e4m3; leave --quantize out",
}
_OWN: tuple[Quantize, ...] = ("int8", "gguf")
CHOICES = (*_OWN, *_MAPPED, *_STORED, *_REFUSED)


class Quantization(NamedTuple):
    """What the shards are told, and what a person may want to read about it."""

    name: Quantize
    notes: tuple[str, ...] = ()


def resolve_quantize(options: LauncherOptions, device: Device) -> Quantization:
    """Return how weights are stored; UsageError in words for what cannot be."""
    if options.quantize is None:
        return Quantization("none")
    asked = options.quantize.lower()
    if asked == "fp8-kv":
        raise _refused(asked, _REFUSED[asked])
    if asked in _STORED:
        return Quantization("none", (_decoded(asked),))
    if device != "cpu":
        raise _refused(asked, _NO_GPU)
    if asked in _REFUSED:
        raise _refused(asked, _REFUSED[asked])
    if asked in _MAPPED:
        name, reason = _MAPPED[asked]
        found = Quantization(name, (f"--quantize {asked} is served as {name}: {reason}",))
    else:
        own: dict[str, Quantize] = {each: each for each in _OWN}
        found = Quantization(own[asked])
    _check_beside(options, asked, found.name)
    return found


def _check_beside(options: LauncherOptions, asked: str, name: Quantize) -> None:
    """Raise UsageError for other options that contradict it."""
    if options.dtype not in ("auto", "float32"):
        raise _refused(
            asked, f"rows and sums are float32 beside it; leave --dtype {options.dtype} out"
        )
    if options.linear_backend != "auto" or options.disable_custom_kernels:
        other = "--disable-custom-kernels" if options.disable_custom_kernels else "--linear-backend"
        raise _refused(asked, f"quantized weights have a kernel of their own; leave {other} out")
    if name == "gguf" and options.merge_adapter_weights:
        raise _refused(
            asked,
            "weights that an adapter was merged into are no longer those of the file; use "
            "--quantize int8, or leave --merge-adapter-weights out",
        )


def _decoded(asked: str) -> str:
    return (
        f"--quantize {asked} changes nothing: a checkpoint says itself that it is stored so, and is "
        "decoded while it is loaded; it takes the memory of --dtype"
    )


def _refused(asked: str, reason: str) -> UsageError:
    return UsageError(f"--quantize {asked} (QUANTIZE) is refused: {reason}.")
