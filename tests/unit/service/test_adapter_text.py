"""What adapters bring for texts: read once, bounded in bytes, harmful to nobody else."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest
from tests.helpers.adapter_world import adapter_world, fetched
from tests.helpers.child_processes import running_children, running_forks
from tests.helpers.http_app import until, word_tokenizer
from tests.helpers.in_loop import in_loop
from tokenizers import Tokenizer

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_router.service.adapters.text import AdapterText, AdapterTexts
from lorax_router.service.prompts.encoding import TextToEncode
from lorax_router.service.prompts.own_tokenizers import TokenizerLimits
from lorax_router.service.requests import TextPrompt

MIB = 1 << 20


def own_tokenizer(number: int = 0) -> bytes:
    """A tokenizer that has a word of its own, which is token 950 + its number."""
    document = json.loads(word_tokenizer().to_str())
    document["model"]["vocab"][f"own{number}"] = 950 + number
    return json.dumps(document).encode()


def growing_tokenizer() -> bytes:
    """A tokenizer that makes a billion letters of one."""
    document = json.loads(word_tokenizer().to_str())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    document["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 3}
    return json.dumps(document).encode()


class Store:
    """The files of stored adapters, and how often each was read."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.reads: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    def add(self, name: str, **files: bytes) -> None:
        self.files[f"files of {name}"] = {
            {"tokenizer": "tokenizer.json", "template": "chat_template.jinja"}.get(key, key): data
            for key, data in files.items()
        }

    async def __call__(self, digest: str, names: Sequence[str]) -> Mapping[str, bytes]:
        self.reads.update(f"{name} of {digest.removeprefix('files of ')}" for name in names)
        await self.gate.wait()
        if digest not in self.files:
            raise AdapterUnavailableError(Reason.EVICTED, "the files left the disk")
        files = self.files[digest]
        return {name: files[name] for name in names if name in files}


def processes() -> list[psutil.Process]:
    return running_forks("encode_process")


class TextWorld:
    """Adapters' texts over a store."""

    def __init__(self, limits: TokenizerLimits | None) -> None:
        self.store = Store()
        self.texts = AdapterTexts(self.store, limits)

    async def find(self, name: str) -> AdapterText:
        files = tuple(self.store.files.get(f"files of {name}", {}))
        return await self.texts.find(name, fetched(name, text_files=files))

    async def encode(self, name: str, text: str) -> list[int]:
        found = await self.find(name)
        assert found.tokenizer is not None
        return (await found.tokenizer.encode(TextToEncode(text))).ids


@asynccontextmanager
async def text_world(limits: TokenizerLimits | None = None) -> AsyncIterator[TextWorld]:
    world = TextWorld(limits)
    try:
        yield world
    finally:
        await world.texts.close()
        assert running_children("encode_process") == []


def encoded(raw: bytes, text: str) -> list[int]:
    return list(Tokenizer.from_buffer(raw).encode(text).ids)


@in_loop
async def test_first_requests_share_one_reading_of_a_tokenizer() -> None:
    async with text_world() as world:
        world.store.add("a", tokenizer=own_tokenizer(), template=b"T")
        world.store.gate.clear()
        texts = [f"w{number} own0" for number in range(50)]
        tasks = [asyncio.create_task(world.encode("a", text)) for text in texts]
        await until(lambda: world.store.reads)
        # The one that began it may leave: the others have it all the same.
        tasks.pop(0).cancel()
        world.store.gate.set()
        assert await asyncio.gather(*tasks) == [[900, n, 950] for n in range(1, 50)]
        assert world.store.reads == {"tokenizer.json of a": 1, "chat_template.jinja of a": 1}
        assert len(processes()) == 1


@in_loop
async def test_ids_are_those_of_the_library() -> None:
    raw = own_tokenizer(3)
    async with text_world() as world:
        world.store.add("a", tokenizer=raw)
        tokenizer = (await world.find("a")).tokenizer
        assert tokenizer is not None
        for text in ("w1 own3 w2", "", "ü unknown 🙂\n\x00w5", "w7 " * 20_000):
            assert (await tokenizer.encode(TextToEncode(text))).ids == encoded(raw, text)
        asked = TextToEncode("w1 w2", add_special_tokens=False, cut_to=1, with_spans=True)
        assert await tokenizer.encode(asked) == ([1], 0, [(0, 2)])


@in_loop
async def test_tokenizers_are_held_within_their_bytes_and_read_again() -> None:
    raw = [own_tokenizer(number) for number in range(6)]
    # Room for two: each takes a few times its file, and 4 MiB beside that.
    room = 2 * (5 * max(map(len, raw)) + 4 * MIB)
    async with text_world(TokenizerLimits(cache_bytes=room, num_processes=1)) as world:
        for number in range(6):
            world.store.add(f"a{number}", tokenizer=raw[number])
        for _ in range(2):
            for number in range(6):
                assert await world.encode(f"a{number}", f"own{number}") == [900, 950 + number]
        assert world.store.reads["tokenizer.json of a0"] == 2
        assert await world.encode("a5", "own5") == [900, 955]
        assert await world.encode("a4", "own4") == [900, 954]
        assert world.store.reads["tokenizer.json of a5"] == 2
        # All at once drive each other out and are served all the same.
        tasks = [world.encode(f"a{number}", f"own{number}") for number in range(6)]
        answers = await asyncio.gather(*tasks)
        assert answers == [[900, 950 + number] for number in range(6)]


@in_loop
async def test_a_tokenizer_larger_than_the_cache_is_refused_in_words() -> None:
    async with text_world(TokenizerLimits(cache_bytes=5 * MIB)) as world:
        world.store.add("a", tokenizer=own_tokenizer() + b" " * MIB)
        with pytest.raises(AdapterUnavailableError, match="the tokenizer of adapter a cannot be"):
            await world.find("a")


@pytest.mark.parametrize("raw", [b"{}", b"\xff", b"[" * 100_000, b""])
@in_loop
async def test_a_damaged_tokenizer_is_refused_in_words(raw: bytes) -> None:
    async with text_world() as world:
        world.store.add("a", tokenizer=raw)
        world.store.add("b", tokenizer=own_tokenizer())
        for _ in range(3):
            with pytest.raises(AdapterUnavailableError, match="tokenizer of adapter a") as caught:
                await world.find("a")
            assert caught.value.reason is Reason.REFUSED
            assert await world.encode("b", "own0") == [900, 950]


@in_loop
async def test_a_tokenizer_that_takes_all_memory_ends_its_process_alone() -> None:
    limits = TokenizerLimits(cache_bytes=64 * MIB, reading_bytes=64 * MIB, num_processes=1)
    async with text_world(limits) as world:
        world.store.add("a", tokenizer=growing_tokenizer())
        world.store.add("b", tokenizer=own_tokenizer())
        for _ in range(2):
            with pytest.raises(AdapterUnavailableError, match="of adapter a ends the process"):
                await world.encode("a", "a" * 32)
            assert await world.encode("b", "own0") == [900, 950]
        with pytest.raises(AdapterUnavailableError, match="it is not used for 60 seconds"):
            await world.encode("a", "a")


@in_loop
async def test_templates_are_held_and_told_with_the_name_that_was_asked_for() -> None:
    async with text_world() as world:
        world.store.add("a", template=b"{{ 9**(9**9) }}")
        assert (await world.find("a")).chat_template.owner == "adapter a"
        again = await world.texts.find("b", fetched("a", text_files=("chat_template.jinja",)))
        assert again.chat_template.owner == "adapter b"
        assert again.tokenizer is None
        assert world.store.reads == {"chat_template.jinja of a": 1}
        world.texts.forget("files of a")
        await world.find("a")
        assert world.store.reads == {"chat_template.jinja of a": 2}
        assert await world.find("none") == AdapterText()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"template": b"\xff"}, "cannot be read"),
        ({"tokenizer_config.json": b"["}, "cannot be read"),
        ({"tokenizer_config.json": b"[" * 100_000}, "cannot be read"),
        ({"tokenizer_config.json": b" " * (3 * MIB)}, "has 3145728 bytes; the limit is 2097152"),
    ],
)
@in_loop
async def test_files_that_cannot_be_read_are_refused(files: dict[str, Any], reason: str) -> None:
    async with text_world() as world:
        world.store.add("a", **files)
        with pytest.raises(AdapterUnavailableError, match=f"adapter a.* {reason}"):
            await world.find("a")


@in_loop
async def test_a_tokenizer_whose_file_left_the_disk_is_missed_in_time() -> None:
    limits = TokenizerLimits(cache_bytes=5 * MIB, num_processes=1)
    async with text_world(limits) as world:
        world.store.add("a", tokenizer=own_tokenizer())
        world.store.add("b", tokenizer=own_tokenizer())
        assert await world.encode("a", "own0") == [900, 950]
        assert await world.encode("b", "own0") == [900, 950]
        del world.store.files["files of a"]
        # Before the request is placed: there is time to fetch it again.
        with pytest.raises(AdapterUnavailableError) as caught:
            await world.texts.find("a", fetched("a", text_files=("tokenizer.json",)))
        assert caught.value.reason is Reason.EVICTED


@in_loop
async def test_a_request_is_tokenized_by_its_adapters_tokenizer() -> None:
    async with adapter_world() as world:
        world.shard.texts["files of a"] = {"tokenizer.json": own_tokenizer()}
        world.sources.contents["a"] = fetched("a", text_files=("tokenizer.json",))
        for name in ("a", None):
            request = replace(world.request(name), prompt=TextPrompt("own0 w1"))
            await world.parts.service.generate(request)
        prompts = [new.spec.prompt_ids for plan in world.shard.steps for new in plan.new_rows]
        assert [list(ids) for ids in prompts] == [[900, 950, 1], [900, 901, 1]]


@in_loop
async def test_an_adapter_whose_files_left_the_disk_is_fetched_again_for_its_texts() -> None:
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("a", text_files=("tokenizer.json",))

        class Texts(dict[str, dict[str, bytes]]):
            """Has files once they were fetched a second time."""

            def get(self, *asked: Any) -> Any:
                if len(world.shard.queries) < 2:
                    raise AdapterUnavailableError(Reason.EVICTED, "the files left the disk")
                return super().get(*asked)

        world.shard.texts = Texts({"files of a": {"tokenizer.json": own_tokenizer()}})
        await world.generate("a")
        assert [query.refresh for query in world.shard.queries] == [False, True]
