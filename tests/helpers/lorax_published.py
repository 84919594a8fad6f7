"""LoRAX's published interface, without our fields: what a foreign client is generated from.

The text below is a copy of its own, written from the interface's facts. It is turned into
messages in a descriptor pool of their own, so that nothing of ``lorax_proto`` can
leak into what the client knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PUBLISHED = """
rpc Info(InfoRequest) InfoResponse
rpc ServiceDiscovery(ServiceDiscoveryRequest) ServiceDiscoveryResponse
rpc ClearCache(ClearCacheRequest) ClearCacheResponse
rpc FilterBatch(FilterBatchRequest) FilterBatchResponse
rpc Warmup(WarmupRequest) WarmupResponse
rpc Prefill(PrefillRequest) PrefillResponse
rpc Embed(EmbedRequest) EmbedResponse
rpc Classify(ClassifyRequest) ClassifyResponse
rpc Decode(DecodeRequest) DecodeResponse
rpc Health(HealthRequest) HealthResponse
rpc DownloadAdapter(DownloadAdapterRequest) DownloadAdapterResponse
rpc LoadAdapter(LoadAdapterRequest) LoadAdapterResponse
rpc OffloadAdapter(OffloadAdapterRequest) OffloadAdapterResponse

message HealthRequest {}
message HealthResponse {}
message PreloadedAdapter {
  AdapterParameters adapter_parameters = 1; AdapterSource adapter_source = 2;
  uint32 adapter_index = 3;
}
message InfoRequest {}
message InfoResponse {
  bool requires_padding = 1; string dtype = 2; string device_type = 3;
  optional uint32 window_size = 4; uint32 block_size = 5; uint32 speculate = 6;
  repeated PreloadedAdapter preloaded_adapters = 7; bool supports_generation = 8;
  bool supports_embeddings = 9; bool supports_classification = 10; bool chunked_prefill = 11;
  bool requires_block_allocator = 12;
}
message ServiceDiscoveryRequest {}
message ServiceDiscoveryResponse { repeated string urls = 1; }
message ClearCacheRequest { optional uint64 id = 1; }
message ClearCacheResponse {}
message NextTokenChooserParameters {
  float temperature = 1; uint32 top_k = 2; float top_p = 3; float typical_p = 4;
  bool do_sample = 5; uint64 seed = 6; float repetition_penalty = 7;
  float frequency_penalty = 8; float presence_penalty = 9; bool watermark = 10;
  string adapter_id = 11; optional string schema = 12; uint32 return_k_alternatives = 13;
}
message StoppingCriteriaParameters {
  uint32 max_new_tokens = 1; repeated string stop_sequences = 2; bool ignore_eos_token = 3;
}
message TokenizedInputs { repeated uint32 ids = 1; }
message Request {
  uint64 id = 1; string inputs = 2; TokenizedInputs tokenized_inputs = 3; uint32 truncate = 4;
  NextTokenChooserParameters parameters = 5; StoppingCriteriaParameters stopping_parameters = 6;
  bool prefill_logprobs = 7; uint32 adapter_index = 8; repeated uint32 blocks = 9;
  repeated uint32 slots = 10; uint32 cache_len = 11; optional uint32 chunk_len = 12;
}
message Batch {
  uint64 id = 1; repeated Request requests = 2; uint32 size = 3; uint32 max_tokens = 4;
  uint32 max_blocks = 5;
}
message CachedBatch {
  uint64 id = 1; repeated uint64 request_ids = 2; uint32 size = 3; uint32 max_tokens = 4;
  uint32 current_tokens = 5;
}
enum FinishReason {
  FINISH_REASON_LENGTH = 0; FINISH_REASON_EOS_TOKEN = 1; FINISH_REASON_STOP_SEQUENCE = 2;
}
message GeneratedText {
  string text = 1; uint32 generated_tokens = 2; uint32 skipped_tokens = 3;
  FinishReason finish_reason = 4; optional uint64 seed = 5;
}
message AlternativeTokens {
  repeated uint32 ids = 1; repeated float logprobs = 2; repeated string texts = 3;
}
message NextTokens {
  repeated uint32 ids = 1; repeated float logprobs = 2; repeated string texts = 3;
  repeated bool is_special = 4; repeated AlternativeTokens alternative_tokens = 5;
}
message Generation {
  uint64 request_id = 1; NextTokens prefill_tokens = 2; NextTokens next_tokens = 3;
  optional GeneratedText generated_text = 4; uint32 prefill_tokens_length = 5;
}
message FilterBatchRequest { uint64 batch_id = 1; repeated uint64 request_ids = 2; }
message FilterBatchResponse { CachedBatch batch = 1; }
message PrefillRequest { Batch batch = 1; CachedBatch cached_batch = 2; }
message PrefillResponse { repeated Generation generations = 1; optional CachedBatch batch = 2; }
message DecodeRequest { repeated CachedBatch batches = 1; }
message DecodeResponse { repeated Generation generations = 1; optional CachedBatch batch = 2; }
message Embedding { uint64 request_id = 1; repeated float values = 2; }
message EmbedRequest { Batch batch = 1; }
message EmbedResponse { repeated Embedding embeddings = 1; string errorMsg = 2; }
message ClassifyPredictionList {
  uint64 request_id = 1; repeated string predictions = 2; repeated float scores = 3;
}
message ClassifyRequest { Batch batch = 1; }
message ClassifyResponse {
  repeated ClassifyPredictionList classify_prediction_lists = 1; string errorMsg = 2;
}
message WarmupRequest {
  Batch batch = 1; uint32 max_input_length = 2; uint32 max_prefill_tokens = 3;
  uint32 max_new_tokens = 4;
}
message WarmupResponse { optional uint32 max_supported_total_tokens = 1; }
enum AdapterSource { HUB = 0; S3 = 1; LOCAL = 2; PBASE = 3; }
enum MergeStrategy { LINEAR = 0; TIES = 1; DARE_LINEAR = 2; DARE_TIES = 3; }
enum MajoritySignMethod { TOTAL = 0; FREQUENCY = 1; }
message AdapterParameters {
  repeated string adapter_ids = 1; repeated float weights = 2; MergeStrategy merge_strategy = 3;
  float density = 4; MajoritySignMethod majority_sign_method = 5;
}
message DownloadAdapterRequest {
  AdapterParameters adapter_parameters = 1; AdapterSource adapter_source = 2;
  optional string api_token = 3;
}
message DownloadAdapterResponse { bool downloaded = 1; float memory_fraction = 2; }
message LoadAdapterRequest {
  AdapterParameters adapter_parameters = 1; AdapterSource adapter_source = 2;
  uint32 adapter_index = 3; optional string api_token = 4;
}
message LoadAdapterResponse { bool loaded = 1; }
message OffloadAdapterRequest {
  AdapterParameters adapter_parameters = 1; AdapterSource adapter_source = 2;
  uint32 adapter_index = 3;
}
message OffloadAdapterResponse { bool offloaded = 1; }
"""
_PACKAGE = "generate.v1"
_BLOCK = re.compile(r"(message|enum)\s+(\w+)\s*\{(.*?)\}", re.DOTALL)
_FIELD = re.compile(r"(?:(optional|repeated)\s+)?(\w+)\s+(\w+)\s*=\s*(\d+);")
_VALUE = re.compile(r"(\w+)\s*=\s*(\d+);")
_RPC = re.compile(r"rpc (\w+)\((\w+)\) (\w+)")
_FieldProto = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_FieldProto, f"TYPE_{name.upper()}")
    for name in ("bool", "string", "float", "uint32", "uint64", "bytes")
}


class PublishedClient:
    """Calls a shard with messages of the published interface only.

    ``client.Prefill(batch=client.Batch(...))`` calls; ``client.Batch(...)`` makes a message.
    """

    def __init__(self, uri: str) -> None:
        self._messages = _message_classes()
        self._channel = grpc.insecure_channel(uri)
        self._rpcs = {name: (request, reply) for name, request, reply in _RPC.findall(PUBLISHED)}

    def __getattr__(self, name: str) -> Any:
        if name in self._rpcs:
            return lambda **fields: self._call(name, fields)
        return self._messages[name]

    def close(self) -> None:
        self._channel.close()

    def _call(self, name: str, fields: dict[str, Any]) -> Any:
        request, reply = (self._messages[each] for each in self._rpcs[name])
        call = self._channel.unary_unary(
            f"/{_PACKAGE}.LoraxService/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
        return call(request(**fields), timeout=120, wait_for_ready=True)


def _message_classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file_descriptor())
    names = [name for kind, name, _ in _BLOCK.findall(PUBLISHED) if kind == "message"]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in names
    }


def _file_descriptor() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="published.proto", package=_PACKAGE, syntax="proto3"
    )
    blocks = _BLOCK.findall(PUBLISHED)
    enums = {name for kind, name, _ in blocks if kind == "enum"}
    for kind, name, body in blocks:
        if kind == "enum":
            enum = file.enum_type.add(name=name)
            for value, number in _VALUE.findall(body):
                enum.value.add(name=value, number=int(number))
        else:
            message = file.message_type.add(name=name)
            message.field.extend(_fields(body, enums))
            _add_presence(message)
    return file


def _fields(body: str, enums: set[str]) -> Iterator[descriptor_pb2.FieldDescriptorProto]:
    for label, kind, name, number in _FIELD.findall(body):
        field = _FieldProto(name=name, number=int(number))
        repeated = label == "repeated"
        field.label = _FieldProto.LABEL_REPEATED if repeated else _FieldProto.LABEL_OPTIONAL
        field.proto3_optional = label == "optional"
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        else:
            field.type = _FieldProto.TYPE_ENUM if kind in enums else _FieldProto.TYPE_MESSAGE
            field.type_name = f".{_PACKAGE}.{kind}"
        yield field


def _add_presence(message: descriptor_pb2.DescriptorProto) -> None:
    """Give each optional field the oneof of its own that proto3 describes presence with."""
    for field in message.field:
        if field.proto3_optional:
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")
