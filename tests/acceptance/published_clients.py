"""The tests that LoRAX and TGI publish with their Python clients, unmodified.

They are fetched for the run and not kept: ``PUBLISHED_CLIENT_TESTS`` names a folder that holds
``lorax`` and ``tgi``, each the ``tests`` folder of ``clients/python`` in its repository.

TGI's ask its public service for models by name and expect what Llama-2-7b answers. Here the names
lead to this server, and the tokens are those: a fake shard gives what they expect. What needs the
hub is left out by name. Of TGI the tests of the client's own time are meant (e4d31a40): later ones
ask for the prompt's tokens and expect none, as TGI 3 leaves them out.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from pathlib import Path

from tests.acceptance.environments import environment, fake_server, run_program
from tests.acceptance.harness import Point, Result
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax_contract.step import RequestSpec
from lorax_router.shards.fake.shard import FakeModel

BOUND_S = 300.0
ANSWER_ID, ANSWER = 29918, "_"
TEST_ID, START_ID = 1243, 1
PROMPT_LOGPROB = -10.96875
# Its tests of the hub's own service ask the hub which models it serves.
TGI_OTHERS = ("test_inference_api.py",)
# In place of TGI's own: where the models are served. The names are the fixtures of its tests.
TGI_CONFTEST = """
import os
import pytest


@pytest.fixture
def llama_7b_url():
    return os.environ["SERVER_URL"]


@pytest.fixture
def fake_url():
    return os.environ["SERVER_URL"] + "/fake/model"


@pytest.fixture
def hf_headers():
    return {}
"""


class ExpectedModel(FakeModel):
    """Gives the token that TGI's tests expect of the model that they name."""

    def next_token(self, spec: RequestSpec, digest: int) -> int:
        """Return it."""
        return ANSWER_ID

    def logprob(self, token_id: int, digest: int) -> float:
        """Return what they expect of the prompt."""
        return PROMPT_LOGPROB


def expected_text(token_id: int) -> str:
    """Return the texts of the tokens that occur."""
    return {ANSWER_ID: ANSWER, TEST_ID: "test", START_ID: "<s>"}.get(token_id, f"t{token_id}")


def llama_like_tokenizer() -> Tokenizer:
    """A tokenizer with Llama-2's ids for what occurs in those tests."""
    vocabulary = {f"w{i}": i for i in range(32000)}
    for name, token_id in (("<s>", START_ID), ("test", TEST_ID), (ANSWER, ANSWER_ID)):
        del vocabulary[f"w{token_id}"]
        vocabulary[name] = token_id
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", START_ID)]
    )
    return tokenizer


def published(name: str) -> Path:
    """Return the folder of a client's tests; raises when it was not fetched."""
    folder = os.environ.get("PUBLISHED_CLIENT_TESTS")
    if folder is None or not (path := Path(folder) / name).is_dir():
        raise RuntimeError(
            f"PUBLISHED_CLIENT_TESTS names no folder with {name}: fetch clients/python/tests"
        )
    return path


async def run_published(
    name: str, programs: Path, conftest: str | None, left_out: tuple[str, ...], url: str
) -> Result:
    """Run a client's tests with its own package; print what fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tests"
        shutil.copytree(published(name), folder)
        for each in left_out:
            (folder / each).unlink(missing_ok=True)
        if conftest is not None:
            (folder / "conftest.py").write_text(conftest)
        command = [str(programs / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
        code, output = await run_program(
            *command, timeout_s=BOUND_S, cwd=folder, env={**os.environ, "SERVER_URL": url}
        )
    if code:
        print(output[-8000:])
    summary = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    return Result(code == 0, (summary or output.splitlines() or ["no output"])[-1].strip("= "))


def point_tgi_client() -> Result:
    """text-generation 0.7.0 and the tests published with it."""

    async def measure(programs: Path) -> Result:
        model = ExpectedModel(vocab_size=32000, text_of=expected_text)
        async with fake_server(model, llama_like_tokenizer(), max_total_tokens=4096) as server:
            return await run_published("tgi", programs, TGI_CONFTEST, TGI_OTHERS, server.url)

    with environment("text-generation==0.7.0", "pytest", "pytest-asyncio") as programs:
        return asyncio.run(measure(programs))


def point_lorax_client() -> Result:
    """lorax-client 0.6.3 and the tests published with it."""

    async def measure(programs: Path) -> Result:
        async with fake_server() as server:
            return await run_published("lorax", programs, None, (), server.url)

    with environment("lorax-client==0.6.3", "pytest") as programs:
        return asyncio.run(measure(programs))


POINTS = [
    Point("1t", "TGI's published client tests, unmodified", point_tgi_client),
    Point("1l", "LoRAX's published client tests, unmodified", point_lorax_client),
]
