"""Every option of PEFT's LoRA configuration, and what becomes of it here.

The table is the truth for the reader and for ``docs/adapters.md``; a test walks PEFT's own
dataclass and fails for a field that nobody classified.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorax_shard.peft.errors import shorten

# What adapters can be trained for that are served, each where the base model has it.
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS")


class Treatment(enum.Enum):
    """What becomes of an option."""

    # It changes what the adapter computes, and is computed as PEFT does.
    COMPUTED = "computed"
    # It has no influence on a saved adapter's output.
    HARMLESS = "harmless"
    # An adapter that uses it is not served.
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of the configuration."""

    name: str
    treatment: Treatment
    # For the documentation: what it is computed as, or why it does not matter or is refused.
    note: str
    # Returns the sentence that refuses this value; None: it is accepted.
    refuse: Callable[[Any], str | None] = lambda _value: None


# Which start of training leaves the base weights as they are: a saved adapter is complete.
_SELF_CONTAINED_INITS = ("gaussian", "eva", "orthogonal", "mica")
# These subtract their start from the base weights, so the saved A and B belong to a changed
# base. The note says how PEFT turns such an adapter into a plain one.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")


def _computed(name: str, note: str, refuse: Callable[[Any], str | None] | None = None) -> Option:
    option = Option(name=name, treatment=Treatment.COMPUTED, note=note)
    return option if refuse is None else Option(
        name=name, treatment=Treatment.COMPUTED, note=note, refuse=refuse
    )  # fmt: skip


def _harmless(name: str, note: str) -> Option:
    return Option(name=name, treatment=Treatment.HARMLESS, note=note)


def _refused(name: str, reason: str, advice: str = "train without it") -> Option:
    """Return an option of which only the empty value is accepted."""

    def refuse(value: Any) -> str | None:
        return f"{name} is not supported: {reason}; {advice}" if value else None

    return Option(name=name, treatment=Treatment.REFUSED, note=reason, refuse=refuse)


def _refuse_peft_type(value: Any) -> str | None:
    if value == "LORA":
        return None
    if value is None:
        return (
            "peft_type is missing in adapter_config.json, which is not a whole configuration: "
            "PEFT writes peft_type, r and target_modules there; save the adapter with "
            "save_pretrained"
        )
    return f"peft_type {shorten(value)} is not supported: this server computes LORA adapters only"


def _refuse_task_type(value: Any) -> str | None:
    if value in TASKS:
        return None
    return (
        f"task_type {shorten(value)} is not supported: this server computes adapters for "
        "CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS and TOKEN_CLS"
    )


def _refuse_bias(value: Any) -> str | None:
    if value in ("none", "all", "lora_only"):
        return None
    return f"bias {shorten(value)} is unknown; it must be 'none', 'all' or 'lora_only'"


def _refuse_init(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    name = str(value).lower()
    if name in _SELF_CONTAINED_INITS:
        return None
    given = f"init_lora_weights={shorten(value)} is not supported: "
    if name == "loftq":
        return given + (
            "LoftQ replaces the base weights by quantized ones; "
            "use an adapter for the base model as it is"
        )
    if name in _BASE_CHANGING_INITS or name.startswith("pissa_niter_"):
        return given + (
            "it took its start out of the base weights, and the server would have to compute "
            "that start again to serve the adapter; save it with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    return given + "this server does not know whether it changes the base weights"


OPTIONS: tuple[Option, ...] = (
    # What it is and where it comes from.
    _computed("peft_type", "`LORA`; every other type is refused", _refuse_peft_type),
    _computed("task_type", "`CAUSAL_LM`, `FEATURE_EXTRACTION`, `SEQ_CLS`, `TOKEN_CLS` or none, where the base model has that; other tasks are refused", _refuse_task_type),
    _harmless("auto_mapping", "a class of causal models (`…ForCausalLM`) that it names must be the served one; another class is not looked at"),
    _harmless("peft_version", "which release saved it"),
    _harmless(
        "base_model_name_or_path",
        "names and paths differ between machines: another name than the served one is a warning; "
        "shapes and the model class must fit",
    ),
    _harmless("revision", "of the base model, see above"),
    _harmless("inference_mode", "which weights are trainable"),
    _harmless("runtime_config", "where PEFT computes"),
    # The low-rank part.
    _computed("r", "the rank"),
    _computed("lora_alpha", "scaling is `lora_alpha / r`"),
    _computed("use_rslora", "scaling is `lora_alpha / sqrt(r)`"),
    _computed("rank_pattern", "rank by module, by PEFT's matching rule: the first key that fits"),
    _computed("alpha_pattern", "alpha by module, by the same rule"),
    _computed("use_dora", "on linears and embeddings"),
    _computed(
        "alora_invocation_tokens",
        "the adapter acts from the last place in the prompt where these tokens are, and not at all "
        "without them; on linears, with nothing that changes the base beside A and B",
    ),
    _computed("lora_bias", "B's own bias, scaled as B is; on linears, without DoRA"),
    _computed("fan_in_fan_out", "follows from the module's type, as in PEFT"),
    _computed("bias", "`none`, `all` (biases of norms included), `lora_only`",
              _refuse_bias),
    _harmless("lora_dropout", "acts in training only"),
    _computed(
        "velora_config", "changes the backward pass only; what it saves beside A and B is not read"
    ),
    _computed(
        "init_lora_weights",
        "plain starts, `gaussian`, `eva`, `orthogonal` and `mica` leave the base as it is; "
        "`pissa`, `olora`, `corda`, `lora_ga` and `loftq` change it and are refused "
        "unless converted when saved",
        _refuse_init,
    ),
    _harmless("loftq_config", "read with `init_lora_weights` only"),
    _harmless("eva_config", "read with `init_lora_weights` only"),
    _harmless("corda_config", "read with `init_lora_weights` only"),
    _harmless("lora_ga_config", "read with `init_lora_weights` only"),
    # Which modules.
    _computed("target_modules", "list of names, regular expression or `all-linear`"),
    _computed("exclude_modules", "list of names or regular expression"),
    _computed("layers_to_transform", "with a list of names, as in PEFT"),
    _computed("layers_pattern", "with `layers_to_transform`"),
    _computed("modules_to_save", "linears, heads, embeddings and norms; blocks are refused, but those of classification heads"),
    _computed(
        "trainable_token_indices",
        "rows of embeddings and of heads, tied or not; refused on a module with LoRA or a bias",
    ),
    _computed("ensure_weight_tying", "the head's weights must agree with the embedding's"),
    _computed(
        "target_parameters",
        "matrices of experts, weights of routers, linears and embeddings; all other parameters, and "
        "DoRA, `lora_bias` and `alora_invocation_tokens` beside it, are refused by name",
    ),
    # Not computed.
    _refused("layer_replication", "it makes another base model out of this one"),
    _refused("megatron_config", "it adapts Megatron's layers, which this server does not have"),
    _harmless("megatron_core", "read with `megatron_config` only"),
    _refused("use_qalora", "it pools the inputs of GPTQ layers"),
    _harmless("qalora_group_size", "read with `use_qalora` only"),
    _refused("monteclora_config", "it draws random weights while it computes"),
    _refused("use_bdlora", "its matrices are block-diagonal"),
    _refused("arrow_config", "it routes between several adapters"),
    _refused("kasa_config", "it changes the base weights"),
)  # fmt: skip

BY_NAME = {option.name: option for option in OPTIONS}


def refuse_option(name: str, value: Any) -> str | None:
    """Return the sentence that refuses an option of an adapter's configuration, if any does.

    Options that no known release of PEFT has are accepted while they are off.
    """
    option = BY_NAME.get(name)
    if option is not None:
        return option.refuse(value)
    if not value:
        return None
    return (
        f"the option {shorten(name)} of adapter_config.json is unknown to this server, which "
        "cannot tell whether it changes what the adapter computes; save the adapter without it"
    )
