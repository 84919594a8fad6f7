"""LoRAX's options that this version does not serve: each is known, and refused with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from lorax_launcher.options import UsageError

_QUANTIZED = "quantization is not in this version; use --dtype, or a smaller model"
_SPECULATION = "speculative decoding is not in this version; leave it out"
_NGROK = "tunnels are not in this version; run a tunnel of your own to --port"
_KERNELS = "no custom kernels are loaded unasked; choose one with --attention-backend"
_GRAPHS = "CUDA graphs are not in this version; leave it out"


class Shape(Enum):
    """How an option is written."""

    VALUE = "value"
    FLAG = "flag"
    REPEATED = "repeated"


@dataclass(frozen=True, slots=True)
class Refused:
    """One option of LoRAX's launcher that is refused, with what to use instead."""

    flag: str
    reason: str
    shape: Shape = Shape.VALUE
    # Values that ask for what happens anyway: they are granted, not swallowed.
    granted: tuple[str, ...] = ()
    secret: bool = False

    @property
    def name(self) -> str:
        """The option's name as a Python identifier."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def envvar(self) -> str:
        """The environment variable that sets the option."""
        return self.name.upper()


@dataclass(frozen=True, slots=True)
class RefusedVariable:
    """An environment variable that LoRAX reads beside its options and that is refused."""

    name: str
    reason: str


REFUSED_OPTIONS: tuple[Refused, ...] = (
    Refused(
        "--predibase-api-token",
        "Predibase is no source of models here; fetch the model and pass its folder to --model-id",
        secret=True,
    ),
    Refused("--quantize", _QUANTIZED),
    Refused("--compile", _GRAPHS, Shape.FLAG),
    Refused("--eager", _GRAPHS, Shape.FLAG, granted=("true",)),
    Refused("--compile-max-batch-size", _GRAPHS),
    Refused("--compile-max-rank", _GRAPHS),
    Refused("--compile-batch-size", _GRAPHS),
    Refused("--speculative-tokens", _SPECULATION, granted=("0",)),
    Refused("--speculation-max-batch-size", _SPECULATION),
    Refused("--backend", "its choices are other ones here; use --attention-backend"),
    Refused(
        "--prefix-caching",
        "prefix caching is not in this version; leave it out or say false",
        granted=("false",),
    ),
    Refused(
        "--chunked-prefill",
        "prompts are always computed in chunks of --max-batch-prefill-tokens; leave it out or "
        "say true",
        granted=("true",),
    ),
    Refused("--embedding-dim", "embeddings are not in this version; it generates text only"),
    Refused("--weights-cache-override", "weights are prepared in one place; use --cache-dir"),
    Refused("--disable-custom-kernels", _KERNELS, Shape.FLAG),
    Refused("--disable-sgmv", "there is no SGMV kernel to disable; see --lora-backend", Shape.FLAG),
    Refused("--otlp-endpoint", "tracing is not in this version; use the router's /metrics"),
    Refused("--watermark-gamma", "watermarks are not in this version; leave it out"),
    Refused("--watermark-delta", "watermarks are not in this version; leave it out"),
    Refused("--ngrok", _NGROK, Shape.FLAG),
    Refused("--ngrok-authtoken", _NGROK, secret=True),
    Refused("--ngrok-edge", _NGROK),
)

REFUSED_VARIABLES: tuple[RefusedVariable, ...] = (
    RefusedVariable(
        "ROPE_SCALING", "positions follow the model; set rope_scaling in its config.json"
    ),
    RefusedVariable(
        "REQUEST_LOGGER_URL", "requests are never sent elsewhere; use the log of the router"
    ),
    RefusedVariable("LORAX_PROFILER_DIR", "profiles are not in this version; leave it out"),
)


def check_refused(given: Mapping[str, object], environment: Mapping[str, str]) -> None:
    """Raise UsageError for the first refused option or variable that was given.

    ``given`` maps option names to their parsed values; None, False and () mean "not given".
    """
    for option in REFUSED_OPTIONS:
        value = given.get(option.name)
        if value in (None, False, (), "") or str(value).lower() in option.granted:
            continue
        raise UsageError(f"{option.flag} ({option.envvar}) is refused: {option.reason}.")
    for variable in REFUSED_VARIABLES:
        if environment.get(variable.name):
            raise UsageError(f"{variable.name} is refused: {variable.reason}.")
