"""A group whose ranks live on two hosts, as far as one machine can show it: two network namespaces.

Calls go over TCP with certificates on both ends, and the ranks meet over the only link that there is between the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.helpers.certificates import Authority
from tests.helpers.namespaces import Namespace, NoNamespacesError, two_namespaces
from tests.helpers.peft_folders import greedy_tokens, load_model
from tests.helpers.shard_process import ShardProcess
from tokenizers import Tokenizer

from lorax_contract.config import RouterConfig

PROMPT = "the quick brown fox jumps over the lazy dog"
NUM_TOKENS = 12
# All ports of a new namespace are free.
SHARD_PORT, MEETING_PORT, HTTP_PORT = 50051, 29500, 3000
_ASK = """
import sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    with contextlib.ExitStack() as held:
        try:
            both = held.enter_context(two_namespaces())
        except NoNamespacesError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield both


@contextlib.contextmanager
def ranks(
    hosts: tuple[Namespace, ...], model_dir: Path, folder: Path, authority: Authority
) -> Iterator[str]:
    """Run a rank in each namespace; yields the address of rank 0."""
    uris = [f"{host.address}:{SHARD_PORT}" for host in hosts]

    def start(rank: int) -> ShardProcess:
        own = folder / f"rank-{rank}"
        own.mkdir()
        tls = authority.write(own / "tls", f"rank {rank}", hosts[rank].address)
        return ShardProcess(
            own, model_dir, prefix=hosts[rank].inside(),
            variables={"GLOO_SOCKET_IFNAME": hosts[rank].interface}, num_blocks=64,
            rank=rank, world_size=len(hosts), shard_uris=uris, shard_tls_dir=str(tls),
            rendezvous=f"tcp://{hosts[0].address}:{MEETING_PORT}",
        )  # fmt: skip

    # None is ready before both have met.
    with ThreadPoolExecutor(len(hosts)) as pool:
        shards = list(pool.map(start, range(len(hosts))))
    with contextlib.ExitStack() as held:
        for shard in shards:
            held.push(shard.__exit__)
        for shard in shards:
            assert shard.facts is not None, shard.log_path.read_text()
        yield uris[0]


@contextlib.contextmanager
def router(
    host: Namespace, model_dir: Path, shard_uri: str, folder: Path, authority: Authority
) -> Iterator[str]:
    """Run a router in a namespace; yields its URL there."""
    ready, ready_fd = os.pipe()
    tls = authority.write(folder / "tls", "router", host.address)
    config = RouterConfig(
        model_id="tiny", tokenizer_dir=str(model_dir), shard_uri=shard_uri, ready_fd=ready_fd,
        hostname=host.address, port=HTTP_PORT, lifeline=True, shard_tls_dir=str(tls),
    )  # fmt: skip
    path = folder / "router.json"
    path.write_text(config.to_json())
    command = host.inside(sys.executable, "-m", "lorax_router.cli", "--config", str(path))
    with (folder / "router.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[ready_fd]
        )
    with process:
        os.close(ready_fd)
        try:
            with os.fdopen(ready) as pipe:
                line = pipe.readline()
            assert line, (folder / "router.log").read_text()
            yield f"http://{host.address}:{HTTP_PORT}"
        finally:
            process.kill()


def test_ranks_in_two_network_namespaces_serve(
    hosts: tuple[Namespace, Namespace], tiny_model: Path, tmp_path: Path
) -> None:
    here, _ = hosts
    authority = Authority("ours")
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "details": True}
    body = json.dumps({"inputs": PROMPT, "parameters": parameters})
    with (
        ranks(hosts, tiny_model, tmp_path, authority) as shard_uri,
        router(here, tiny_model, shard_uri, tmp_path, authority) as url,
    ):
        answer = json.loads(here.run(sys.executable, "-c", _ASK, f"{url}/generate", body))
    ids = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(PROMPT).ids
    served = [token["id"] for token in answer["details"]["tokens"]]
    assert served == greedy_tokens(load_model(tiny_model), ids, NUM_TOKENS)
