"""How servers are asked and how they answer: OpenAI's completions, LoRAX's streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorax_bench.requests import BenchRequest

NAMES = ("openai", "lorax")


class AnswerError(Exception):
    """The server said in its stream that something went wrong."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event brought.

    ``num_tokens`` counts new tokens; ``total`` says how many there are by now, where the
    server counts. An event may bring either, both or neither.
    """

    num_tokens: int = 0
    total: int | None = None
    token_ids: Sequence[int] = ()
    text: str = ""
    prompt_tokens: int | None = None


class ServerApi(Protocol):
    """One way to ask for a stream of tokens."""

    @property
    def path(self) -> str:
        """Where requests are posted to."""

    @property
    def may_end_early(self) -> bool:
        """Whether an answer shorter than asked for is none the worse."""

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """Return the JSON document of a request."""

    def read(self, event: Mapping[str, Any]) -> Piece:
        """Return what an event brought; raises AnswerError if it tells of a fault."""


def _error_text(event: Mapping[str, Any]) -> str:
    """Return the words of an error, which servers wrap in several ways."""
    error = event.get("error", event)
    if isinstance(error, Mapping):
        error = error.get("message") or error
    return str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAI:
    """``/v1/completions`` with token ids for a prompt; adapters are models."""

    model: str
    """The base model's name."""
    adapters: Sequence[str] = ()
    extensions: bool = True
    """Send what vLLM and this server know beyond OpenAI: the text's end is ignored, and each
    event counts the tokens so far. Without it an event counts as one token until the last one
    tells the sum."""

    @property
    def path(self) -> str:
        """Where requests are posted to."""
        return "/v1/completions"

    @property
    def may_end_early(self) -> bool:
        """Whether the end of a text ends the answer."""
        return not self.extensions

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """Return the JSON document of a request."""
        stream_options: dict[str, Any] = {"include_usage": True}
        body: dict[str, Any] = {
            "model": self.model if request.adapter is None else self.adapters[request.adapter],
            "prompt": list(request.prompt_ids), "max_tokens": request.max_tokens, "stream": True,
            "temperature": request.temperature, "stream_options": stream_options,
        }  # fmt: skip
        if request.temperature:
            body |= {"top_p": request.top_p, "seed": request.seed}
        if self.extensions:
            body["ignore_eos"] = True
            stream_options["continuous_usage_stats"] = True
        return body

    def read(self, event: Mapping[str, Any]) -> Piece:
        """Return what an event brought."""
        if "error" in event or "choices" not in event:
            raise AnswerError(_error_text(event))
        choices = event["choices"]
        usage = event.get("usage") or {}
        return Piece(
            num_tokens=1 if choices and choices[0].get("text") else 0,
            total=usage.get("completion_tokens"),
            token_ids=(choices[0].get("token_ids") or ()) if choices else (),
            text=choices[0].get("text") or "" if choices else "",
            prompt_tokens=usage.get("prompt_tokens"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lorax:
    """LoRAX's ``/generate_stream``, which takes texts: ids are decoded, and cut to their number."""

    decode: Callable[[Sequence[int]], str]
    adapters: Sequence[str] = ()
    adapter_source: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of each request."""

    @property
    def path(self) -> str:
        """Where requests are posted to."""
        return "/generate_stream"

    @property
    def may_end_early(self) -> bool:
        """Whether the end of a text ends the answer: never here."""
        return False

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """Return the JSON document of a request."""
        parameters: dict[str, Any] = {
            "max_new_tokens": request.max_tokens, "ignore_eos_token": True,
            "truncate": len(request.prompt_ids), **self.parameters,
        }  # fmt: skip
        if request.temperature:
            parameters |= {
                "do_sample": True, "temperature": request.temperature, "seed": request.seed,
            }  # fmt: skip
            if request.top_p < 1:
                parameters["top_p"] = request.top_p
        if request.adapter is not None:
            parameters["adapter_id"] = self.adapters[request.adapter]
            if self.adapter_source:
                parameters["adapter_source"] = self.adapter_source
        return {"inputs": self.decode(request.prompt_ids), "parameters": parameters}

    def read(self, event: Mapping[str, Any]) -> Piece:
        """Return what an event brought."""
        if "token" not in event:
            raise AnswerError(_error_text(event))
        token = event["token"]
        details = event.get("details") or {}
        return Piece(
            num_tokens=1,
            token_ids=(token["id"],),
            text=token.get("text") or "",
            total=details.get("generated_tokens"),
            prompt_tokens=details.get("prompt_tokens"),
        )
