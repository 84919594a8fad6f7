"""Who is asked: a server at an address, or one of ours that is started for it."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_bench.adapters import RANKS
from lorax_bench.apis import Lorax, OpenAI, ServerApi
from lorax_bench.drive import Target
from lorax_bench.serve import started
from lorax_bench.shapes import LAST_ID


class SystemOptionsError(Exception):
    """The server cannot be asked like that; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSystem:
    """A system that answers."""

    name: str
    target: Target
    last_id: int = LAST_ID
    """The highest id of its vocabulary that prompts may have."""
    pid: int | None = None
    """Its first process, where it runs for this alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemOptions:
    """How the system is found and asked."""

    url: str | None = None
    api: str = "openai"
    name: str | None = None
    model: str | None = None
    adapters: Sequence[str] = ()
    adapter_source: str | None = None
    tokenizer: Path | None = None
    extensions: bool = True
    timeout_s: float = 600.0
    api_key: str | None = None
    last_id: int | None = None
    ranks: tuple[int, ...] = RANKS
    adapter_dtype: str = "float32"
    launcher_options: Sequence[str] = ()

    def check(self, num_adapters: int) -> None:
        """Raise SystemOptionsError for what does not go together."""
        if self.url is None:
            if self.adapters:
                raise SystemOptionsError(
                    "--adapter names adapters of a server; --url must say which"
                )
            return
        if self.launcher_options:
            raise SystemOptionsError(
                "options after -- are for a server that is started; leave --url out"
            )
        if len(self.adapters) < num_adapters:
            raise SystemOptionsError(
                f"the workload asks for {num_adapters} adapters, but --adapter names "
                f"{len(self.adapters)}"
            )
        if self.api == "lorax" and self.tokenizer is None:
            raise SystemOptionsError(
                "LoRAX's API takes texts: --tokenizer must give the model's tokenizer.json"
            )


@contextlib.contextmanager
def asked_system(options: SystemOptions, num_adapters: int) -> Iterator[AskedSystem]:
    """Return the system, ready to be asked for so many adapters; what was started is ended."""
    options.check(num_adapters)
    if options.url is not None:
        yield AskedSystem(
            name=options.name or options.url,
            target=_target(options, options.url, options.model, options.adapters),
            last_id=options.last_id or LAST_ID,
        )
        return
    with started(
        options.launcher_options, num_adapters=num_adapters, ranks=options.ranks,
        dtype=options.adapter_dtype,
    ) as server:  # fmt: skip
        vocabulary = json.loads((server.model_dir / "config.json").read_text())["vocab_size"]
        tokenizer = options.tokenizer or server.model_dir / "tokenizer.json"
        yield AskedSystem(
            name=options.name or "lorax-py",
            target=_target(options, server.url, server.model, server.adapters, tokenizer),
            last_id=options.last_id or min(LAST_ID, vocabulary - 1),
            pid=server.pid,
        )


def _target(
    options: SystemOptions, url: str, model: str | None, adapters: Sequence[str],
    tokenizer: Path | None = None,
) -> Target:  # fmt: skip
    return Target(
        url=url, api=_api(options, url, model, adapters, tokenizer or options.tokenizer),
        timeout_s=options.timeout_s, api_key=options.api_key,
    )  # fmt: skip


def _api(
    options: SystemOptions, url: str, model: str | None, adapters: Sequence[str],
    tokenizer: Path | None,
) -> ServerApi:  # fmt: skip
    if options.api == "openai":
        name = model if model is not None else first_model(url, options.api_key)
        return OpenAI(model=name, adapters=adapters, extensions=options.extensions)
    source = options.adapter_source
    if options.url is None:
        # Ids of the server's own are written with their source in front.
        source, adapters = "local", [each.removeprefix("local:") for each in adapters]
    assert tokenizer is not None
    return Lorax(decode=decoder(tokenizer), adapters=adapters, adapter_source=source)


def first_model(url: str, api_key: str | None = None) -> str:
    """Return the model that a server lists first, which is the base of those that have adapters."""
    request = urllib.request.Request(url.rstrip("/") + "/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.loads(response.read())["data"][0]["id"])
    except (OSError, urllib.error.URLError) as error:
        raise SystemOptionsError(f"{url} does not answer: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise SystemOptionsError(f"{url} lists no models; --model must name one") from None


def decoder(tokenizer: Path) -> Callable[[Sequence[int]], str]:
    """Return what makes a text of ids, by a tokenizer's file."""
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise SystemOptionsError(f"{tokenizer} is no tokenizer's file: {error}") from None

    def decode(ids: Sequence[int]) -> str:
        return str(known.decode(list(ids), skip_special_tokens=False))

    return decode
