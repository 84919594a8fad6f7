"""What ``--quantize`` asks for: LoRAX's names and ours, each served, mapped or refused."""

from __future__ import annotations

from typing import NamedTuple

from lorax_contract.config import Device, Quantize
from lorax_launcher.options import LauncherOptions, UsageError

# What to do instead, at the end of each refusal.
_INSTEAD: dict[Device, str] = {
    "cpu": "use --quantize int8, or --quantize gguf with a GGUF file",
    "cuda": "use --quantize int4, or --quantize fp8 on GPUs from Ada and Hopper on",
}
_PACKAGES = "its kernels come with packages for CUDA that are not used here"
_STATIC = (
    "it is how a checkpoint is stored, in the order of kernels for CUDA; serve the model that it was "
    "made from, and"
)
_EIGHT_BITS = (
    "its kernels come with packages for CUDA that are not used here, and int8 is computed on CPUs"
)
_FOUR_BITS = "weights in four bits with a scale for each group of inputs, as with int4"

# What each device computes by this name.
_OWN: dict[Device, tuple[Quantize, ...]] = {"cpu": ("int8", "gguf"), "cuda": ("fp8", "int4")}
# Names that are served as another one, with the reason.
_MAPPED: dict[Device, dict[str, tuple[Quantize, str]]] = {
    "cpu": {
        "bitsandbytes": (
            "int8",
            "weights in eight bits with a scale for each output, as with int8",
        ),
        "eetq": ("int8", "EETQ is weights in eight bits with a scale for each output, as int8 is"),
    },
    "cuda": {
        "bitsandbytes-nf4": ("int4", _FOUR_BITS),
        "bitsandbytes-fp4": ("int4", _FOUR_BITS),
        "hqq-4bit": ("int4", _FOUR_BITS),
    },
}
# Names of how a checkpoint is stored: it says so itself, and is decoded while it is loaded.
_STORED = ("gptq", "awq")
# Why the others are refused; what to do instead comes behind it.
_REFUSED: dict[Device, dict[str, str]] = {
    "cpu": {
        "bitsandbytes-nf4": f"{_PACKAGES};",
        "bitsandbytes-fp4": f"{_PACKAGES};",
        "hqq-4bit": f"{_PACKAGES};",
        "fp8": "a CPU computes no fp8; leave it out for an FP8 checkpoint, or",
        "int4": "it is computed on GPUs;",
    },
    "cuda": {
        "bitsandbytes": f"{_EIGHT_BITS};",
        "eetq": f"{_EIGHT_BITS};",
        "int8": "it is computed on CPUs;",
        "gguf": "blocks of GGUF files are computed on CPUs;",
    },
}
_REFUSED_EVERYWHERE = {
    "hqq-3bit": f"{_PACKAGES};",
    "hqq-2bit": f"{_PACKAGES};",
    "exl2": _STATIC,
}
_KV = "fp8-kv"
CHOICES = (
    "int8", "gguf", "fp8", "int4", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "eetq",
    *_STORED, "hqq-4bit", *_REFUSED_EVERYWHERE, _KV,
)  # fmt: skip


class Quantization(NamedTuple):
    """What the shards are told, and what a person may want to read about it."""

    name: Quantize
    notes: tuple[str, ...] = ()


def resolve_quantize(options: LauncherOptions, device: Device) -> Quantization:
    """Return how weights are stored; UsageError in words for what cannot be."""
    if options.quantize is None:
        return Quantization("none")
    asked = options.quantize.lower()
    if asked == _KV:
        raise _refused(asked, "K and V in fp8 are --kv-cache-dtype fp8_e4m3; leave --quantize out")
    if asked in _STORED:
        return Quantization("none", (_decoded(asked),))
    if reason := {**_REFUSED_EVERYWHERE, **_REFUSED[device]}.get(asked):
        raise _refused(asked, f"{reason} {_INSTEAD[device]}")
    found = _served(asked, device)
    _check_beside(options, asked, found.name)
    return found


def _served(asked: str, device: Device) -> Quantization:
    own: dict[str, Quantize] = {each: each for each in _OWN[device]}
    if asked in own:
        return Quantization(own[asked])
    name, reason = _MAPPED[device][asked]
    return Quantization(name, (f"--quantize {asked} is served as {name}: {reason}",))


def _check_beside(options: LauncherOptions, asked: str, name: Quantize) -> None:
    """Raise UsageError for other options that contradict it."""
    rows = "bfloat16" if name in _OWN["cuda"] else "float32"
    if options.dtype not in ("auto", rows):
        raise _refused(asked, f"rows are {rows} beside it; leave --dtype {options.dtype} out")
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
