"""A GGUF file becomes a folder of float32 safetensors, configuration and tokenizer.

transformers reads the file; what its conversion loses is put back here, with the reason
at each place. Imports of torch and transformers wait until something must be converted.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.file_head import check_head
from lorax_shard.prepare.files import (
    Progress,
    ProgressEvent,
    disk_errors,
    publish_folder,
    require_space,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Raise it when the conversion changes: folders made by an older one are then made again.
CONVERTER_VERSION = 1
_STEPS = 3
# What a model is made by; each is a size of some of its weights.
_SIZES = (
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.dimension_count",
)  # fmt: skip
# Of an error that a library raised.
_MAX_WORDS = 500
# Vocabularies whose merges were learned on single digits and GPT-2's word split.
_SINGLE_DIGIT_SPLITS = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
)
# Vocabularies that use GPT-2's word split as it is.
_GPT2_SPLITS = frozenset(("", "default", "gpt-2", "mpt", "olmo", "jais", "trillion", "phi-2"))


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What a GGUF file says about itself, as far as the conversion must keep it."""

    architecture: str
    num_weights: int
    context_length: int | None
    tokenizer_model: str
    pre_tokenizer: str
    chat_template: str | None
    # Special tokens by name (bos_token, eos_token, ...).
    special_tokens: dict[str, str]
    # End of text and end of turn, in this order, without repeats.
    eos_token_ids: list[int]


def convert_gguf(source: Path, digest: str, cache_dir: Path, progress: Progress) -> Path:
    """Return a folder converted from ``source`` (whose sha256 is ``digest``), made at most once.

    Raises StartupError: MODEL_CORRUPT, MODEL_UNSUPPORTED, OUT_OF_MEMORY or DISK_FULL.
    """
    folder = cache_dir / "models" / f"{source.stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    facts = {"source": source.name, "source_sha256": digest, "converter": CONVERTER_VERSION}

    def on_wait() -> None:
        logger.info("another process converts %s; waiting for it", source.name)

    with disk_errors(cache_dir), understood(source):
        return publish_folder(
            folder, lambda target: _convert(source, target, progress), facts, on_wait
        )


def read_facts(source: Path) -> GgufFacts:
    """Read a GGUF file's metadata; raises StartupError (MODEL_CORRUPT) if it is not one."""
    from gguf import GGUFReader

    try:
        check_head(source)
        reader = GGUFReader(source)
        _check_shape(reader)
        return _facts_of(reader)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what the library raises for a damaged file is not declared
        raise StartupError(
            f"{source} is not a whole GGUF file: {_words_of(error)}. Fetch the file again.",
            ExitCode.MODEL_CORRUPT,
        ) from error


def _facts_of(reader: Any) -> GgufFacts:
    value = _metadata_getter(reader)
    architecture = str(value("general.architecture", ""))
    tokens = value("tokenizer.ggml.tokens", [])
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    ids = {f"{ours}_token": value(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names}
    ends = (value("tokenizer.ggml.eos_token_id"), value("tokenizer.ggml.eot_token_id"))
    return GgufFacts(
        architecture=architecture,
        num_weights=sum(int(tensor.n_elements) for tensor in reader.tensors),
        context_length=value(f"{architecture}.context_length"),
        tokenizer_model=str(value("tokenizer.ggml.model", "")),
        pre_tokenizer=str(value("tokenizer.ggml.pre", "")),
        chat_template=value("tokenizer.chat_template"),
        special_tokens={name: tokens[it] for name, it in ids.items() if it is not None},
        eos_token_ids=list(dict.fromkeys(int(end) for end in ends if end is not None)),
    )


def _check_shape(reader: Any) -> None:
    """Raise ValueError for a model that is larger by its own words than its weights are.

    transformers makes what the words say before it looks for the weights.
    """
    value = _metadata_getter(reader)
    architecture = value("general.architecture", "")
    most = sum(int(tensor.n_elements) for tensor in reader.tensors)
    for name in _SIZES:
        said = value(f"{architecture}.{name}", 0)
        bound = len(reader.tensors) if name == "block_count" else most
        if any(each > bound for each in (said if isinstance(said, list) else [said])):
            raise ValueError(f"{name} is {said}, and it has {most} weights")


@contextlib.contextmanager
def understood(source: Path) -> Iterator[None]:
    """Turn what libraries raise over a file that they do not understand into a StartupError."""
    try:
        yield
    except (StartupError, OSError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of libraries are no Exception
        raise StartupError(
            f"{source.name} cannot be converted: {_words_of(error)}. Fetch it again, or serve the "
            "model from its safetensors folder instead.",
            ExitCode.MODEL_UNSUPPORTED,
        ) from error


def _words_of(error: BaseException) -> str:
    words = " ".join(str(error).split())[:_MAX_WORDS]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _metadata_getter(reader: Any) -> Callable[..., Any]:
    def value(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    return value


def _convert(source: Path, target: Path, progress: Progress) -> None:
    def report(done: int) -> None:
        progress(ProgressEvent(f"convert {source.name}", done, _STEPS, "steps"))

    report(0)
    adopt_transformers_logs()
    facts = read_facts(source)
    _require_room(source, target, facts)
    report(1)
    _save_tokenizer(source, target, facts)
    report(2)
    _save_model(source, target, facts)
    report(3)


def adopt_transformers_logs() -> None:
    """Make transformers' log lines ours, and its progress bars none: progress has its callback."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def _require_room(source: Path, target: Path, facts: GgufFacts) -> None:
    import psutil

    needed = facts.num_weights * 4
    require_space(target, needed, f"{source.name} in float32")
    available = psutil.virtual_memory().available
    if available < needed:
        raise StartupError(
            f"{source.name} takes {needed / 1e9:.1f} GB in float32 and {available / 1e9:.1f} GB of "
            "memory are free. Free memory, or serve the model from safetensors in a smaller dtype.",
            ExitCode.OUT_OF_MEMORY,
        )


def _load(what: str, source: Path, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(str(source.parent), gguf_file=source.name, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # for all that can be wrong with a file
        raise StartupError(
            f"transformers cannot read the {what} of {source.name}: {_words_of(error)}. Serve the model "
            "from its safetensors folder instead.",
            ExitCode.MODEL_UNSUPPORTED,
        ) from error


def _save_tokenizer(source: Path, target: Path, facts: GgufFacts) -> None:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load("tokenizer", source, AutoTokenizer.from_pretrained)
    backend: Tokenizer = tokenizer.backend_tokenizer
    repair_pre_tokenizer(backend, facts)
    backend.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **facts.special_tokens,
    }
    if facts.context_length:
        config["model_max_length"] = int(facts.context_length)
    if facts.chat_template:
        config["chat_template"] = facts.chat_template
    (target / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def repair_pre_tokenizer(backend: Tokenizer, facts: GgufFacts) -> None:
    """Give byte-level tokenizers the word split that their merges were learned with.

    A GGUF file only names the split. transformers knows some names and takes GPT-2's split
    for all others, which joins digits: "1234" would become other tokens than in training.
    """
    if facts.tokenizer_model != "gpt2" or facts.pre_tokenizer in _GPT2_SPLITS:
        return
    from tokenizers import pre_tokenizers

    if facts.pre_tokenizer in _SINGLE_DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning(
            "the GGUF file names the word split %r, which is not known here; GPT-2's is used, "
            "and some texts may be cut into other tokens than in training",
            facts.pre_tokenizer,
        )


def _save_model(source: Path, target: Path, facts: GgufFacts) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    model, loading = _load(
        "weights",
        source,
        AutoModelForCausalLM.from_pretrained,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers fills absent weights with random numbers and only warns.
    if absent := sorted(loading["missing_keys"]):
        raise StartupError(
            f"{source.name} lacks {len(absent)} weights of a {type(model).__name__}, such as "
            f"{absent[0]}. Fetch it again; a model that is split into several GGUF files must be "
            "merged into one first.",
            ExitCode.MODEL_CORRUPT,
        )
    _save_configs(model, target, facts)
    state = _plain_state(model, source)
    save_torch_state_dict(state, str(target), metadata={"format": "pt"})


def _save_configs(model: PreTrainedModel, target: Path, facts: GgufFacts) -> None:
    config = model.config.to_diff_dict()
    # The saved weights are plain float32: a reader must not look for the GGUF file again.
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    config["model_type"] = model.config.model_type
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation: dict[str, Any] = {}
    if facts.eos_token_ids:
        generation["eos_token_id"] = facts.eos_token_ids
    for name in ("bos_token_id", "pad_token_id"):
        if (token_id := getattr(model.config, name, None)) is not None:
            generation[name] = token_id
    (target / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )


def _plain_state(model: PreTrainedModel, source: Path) -> dict[str, torch.Tensor]:
    """Return the float32 weights, without those that are tied to the input embedding."""
    import torch

    embedding = model.get_input_embeddings().weight
    owner = next(name for name, weight in model.named_parameters() if weight is embedding)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype is not torch.float32:
            raise StartupError(
                f"transformers left {name} of {source.name} in {tensor.dtype}: this GGUF "
                "cannot be unpacked. Serve the model from its safetensors folder instead.",
                ExitCode.MODEL_UNSUPPORTED,
            )
        if name == owner or tensor.data_ptr() != embedding.data_ptr():
            state[name] = tensor.contiguous()
    return state
