"""A client of LoRAX's published interface drives a shard process, and the process's life."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import torch
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tests.helpers.lorax_published import PublishedClient
from tests.helpers.shard_process import ShardProcess
from tests.helpers.tiny_models import make_tiny_model
from tokenizers import Tokenizer

from lorax_contract.exit_codes import ExitCode

BLOCK_SIZE = 16
NEW_TOKENS = 12
TEXTS = (
    "the quick brown fox jumps over the lazy dog while many small adapters share one base model",
    "a request names",
    "paged attention keeps keys and values",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def stock(model_dir):
    """What transformers alone answers: prompt ids to (new ids, ended by EOS)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    eos = set(model.generation_config.eos_token_id)

    def generate(prompt: list[int]) -> tuple[list[int], bool]:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in eos:
                    break
        return ids[len(prompt) :], ids[-1] in eos

    generate.model = model
    return generate


@pytest.fixture(scope="module")
def shard(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    with ShardProcess(folder, model_dir, num_blocks=128, block_size=BLOCK_SIZE) as process:
        yield process


@pytest.fixture(scope="module")
def client(shard):
    client = PublishedClient(shard.uri)
    warmed = client.Warmup(
        batch=client.Batch(id=0, requests=[make_request(client, 0, inputs=TEXTS[0])], size=1),
        max_input_length=100,
        max_prefill_tokens=64,
        max_new_tokens=28,
    )
    assert warmed.max_supported_total_tokens == 128 * BLOCK_SIZE
    yield client
    client.close()


def make_request(client, request_id, *, max_new_tokens=NEW_TOKENS, **fields):
    return client.Request(
        id=request_id,
        stopping_parameters=client.StoppingCriteriaParameters(max_new_tokens=max_new_tokens),
        parameters=client.NextTokenChooserParameters(temperature=1.0, repetition_penalty=1.0),
        **fields,
    )


def make_batch(client, batch_id, requests):
    return client.Batch(id=batch_id, requests=requests, size=len(requests))


def collect(tokens, reply):
    for generation in reply.generations:
        tokens.setdefault(generation.request_id, []).extend(generation.next_tokens.ids)
    return {
        g.request_id: g.generated_text for g in reply.generations if g.HasField("generated_text")
    }


def test_a_foreign_client_gets_the_tokens_of_transformers(client, tokenizer, stock):
    """Info, Warmup, Prefill, Decode, FilterBatch and ClearCache, as LoRAX's router uses them."""
    info = client.Info()
    assert (info.dtype, info.device_type, info.block_size) == ("float32", "cpu", BLOCK_SIZE)
    assert info.supports_generation and info.supports_embeddings
    assert not info.supports_classification
    assert not info.requires_padding
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    expected = dict(enumerate((stock(prompt) for prompt in prompts), start=1))

    # Two requests with blocks and slots given up front, out of order in the pool.
    blocks = {1: [7, 2, 30, 4], 2: [12, 11, 10]}
    requests = [
        make_request(
            client,
            number,
            inputs=TEXTS[number - 1],
            tokenized_inputs=client.TokenizedInputs(ids=prompts[number - 1]),
            blocks=blocks[number],
            slots=[
                blocks[number][i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
                for i in range(len(prompts[number - 1]) + NEW_TOKENS - 1)
            ],
        )
        for number in (1, 2)
    ]
    tokens, texts = {}, {}
    reply = client.Prefill(batch=make_batch(client, 1, requests))
    assert [g.prefill_tokens_length for g in reply.generations] == [len(p) for p in prompts[:2]]
    texts.update(collect(tokens, reply))
    first = client.Decode(batches=[reply.batch])
    texts.update(collect(tokens, first))

    # A third, as text only and without blocks, in a batch of its own.
    reply = client.Prefill(batch=make_batch(client, 2, [make_request(client, 3, inputs=TEXTS[2])]))
    texts.update(collect(tokens, reply))
    batches = [first.batch, reply.batch]
    while batches:
        reply = client.Decode(batches=batches)
        texts.update(collect(tokens, reply))
        batches = [reply.batch] if reply.HasField("batch") else []
        alive = [i for i in (reply.batch.request_ids if batches else []) if i not in texts]
        if batches and len(alive) < reply.batch.size:
            filtered = client.FilterBatch(batch_id=reply.batch.id, request_ids=alive)
            assert list(filtered.batch.request_ids) == alive
            batches = [filtered.batch]
    client.ClearCache()

    assert tokens == {number: ids for number, (ids, _) in expected.items()}
    for number, (ids, by_eos) in expected.items():
        text = texts[number]
        assert text.generated_tokens == len(ids)
        assert text.finish_reason == (1 if by_eos else 0)
        # Bytes of a character that the end cuts off are none of the text.
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert whole.startswith(text.text)
        assert set(whole[len(text.text) :]) <= {"\ufffd"}


def test_filtering_and_clearing_leave_the_others_right(client, tokenizer, stock):
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    requests = [make_request(client, 20 + i, inputs=text) for i, text in enumerate(TEXTS)]
    tokens = {}
    reply = client.Prefill(batch=make_batch(client, 5, requests))
    collect(tokens, reply)
    kept = client.FilterBatch(batch_id=5, request_ids=[22]).batch
    assert (list(kept.request_ids), kept.size) == ([22], 1)
    other = client.Prefill(batch=make_batch(client, 6, [make_request(client, 30, inputs=TEXTS[1])]))
    client.ClearCache(id=6)
    with pytest.raises(grpc.RpcError) as caught:
        client.Decode(batches=[other.batch])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "batch 6 is not cached" in caught.value.details()
    while reply.HasField("batch"):
        reply = client.Decode(batches=[kept])
        collect(tokens, reply)
    assert tokens[22] == stock(prompts[2])[0]


def test_prefill_logprobs_are_those_of_transformers(client, tokenizer, stock):
    ids = tokenizer.encode(TEXTS[0]).ids
    message = make_request(client, 40, inputs=TEXTS[0], max_new_tokens=1, prefill_logprobs=True)
    reply = client.Prefill(batch=make_batch(client, 40, [message]))
    assert not reply.HasField("batch")
    prefill = reply.generations[0].prefill_tokens
    with torch.inference_mode():
        logprobs = torch.log_softmax(stock.model(torch.tensor([ids])).logits[0], dim=-1)
    expected = [float(logprobs[i, token_id]) for i, token_id in enumerate(ids[1:])]
    assert list(prefill.ids) == ids
    assert list(prefill.logprobs)[1:] == pytest.approx(expected, abs=1e-3)


def test_vectors_of_a_batch_are_those_of_transformers(client, tokenizer, stock):
    requests = [make_request(client, 60 + place, inputs=text) for place, text in enumerate(TEXTS)]
    reply = client.Embed(batch=make_batch(client, 60, requests))
    found = {each.request_id: list(each.values) for each in reply.embeddings}
    for place, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.inference_mode():
            last = stock.model.model(ids).last_hidden_state[0, -1]
        expected = last / torch.linalg.vector_norm(last)
        assert found[60 + place] == pytest.approx(expected.tolist(), abs=1e-4)


def test_what_cannot_be_served_is_said_in_words(client):
    unknown = make_request(client, 50, inputs="a", adapter_index=3)
    cases = [
        (lambda: client.Prefill(batch=make_batch(client, 50, [unknown])), "without adapters"),
        (lambda: client.Classify(), "no classification head; it classifies nothing"),
        (
            lambda: client.DownloadAdapter(
                adapter_parameters=client.AdapterParameters(adapter_ids=["some/adapter"])
            ),
            "without adapters",
        ),
        (lambda: client.LoadAdapter(adapter_index=2), "without adapters"),
        (lambda: client.FilterBatch(batch_id=99, request_ids=[1]), "batch 99"),
    ]
    for call, words in cases:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert words in caught.value.details()
        assert "Traceback" not in caught.value.details()
    assert not client.DownloadAdapter(
        adapter_parameters=client.AdapterParameters(adapter_ids=["__base_model__"])
    ).downloaded
    assert not client.LoadAdapter(adapter_index=0).loaded
    assert not client.OffloadAdapter(adapter_index=0).offloaded


def test_health_discovery_and_reflection(client, shard):
    assert list(client.ServiceDiscovery().urls) == [shard.uri]
    client.Health()
    with grpc.insecure_channel(shard.uri) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "generate.v1.LoraxService"):
            reply = check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "generate.v1.LoraxService" in services


def test_sigterm_stops_in_good_order(model_dir, tmp_path):
    with ShardProcess(tmp_path, model_dir, num_blocks=8) as shard:
        parts, elementwise = shard.facts["parts"], shard.facts["elementwise"]
        assert elementwise in ("cpp", "torch")
        assert shard.facts == {
            "uri": shard.uri, "pid": shard.process.pid, "rank": 0, "parts": parts,
            "elementwise": elementwise,
        }  # fmt: skip
        assert all(seconds >= 0 for seconds in parts.values())
        shard.process.send_signal(signal.SIGTERM)
        assert shard.wait() == ExitCode.OK
        assert not Path(shard.uri.removeprefix("unix:")).exists()
        assert all(line["rank"] == 0 for line in shard.log())


def test_a_shard_takes_a_stale_socket_over_and_ends_with_its_launcher(model_dir, tmp_path):
    path = tmp_path / "shard-0"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # closed but not removed, as kill -9 leaves it
    assert path.exists()
    with ShardProcess(tmp_path, model_dir, num_blocks=8) as shard:
        client = PublishedClient(shard.uri)
        client.Health()
        client.close()
        shard.process.stdin.close()
        assert shard.wait() == ExitCode.PARENT_GONE
        assert not path.exists()


def test_a_shard_that_is_loading_ends_with_its_launcher_too(model_dir, tmp_path):
    shard = ShardProcess(tmp_path, model_dir, launcher_gone=True)
    assert shard.facts is None
    assert shard.wait() == ExitCode.PARENT_GONE


def test_a_configuration_that_is_none_is_refused_in_words(tmp_path):
    path = tmp_path / "shard.json"
    path.write_text('{"model_dir": "x", "modle_id": "y"}')
    run = subprocess.run(
        [sys.executable, "-m", "lorax_shard.cli", "serve", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == ExitCode.BAD_CONFIG
    assert "modle_id" in json.loads(run.stdout)["message"]


def test_a_socket_in_use_is_refused_in_words(model_dir, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "shard-0"))
        other.listen()
        shard = ShardProcess(tmp_path, model_dir, num_blocks=8)
        assert shard.facts is None
        assert shard.wait() == ExitCode.SOCKET_FAILED
        last = shard.log()[-1]
        assert "another process listens there" in last["message"]
        assert last["hint"]


def test_a_model_folder_that_is_not_there_or_damaged_is_refused_in_words(tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    cases = [(tmp_path / "missing", ExitCode.MODEL_NOT_FOUND, "does not exist")]
    cases += [(damaged, ExitCode.MODEL_CORRUPT, "tokenizer.json cannot be read")]
    (damaged / "tokenizer.json").write_text("{")
    for folder, code, words in cases:
        shard = ShardProcess(tmp_path, folder)
        assert shard.facts is None
        assert shard.wait() == code
        assert words in shard.log()[-1]["message"]
