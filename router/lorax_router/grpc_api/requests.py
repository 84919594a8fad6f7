"""From messages to the service's values. What cannot be said in a message's types is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from google.protobuf import struct_pb2
from google.protobuf.message import Message
from pydantic_core import from_json

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_proto import lorax_pb2 as pb
from lorax_router.service.adapters.listing import DEFAULT_PAGE, ListQuery
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.offers import OfferedTools, checked_tools, offered
from lorax_router.service.chat.tools import ToolChoice
from lorax_router.service.constraints.formats import of_vllm
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    MergedAdapters,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

# Fields that have the service's own names and meanings, where a client sets them.
_SAME = (
    "max_new_tokens", "min_new_tokens", "num_prompt_alternatives", "n", "best_of", "temperature", "top_k", "top_p", "typical_p", "min_p",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "priority",
)  # fmt: skip
_MODES: Mapping[int, Literal["auto", "none", "required"]] = {
    pb.ToolChoice.MODE_UNSPECIFIED: "auto",
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
}
# With one of these tokens are drawn, whatever its value is.
_DRAWING = ("temperature", "top_k", "top_p", "typical_p", "min_p")


def generate_request(
    request: pb.GenerateRequest,
    bearer_token: str | None,
    caller: Caller = ANYBODY,
    origin: Origin = NOWHERE,
) -> GenerateRequest:
    """Return what a Generate call asks for; raises ValidationError."""
    prompt: Prompt
    match request.WhichOneof("prompt"):
        case "text":
            prompt = TextPrompt(request.text, given(request, "add_special_tokens", True))
        case "token_ids":
            prompt = TokenPrompt(list(request.token_ids.ids))
        case _:
            raise ValidationError("`prompt` is missing: set `text` or `token_ids`")
    return GenerateRequest(
        prompt=prompt,
        parameters=_parameters(request, bearer_token),
        caller=caller,
        origin=origin,
    )


def chat_request(
    request: pb.ChatRequest,
    bearer_token: str | None,
    caller: Caller = ANYBODY,
    origin: Origin = NOWHERE,
) -> GenerateRequest:
    """Return what a Chat call asks for; raises ValidationError."""
    return GenerateRequest(
        prompt=chat_prompt(request),
        parameters=_parameters(request, bearer_token),
        caller=caller,
        origin=origin,
    )


def chat_prompt(request: pb.ChatRequest) -> ChatPrompt:
    """Return the conversation of a request; raises ValidationError."""
    tools = _offered(request)
    return ChatPrompt(
        messages=[_message(place, each) for place, each in enumerate(request.messages)],
        tools=tools.definitions or None,
        tool_choice=tools.choice,
        template_kwargs=_plain(request.template_kwargs),
        add_generation_prompt=not request.continue_final_message,
        continue_final_message=request.continue_final_message,
    )


def adapter_parameters(adapter: pb.Adapter, bearer_token: str | None) -> GenerateParameters:
    """Return the parameters of a request that wants an adapter."""
    return GenerateParameters(**_adapter(adapter), api_token=adapter.api_token or bearer_token)


def chosen_adapter(
    message: pb.Parameters | pb.EmbedRequest | pb.ClassifyRequest,
) -> tuple[dict[str, Any], str]:
    """Return the parameters that name what a message chose, and the token that came with it."""
    match message.WhichOneof("adapter_choice"):
        case "adapter":
            return _adapter(message.adapter), message.adapter.api_token
        case "merge":
            return _merge(message.merge), message.merge.api_token
    return {}, ""


def list_query(request: pb.ListAdaptersRequest) -> ListQuery:
    """Return which adapters a call wants to see; raises ValidationError."""
    return ListQuery(
        limit=given(request, "page_size", DEFAULT_PAGE),
        cursor=request.page_token or None,
        adapter_id=request.id or None,
        adapter_source=request.source.lower() or None,
        state=request.state or None,
    )


def given(message: Message, field: str, default: Any) -> Any:
    """Return a field that has presence, or what stands for it when it is left out."""
    return getattr(message, field) if message.HasField(field) else default


def _parameters(
    request: pb.GenerateRequest | pb.ChatRequest, bearer_token: str | None
) -> GenerateParameters:
    params = request.parameters
    values = {name: getattr(params, name) for name in _SAME if params.HasField(name)}
    adapter, token = chosen_adapter(params)
    return GenerateParameters(
        **values,
        **adapter,
        api_token=token or bearer_token,
        do_sample=any(map(params.HasField, _DRAWING)),
        logit_bias=dict(params.logit_bias),
        watermark=params.watermark,
        constraint=_constraint(params),
        output=OutputKind.PROMPT if values.get("max_new_tokens") == 0 else OutputKind.TOKENS,
        raw_logprobs=params.raw_logprobs,
        cache_salt=params.cache_salt or None,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos_token=params.ignore_eos_token,
        truncate=given(request, "truncate", None),
        details=True,
        decoder_input_details=params.return_prompt_tokens,
        return_k_alternatives=given(params, "num_alternatives", None),
    )


def _constraint(params: pb.Parameters) -> Constraint | None:
    """Return what an output is to be bound to, by the one place that makes constraints."""
    if not params.HasField("constraint"):
        return None
    constraint = params.constraint
    value: Any
    match language := constraint.WhichOneof("language"):
        case None:
            raise ValidationError("`constraint` is empty: set one of its fields")
        case "json_schema":
            language, value = "json", constraint.json_schema
        case "choice":
            value = list(constraint.choice.texts)
        case _:
            value = getattr(constraint, language)
    if value is False:
        raise ValidationError("`constraint.json_object` binds nothing when it is false")
    return of_vllm({"structured_outputs": {language: value}})


def _adapter(adapter: pb.Adapter) -> dict[str, Any]:
    return {
        "adapter_id": adapter.id,
        "adapter_source": adapter.source.lower() or None,
        "revision": adapter.revision or None,
    }


def _merge(merge: pb.AdapterMerge) -> dict[str, Any]:
    merged = MergedAdapters(
        ids=[each.id for each in merge.adapters],
        weights=[each.weight for each in merge.adapters],
        merge_strategy=merge.strategy.lower() or None,
        density=given(merge, "density", None),
        majority_sign_method=merge.majority_sign.lower() or None,
    )
    return {"merged_adapters": merged, "adapter_source": merge.source.lower() or None}


def _message(place: int, message: pb.ChatMessage) -> dict[str, Any]:
    """A message as templates take it; what it does not have is not in it."""
    if not message.role:
        raise ValidationError(f"`messages.{place}.role` must not be empty")
    if message.content and message.parts:
        raise ValidationError(f"`messages.{place}` has both `content` and `parts`; set one")
    content: str | list[dict[str, str]] = message.content
    if message.parts:
        content = [_part(place, part) for part in message.parts]
    document: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        document["name"] = message.name
    if message.tool_calls:
        document["tool_calls"] = [_tool_call(each) for each in message.tool_calls]
    if message.tool_call_id:
        document["tool_call_id"] = message.tool_call_id
    if message.reasoning_content:
        document["reasoning_content"] = message.reasoning_content
    return document


def _part(place: int, part: pb.ContentPart) -> dict[str, str]:
    if part.WhichOneof("part") != "text":
        raise ValidationError(f"`messages.{place}.parts` has a part without a `text`")
    return {"type": "text", "text": part.text}


def _tool_call(call: pb.ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _offered(request: pb.ChatRequest) -> OfferedTools:
    """Return what the model may call, and whether it must; raises ValidationError."""
    definitions = checked_tools([_tool(n, each) for n, each in enumerate(request.tools)], within="")
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "name":
        return offered(definitions, ToolChoice(mode="named", name=choice.name))
    if (mode := _MODES.get(choice.mode)) is None:
        raise ValidationError(f"`tool_choice.mode` {choice.mode} is not known to this server")
    return offered(definitions, ToolChoice(mode=mode, is_single=choice.single))


def _tool(place: int, tool: pb.Tool) -> dict[str, Any]:
    if not tool.name:
        raise ValidationError(f"`tools.{place}.name` must not be empty")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.strict:
        function["strict"] = True
    if tool.parameters_schema:
        schema = _json_object(f"tools.{place}.parameters_schema", tool.parameters_schema)
        function["parameters"] = schema
    return {"type": "function", "function": function}


def _json_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        raise ValidationError(f"`{field}` must be a JSON object") from None
    if not isinstance(value, dict):
        raise ValidationError(f"`{field}` must be a JSON object")
    return value


def _plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A Struct as JSON has it: its numbers are all floats, which a template would show."""
    return {name: _plain_value(value) for name, value in struct.fields.items()}


def _plain_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return _plain(value.struct_value)
        case "list_value":
            return [_plain_value(each) for each in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "bool_value":
            return value.bool_value
        case "string_value":
            return value.string_value
    return None
