"""Adapters by LoRAX's published interface alone: download, load, generate, offload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.acceptance.reference import Reference, Served
from tests.helpers.lorax_published import PublishedClient
from tests.helpers.peft_folders import load_adapter, load_model, quiet, save_adapter
from tests.helpers.shard_process import ShardProcess
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tokenizers import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog"
LINEARS = ["q_proj", "v_proj", "down_proj"]
LOCAL, HUB, PBASE = 2, 0, 3
NEW_TOKENS, GROWN_SIZE = 10, VOCAB_SIZE + 4


class PeftReference(Reference):
    """The rule of teacher forcing, against a model at hand."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for seed, name in enumerate(("poet", "judge")):
        save_adapter(model_dir, folder / name, seed=seed, r=4, target_modules=LINEARS)
    grown = save_adapter(
        model_dir, folder / "grown", seed=7, rows=GROWN_SIZE, r=3, target_modules=LINEARS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_tokens([f"<own {at}>" for at in range(GROWN_SIZE - tokenizer.get_vocab_size())])
    tokenizer.save(str(grown / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def client(
    model_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PublishedClient]:
    folder = tmp_path_factory.mktemp("shard")
    settings = {"adapter_store_dir": str(folder / "store"), "adapter_local_roots": [str(root)]}
    with ShardProcess(folder, model_dir, num_blocks=64, **settings) as shard:
        client = PublishedClient(shard.uri)
        client.Warmup(
            batch=client.Batch(id=0, requests=[request(client, 0, TEXT)], size=1),
            max_input_length=100,
            max_prefill_tokens=64,
            max_new_tokens=28,
        )
        yield client
        client.close()


def request(client: PublishedClient, number: int, text: str, adapter: int = 0) -> Any:
    return client.Request(
        id=number,
        inputs=text,
        adapter_index=adapter,
        stopping_parameters=client.StoppingCriteriaParameters(
            max_new_tokens=NEW_TOKENS, ignore_eos_token=True
        ),
        parameters=client.NextTokenChooserParameters(temperature=1.0, repetition_penalty=1.0),
    )


def generate(client: PublishedClient, requests: list[Any]) -> dict[int, tuple[Any, str]]:
    """Run one batch to its end; (ids, logprobs) and text by request."""
    ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    texts: dict[int, str] = {}
    reply = client.Prefill(batch=client.Batch(id=7, requests=requests, size=len(requests)))
    while True:
        for each in reply.generations:
            ids.setdefault(each.request_id, []).extend(each.next_tokens.ids)
            logprobs.setdefault(each.request_id, []).extend(each.next_tokens.logprobs)
            if each.HasField("generated_text"):
                texts[each.request_id] = each.generated_text.text
        if not reply.HasField("batch"):
            break
        reply = client.Decode(batches=[reply.batch])
    return {number: ((ids[number], logprobs[number]), texts[number]) for number in ids}


def agrees(model: torch.nn.Module, prompt: list[int], answer: tuple[Any, str]) -> bool:
    (ids, logprobs), _ = answer
    assert len(ids) == NEW_TOKENS
    return PeftReference(model).check_greedy([Served(prompt, ids, logprobs)]).ok


@pytest.fixture
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def named(client: PublishedClient, *names: str, **merge: Any) -> dict[str, Any]:
    """Return the fields of a call that name adapters of the local folder."""
    parameters = client.AdapterParameters(adapter_ids=names, **merge)
    return {"adapter_parameters": parameters, "adapter_source": LOCAL}


def test_an_adapter_is_downloaded_loaded_used_and_offloaded(
    client: PublishedClient, model_dir: Path, root: Path, tokenizer: Tokenizer
) -> None:
    poet = named(client, "poet")
    downloaded = client.DownloadAdapter(**poet)
    assert downloaded.downloaded
    assert 0 < downloaded.memory_fraction < 1
    assert client.LoadAdapter(**poet, adapter_index=1).loaded
    assert client.LoadAdapter(**poet, adapter_index=1).loaded
    answers = generate(client, [request(client, 1, TEXT, adapter=1), request(client, 2, TEXT)])
    prompt = tokenizer.encode(TEXT).ids
    base, tuned = load_model(model_dir), load_adapter(model_dir, root / "poet")
    assert agrees(tuned, prompt, answers[1])
    assert agrees(base, prompt, answers[2])
    assert not agrees(base, prompt, answers[1])
    assert client.OffloadAdapter(**poet, adapter_index=1).offloaded
    assert not client.OffloadAdapter(**poet, adapter_index=1).offloaded
    assert "handle 1 is not in effect" in refusal(
        lambda: generate(client, [request(client, 3, TEXT, adapter=1)])
    )


def test_an_index_that_was_offloaded_may_name_another_adapter(
    client: PublishedClient, model_dir: Path, root: Path, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode(TEXT).ids
    for name in ("poet", "judge"):
        assert client.LoadAdapter(**named(client, name), adapter_index=5).loaded
        answers = generate(client, [request(client, 1, TEXT, adapter=5)])
        assert agrees(load_adapter(model_dir, root / name), prompt, answers[1])
        assert client.OffloadAdapter(adapter_index=5).offloaded


def test_adapters_are_merged_as_peft_merges_them(
    client: PublishedClient, model_dir: Path, root: Path, tokenizer: Tokenizer
) -> None:
    both = named(client, "poet", "judge", weights=[0.7, 0.5], merge_strategy=0)
    assert client.DownloadAdapter(**both).memory_fraction > 0
    assert client.LoadAdapter(**both, adapter_index=2).loaded
    assert client.LoadAdapter(**named(client, "judge"), adapter_index=3).loaded
    requests = [request(client, 1, TEXT, 2), request(client, 2, TEXT, 3), request(client, 3, TEXT)]
    answers = generate(client, requests)
    merged: Any = load_adapter(model_dir, root / "poet")
    with quiet():
        merged.load_adapter(root / "judge", "judge")
        merged.add_weighted_adapter(
            ["default", "judge"], [0.7, 0.5], "both", combination_type="linear"
        )
    merged.set_adapter("both")
    prompt = tokenizer.encode(TEXT).ids
    assert agrees(merged, prompt, answers[1])
    assert agrees(load_adapter(model_dir, root / "judge"), prompt, answers[2])
    assert not agrees(load_adapter(model_dir, root / "judge"), prompt, answers[1])
    assert agrees(load_model(model_dir), prompt, answers[3])
    for index in (2, 3):
        assert client.OffloadAdapter(adapter_index=index).offloaded


def test_tokens_of_an_adapter_s_own_come_as_ids(
    client: PublishedClient, model_dir: Path, root: Path
) -> None:
    """Its tokenizer is not run where the model is: what it would do is not known."""
    assert client.LoadAdapter(**named(client, "grown"), adapter_index=4).loaded
    text = "<own 0>the quick<own 1>"
    assert "send the prompt as token ids" in refusal(
        lambda: generate(client, [request(client, 1, text, adapter=4)])
    )
    own = Tokenizer.from_file(str(root / "grown/tokenizer.json"))
    prompt = own.encode(text).ids
    as_ids = request(client, 1, "", adapter=4)
    as_ids.tokenized_inputs.ids.extend(prompt)
    answers = generate(client, [as_ids, request(client, 2, TEXT)])
    assert max(prompt) > own.get_vocab_size() - 10
    assert agrees(load_adapter(model_dir, root / "grown", rows=GROWN_SIZE), prompt, answers[1])
    assert answers[1][1] == own.decode(answers[1][0][0])
    assert client.OffloadAdapter(adapter_index=4).offloaded


def test_the_base_model_is_never_loaded_nor_what_is_unknown_offloaded(
    client: PublishedClient,
) -> None:
    base = named(client, "__base_model__")
    assert not client.DownloadAdapter(**base).downloaded
    assert client.DownloadAdapter(**base).memory_fraction == 0.0
    for index in (0, 7):
        assert not client.LoadAdapter(**base, adapter_index=index).loaded
        assert not client.OffloadAdapter(**base, adapter_index=index).offloaded
    assert not client.OffloadAdapter(**named(client, "poet"), adapter_index=77).offloaded


def test_what_the_model_has_no_positions_for_is_refused(client: PublishedClient) -> None:
    most = 512  # as the tiny models have it
    long = request(client, 1, "")
    long.tokenized_inputs.ids.extend([5] * (most + 1 - long.stopping_parameters.max_new_tokens))
    assert generate(client, [long])
    long.tokenized_inputs.ids.append(5)
    assert f"more than the model's {most} positions" in refusal(lambda: generate(client, [long]))


def test_an_adapter_that_is_offloaded_in_use_ends_its_own_requests(
    client: PublishedClient, model_dir: Path, tokenizer: Tokenizer
) -> None:
    assert client.LoadAdapter(**named(client, "poet"), adapter_index=6).loaded
    poets = client.Prefill(
        batch=client.Batch(id=11, requests=[request(client, 1, TEXT, adapter=6)], size=1)
    )
    assert client.OffloadAdapter(adapter_index=6).offloaded
    assert "request 1" in refusal(lambda: client.Decode(batches=[poets.batch]))
    answers = generate(client, [request(client, 2, TEXT)])
    assert agrees(load_model(model_dir), tokenizer.encode(TEXT).ids, answers[2])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED)
    return str(error.details())


def test_what_cannot_be_had_is_said_in_words(client: PublishedClient) -> None:
    def load(index: int = 9, **fields: Any) -> str:
        return refusal(lambda: client.LoadAdapter(adapter_index=index, **fields))

    nobody = named(client, "nobody")
    assert "is no folder below" in refusal(lambda: client.DownloadAdapter(**nobody))
    assert "is no folder below" in load(**nobody)
    assert "names no adapter" in load()
    assert "pbase" in load(**{**nobody, "adapter_source": PBASE})
    assert "needs as many weights" in load(**named(client, "poet", "judge"))
    assert "as many weights" in load(**named(client, "poet", "judge", weights=[1.0]))
    needs_density = named(client, "poet", "judge", weights=[1.0, 1.0], merge_strategy=1)
    assert "density" in load(**needs_density)
    # Nothing of it is left.
    assert "handle 9 is not in effect" in refusal(
        lambda: generate(client, [request(client, 1, TEXT, adapter=9)])
    )
    assert client.LoadAdapter(**named(client, "poet"), adapter_index=9).loaded
    assert "use a new handle" in refusal_of_any(
        lambda: client.LoadAdapter(**named(client, "judge"), adapter_index=9)
    )
    assert client.OffloadAdapter(adapter_index=9).offloaded


def refusal_of_any(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return str(error.details())
