"""The prefix cache: random operations on the core, and chats, tenants and adapters on a server.

``python -m tests.acceptance.scheduling.prefix`` runs these points alone.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from tests.acceptance.harness import SHARED, Point, Result, run_points
from tests.acceptance.serve import ROOT, run_tests
from tests.helpers.server import Server
from tests.helpers.tenants import ADMIN_KEY, bearer, key_of, keys_file

_BLOCK = 16
_NUM_SHARING = 32
# Tokens of the template between what is said, and of a block that is not full.
_MOST_NEW = 3 * _BLOCK
_ADAPTERS = ROOT / "examples" / "adapters"


class Site:
    """A server of the default model with two tenants, and a folder of adapters."""

    def __init__(self, folder: Path) -> None:
        self.adapters = folder / "adapters"
        self.adapters.mkdir()
        keys = keys_file(folder / "keys.json", ant={}, bee={})
        options = ["--api-keys-file", str(keys), "--adapter-local-root", str(self.adapters)]
        server = Server(*options, env=os.environ | {"LORAX_ADMIN_API_KEY": ADMIN_KEY})
        self._server = SHARED.enter_context(server)

    def ask(self, path: str, body: dict[str, Any], tenant: str = "ant", **head: str) -> Any:
        """Return an answer."""
        return self._post(self._server.url + path, body, bearer(key_of(tenant)) | head)

    def _post(self, url: str, body: dict[str, Any], head: dict[str, str]) -> Any:
        head = {"content-type": "application/json", **head}
        asked = urllib.request.Request(url, json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.loads(answer.read())

    def chat(self, messages: list[dict[str, str]], model: str = "", **head: str) -> Any:
        """Return the answer to a chat."""
        body = {"model": model or "tgi", "messages": messages, "max_tokens": 40, "temperature": 0}
        return self.ask("/v1/chat/completions", body, **head)

    def place(self, name: str, adapter: str) -> None:
        """Have a name of a folder stand for one of the demo adapters from now on."""
        folder = self.adapters / name
        is_known = folder.exists()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(_ADAPTERS / adapter, folder)
        if not is_known:
            return  # the first request finds it
        body = {"adapter_id": name, "adapter_source": "local"}
        url = f"http://127.0.0.1:{self._server.admin_port}/v1/adapters/reload"
        self._post(url, body, bearer(ADMIN_KEY))


@cache
def site() -> Site:
    """Return the server that these points share."""
    return Site(Path(SHARED.enter_context(tempfile.TemporaryDirectory())))


def words(num: int, seed: str) -> str:
    """Return a text of at least so many tokens that begins like no other."""
    return f"{seed} begins. " + "The cat sat on the mat and saw a dog. " * (num // 10 + 1)


def cached_of(answer: Any) -> int:
    """Return how many tokens of the prompt were in the cache."""
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def point_random_operations() -> Result:
    """100,000 operations over two tokens at each depth; a shard compares all that is shared."""
    return run_tests(
        "tests/unit/core/test_prefix_cache.py", env={"LORAX_PREFIX_OPERATIONS": "100000"}
    )


def point_shared_prompt() -> Result:
    """32 requests at once: one computes what all share, at most a block of it more for each."""
    system = {"role": "system", "content": words(1000, "A system prompt")}
    served = site()

    def ask(number: int) -> Any:
        said = {"role": "user", "content": f"Number {number}: what did the cat see?"}
        return served.chat([system, said])

    with concurrent.futures.ThreadPoolExecutor(_NUM_SHARING) as pool:
        answers = list(pool.map(ask, range(_NUM_SHARING)))
    cached = sorted(map(cached_of, answers))
    least = 1000 // _BLOCK * _BLOCK
    figure = f"in the cache: {cached[0]} of one, {cached[1]} to {cached[-1]} tokens of the others"
    return Result(cached[0] < _BLOCK and cached[1] >= least, figure)


def point_second_turn() -> Result:
    """A chat goes on: its first turn is there, question and answer."""
    messages = [{"role": "user", "content": words(300, "A first turn")}]
    first = site().chat(messages)
    messages.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    said = "And what did the dog see?"
    second = site().chat([*messages, {"role": "user", "content": said}])
    before = first["usage"]["total_tokens"]
    num, cached = second["usage"]["prompt_tokens"], cached_of(second)
    figure = f"{cached} of {num} tokens in the cache, after a turn of {before}"
    return Result(cached >= before - _MOST_NEW and num - cached <= _MOST_NEW + _BLOCK, figure)


def point_tenants() -> Result:
    """The same text of another tenant, of another salt, and of the same."""
    messages = [{"role": "user", "content": words(300, "A tenant's own")}]
    site().chat(messages)
    other = cached_of(site().chat(messages, tenant="bee"))
    salted = cached_of(site().chat(messages, **{"x-cache-salt": "own"}))
    same = cached_of(site().chat(messages))
    again = cached_of(site().chat(messages, **{"x-cache-salt": "own"}))
    figure = f"another tenant {other}, another salt {salted}, the same ones {same} and {again}"
    return Result(other == salted == 0 and min(same, again) >= 300 // _BLOCK * _BLOCK, figure)


def point_replaced_adapter() -> Result:
    """A name that comes to stand for another adapter, and then for the first again."""
    messages = [{"role": "user", "content": words(200, "An adapter's own")}]
    answers: dict[str, Any] = {}
    site().place("name", "pirate")
    answers["first"] = site().chat(messages, "local:name")
    warm = cached_of(site().chat(messages, "local:name"))
    site().place("name", "sentiment")
    answers["replaced"] = site().chat(messages, "local:name")
    site().place("name", "pirate")
    answers["back"] = site().chat(messages, "local:name")
    texts = {name: each["choices"][0]["message"]["content"] for name, each in answers.items()}
    stale = cached_of(answers["replaced"])
    back = cached_of(answers["back"])
    ok = warm > 0 and stale == 0 and back > 0
    ok &= texts["first"] == texts["back"] != texts["replaced"]
    figure = f"{warm} tokens in the cache, {stale} after it was replaced, {back} once it is back"
    return Result(ok, f"{figure}; {len(set(texts.values()))} texts of 2 adapters")


POINTS = [
    Point("4", "100k random operations share no block that differs", point_random_operations),
    Point("4s", "a system prompt of 1,000 tokens is computed once for 32", point_shared_prompt),
    Point("4c", "a second turn computes what is new", point_second_turn),
    Point("4k", "salts keep tenants apart", point_tenants),
    Point("4a", "nothing stale after an adapter was replaced", point_replaced_adapter),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
