"""What an adapter brings for texts: its own tokenizer, its own chat template, or the base's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cachetools import LRUCache

from lorax_contract.adapters import FetchedAdapter, refused
from lorax_router.service.prompts.chat_template import ChatTemplate, template_of_files
from lorax_router.service.prompts.own_tokenizers import OwnTokenizer, OwnTokenizers, TokenizerLimits
from lorax_router.service.single_flight import SingleFlight

TOKENIZER_FILE = "tokenizer.json"
# Where a template and the special tokens that it writes may be.
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")
# Of templates with their special tokens.
_MAX_BYTES = 32 << 20
# Of one entry, beside its text.
_BYTES_BESIDE = 1 << 10

# Of each file; the largest that are known have 1.2 MB.
_MAX_FILE_BYTES = 2 << 20
# How many adapters' files are on their way or being read at the same time.
_NUM_READING = 2

ReadFiles = Callable[[str, Sequence[str]], Awaitable[Mapping[str, bytes]]]


@dataclass(frozen=True, slots=True)
class AdapterText:
    """None: the base's is used."""

    tokenizer: OwnTokenizer | None = None
    chat_template: ChatTemplate | None = None

    @property
    def is_own(self) -> bool:
        """Whether it brings anything."""
        return self.tokenizer is not None or self.chat_template is not None


class AdapterTexts:
    """Finds what adapters bring for texts: read once, however many ask at once.

    Args:
        read: those of the named files that a stored adapter has.
        special_tokens: the model's by name, which templates may write whose files name none.
    """

    def __init__(
        self,
        read: ReadFiles,
        limits: TokenizerLimits | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._read = read
        self._special_tokens = special_tokens
        self._templates: LRUCache[str, ChatTemplate | None] = LRUCache(_MAX_BYTES, _size_of)
        self._reading: SingleFlight[ChatTemplate | None] = SingleFlight()
        self._room = asyncio.Semaphore(_NUM_READING)
        self._tokenizers = OwnTokenizers(self._tokenizer_file, limits)

    async def find(self, name: str, fetched: FetchedAdapter) -> AdapterText:
        """Return what an adapter brings; raises AdapterUnavailableError in words."""
        key, owner = fetched.part.store_digest, f"adapter {name}"
        tokenizer = None
        if TOKENIZER_FILE in fetched.text_files:
            tokenizer = self._tokenizers.get(key, owner)
            await self._tokenizers.ready(tokenizer)
        names = [each for each in fetched.text_files if each in TEMPLATE_FILES]
        template = await self._template(key, owner, names) if names else None
        return AdapterText(tokenizer, None if template is None else template.of(owner))

    def forget(self, store_digest: str) -> None:
        """Free what was read of an adapter; its tokenizer goes when others need its place."""
        self._templates.pop(store_digest, None)

    async def close(self) -> None:
        """End the processes of tokenizers."""
        await self._reading.close()
        await self._tokenizers.close()

    async def _template(self, key: str, owner: str, names: list[str]) -> ChatTemplate | None:
        if key in self._templates:
            return self._templates[key]
        return await self._reading.do(key, partial(self._read_template, key, owner, names))

    async def _read_template(self, key: str, owner: str, names: list[str]) -> ChatTemplate | None:
        async with self._room:
            template = _template(await self._read(key, names), owner, self._special_tokens)
        self._templates[key] = template
        return template

    async def _tokenizer_file(self, key: str) -> bytes:
        files = await self._read(key, [TOKENIZER_FILE])
        return files[TOKENIZER_FILE]


def _template(
    files: Mapping[str, bytes], owner: str, special_tokens: Mapping[str, str] | None
) -> ChatTemplate | None:
    for name, raw in files.items():
        if len(raw) > _MAX_FILE_BYTES:
            raise refused(
                f"{owner}: its {name} has {len(raw)} bytes; the limit is {_MAX_FILE_BYTES}"
            )
    try:
        return template_of_files(files, owner, special_tokens)
    except (ValueError, RecursionError) as error:
        raise refused(f"{owner}: its chat template cannot be read: {error}") from error


def _size_of(template: ChatTemplate | None) -> int:
    return _BYTES_BESIDE if template is None else _BYTES_BESIDE + 4 * template.num_chars
