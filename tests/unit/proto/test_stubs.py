"""The committed stubs are those of the committed .proto files."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

import lorax_proto
from lorax_proto import generate_pb2, generate_pb2_grpc

HOUSE = Path(lorax_proto.__file__).parent.parent


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", HOUSE / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def house(tmp_path, generator):
    """A copy of the house to change."""
    shutil.copy(generator.DIGESTS, tmp_path)
    (tmp_path / "lorax_proto").mkdir()
    for file in (HOUSE / "lorax_proto").glob("*"):
        if file.suffix in (".proto", ".py", ".pyi"):
            shutil.copy(file, tmp_path / "lorax_proto")
    return tmp_path


def test_the_stubs_are_fresh(generator):
    assert generator.stale_files(HOUSE) == []


def test_an_untouched_copy_is_fresh(generator, house):
    assert generator.stale_files(house) == []


@pytest.mark.parametrize("end", [".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_a_changed_file_is_stale(generator, house, end):
    name = f"lorax_proto/generate{end}"
    (house / name).write_text((house / name).read_text() + "\n")
    (problem,) = generator.stale_files(house)
    assert problem.startswith(f"{name} changed")


def test_a_missing_stub_and_a_new_proto_are_stale(generator, house):
    (house / "lorax_proto/generate_pb2.pyi").unlink()
    (house / "lorax_proto/other.proto").write_text('syntax = "proto3";')
    problems = generator.stale_files(house)
    assert "lorax_proto/generate_pb2.pyi is missing" in problems
    assert any("other.proto is not in" in problem for problem in problems)
    (house / generator.DIGESTS.name).unlink()
    assert len(generator.stale_files(house)) == 1


def test_loraxs_names_and_numbers_are_kept():
    """Spot checks against the published interface; our fields begin at 100."""
    file = generate_pb2.DESCRIPTOR
    assert file.package == "generate.v1"
    service = file.services_by_name["LoraxService"]
    # Ours come after LoRAX's.
    assert [method.name for method in service.methods][:13] == [
        "Info", "ServiceDiscovery", "ClearCache", "FilterBatch", "Warmup", "Prefill", "Embed",
        "Classify", "Decode", "Health", "DownloadAdapter", "LoadAdapter", "OffloadAdapter",
    ]  # fmt: skip
    published = {
        "Request": "id inputs tokenized_inputs truncate parameters stopping_parameters "
        "prefill_logprobs adapter_index blocks slots cache_len chunk_len",
        "CachedBatch": "id request_ids size max_tokens current_tokens",
        "Generation": "request_id prefill_tokens next_tokens generated_text prefill_tokens_length",
        "NextTokenChooserParameters": "temperature top_k top_p typical_p do_sample seed "
        "repetition_penalty frequency_penalty presence_penalty watermark adapter_id schema "
        "return_k_alternatives",
        "InfoResponse": "requires_padding dtype device_type window_size block_size speculate "
        "preloaded_adapters supports_generation supports_embeddings supports_classification "
        "chunked_prefill requires_block_allocator",
        "LoadAdapterRequest": "adapter_parameters adapter_source adapter_index api_token",
    }
    for message, names in published.items():
        fields = file.message_types_by_name[message].fields
        theirs = sorted((f.number, f.name) for f in fields if f.number < 100)
        assert theirs == list(enumerate(names.split(), 1))


def test_the_service_has_a_client_and_a_server_stub():
    assert hasattr(generate_pb2_grpc, "LoraxServiceStub")
    assert hasattr(generate_pb2_grpc.LoraxServiceServicer, "Decode")
