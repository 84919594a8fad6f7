"""LoRAX's options that this version does not serve: each is known, and refused with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorax_launcher.options import UsageError

_NGROK = "the server opens no tunnel; run one of your own to --port"
_GRAPHS = "a GPU replays decode steps as CUDA graphs without it; leave it out, or switch them off by --eager"


@dataclass(frozen=True, slots=True)
class Refused:
    """One option of LoRAX's launcher that is refused, with what to use instead."""

    flag: str
    reason: str
    # It is given without a value.
    is_switch: bool = False
    # Values that ask for what happens anyway: they are granted, not swallowed.
    granted: tuple[str, ...] = ()
    # LoRAX's own defaults ask for no more than a start without the option: granted, and said.
    defaults: tuple[str, ...] = ()
    secret: bool = False
    # A later version is to serve it.
    comes_later: bool = False

    @property
    def sentence(self) -> str:
        """The reason, and whether it stays."""
        return f"{self.reason}{'. A later version has it.' if self.comes_later else '.'}"

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
        "Predibase is no source here; fetch the model and pass its folder to --model-id, adapters "
        "with the source local",
        secret=True,
    ),
    Refused("--compile", _GRAPHS, is_switch=True, granted=("true",)),
    Refused(
        "--compile-batch-size",
        "graphs of all numbers of requests up to --compile-max-batch-size are captured; leave it out",
        defaults=("32",),
    ),
    Refused(
        "--backend",
        "its choices are other ones here; use --attention-backend",
        defaults=("fa2",),
    ),
    Refused(
        "--chunked-prefill",
        "prompts are always computed in chunks of --max-batch-prefill-tokens; leave it out or "
        "say true",
        granted=("true",),
        defaults=("false",),
    ),
    Refused(
        "--embedding-dim",
        "each request says how many numbers of a vector it wants (`dimensions`)",
    ),
    Refused(
        "--weights-cache-override",
        "weights, configuration and tokenizer lie in one folder; pass it to --model-id",
    ),
    Refused("--ngrok", _NGROK, is_switch=True),
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


def check_refused(given: Mapping[str, object], environment: Mapping[str, str]) -> list[str]:
    """Raise UsageError for the first refused option or variable that was given.

    ``given`` maps option names to their parsed values; None, False and () mean "not given".
    Returns a line for each option that was granted and changes nothing.
    """
    notes: list[str] = []
    for option in REFUSED_OPTIONS:
        value = given.get(option.name)
        if value in (None, False, (), "") or _is_one_of(value, option.granted):
            continue
        if not _is_one_of(value, option.defaults):
            raise UsageError(f"{option.flag} ({option.envvar}) is refused: {option.sentence}")
        notes.append(f"{option.flag} has no effect: {option.reason}")
    for variable in REFUSED_VARIABLES:
        if environment.get(variable.name):
            raise UsageError(f"{variable.name} is refused: {variable.reason}.")
    return notes


def _is_one_of(value: object, values: tuple[str, ...]) -> bool:
    text = str(value).strip().lower()
    return text in values or _number(text) in [_number(each) for each in values if _number(each)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
