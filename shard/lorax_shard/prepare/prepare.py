"""``--model-id`` becomes a local folder that the loader and the router can read."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.files import read_json
from lorax_shard.gguf_files import blocks_folder
from lorax_shard.prepare.default import DEFAULT_MODEL_ID, prepare_default
from lorax_shard.prepare.files import (
    Progress,
    ProgressEvent,
    check_safetensors,
    disk_errors,
    publish_folder,
    remembered_digest,
)
from lorax_shard.prepare.gguf import adopt_transformers_logs, convert_gguf
from lorax_shard.prepare.gguf_blocks import keep_blocks
from lorax_shard.prepare.hub import fetch_snapshot, split_revision
from lorax_shard.prepare.s3 import fetch_model

__all__ = [
    "DEFAULT_MODEL_ID",
    "PreparedModel",
    "Progress",
    "ProgressEvent",
    "check_safetensors",
    "prepare",
]

logger = logging.getLogger(__name__)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model on disk: what the shards load, and what the router tokenizes with."""

    # The name that the model is served under.
    model_id: str
    # Holds config.json and safetensors.
    model_dir: Path
    # Holds tokenizer.json; often the same folder.
    tokenizer_dir: Path
    # The commit of a model from the hub.
    revision: str | None
    # The adapter that becomes part of the weights.
    adapter_dir: Path | None = None

    def to_json(self) -> str:
        """Return the one JSON line that ``lorax-shard prepare`` writes."""
        document = {
            "model_id": self.model_id,
            "model_dir": str(self.model_dir),
            "tokenizer_dir": str(self.tokenizer_dir),
            "revision": self.revision,
            "adapter_dir": None if self.adapter_dir is None else str(self.adapter_dir),
        }
        return json.dumps(document)


def prepare(
    model_id: str | None,
    *,
    revision: str | None,
    source: str,
    cache_dir: Path,
    trust_remote_code: bool,
    progress: Progress,
    s3_endpoint: str | None = None,
    with_blocks: bool = False,
) -> PreparedModel:
    """Return the model as a local folder, fetched and converted if that is needed.

    ``model_id`` is a folder, a ``.gguf`` file, a hub id (``name@revision`` allowed), with the
    source ``s3`` a place there, or None for the embedded default. ``with_blocks`` keeps the blocks
    of a GGUF file, and refuses models that come from none. Raises StartupError, which says
    what is wrong and what to do.
    """
    cache_dir = cache_dir.expanduser().absolute()
    if source not in ("hub", "local", "s3"):
        raise StartupError(
            f"--source {source}: base models come from 'hub', 'local' or 's3'. Copy the model into "
            "a folder and name that folder with --model-id.",
            ExitCode.USAGE,
        )
    if model_id is None:
        _refuse_revision("the default model", revision)
        folder = prepare_default(cache_dir, progress, with_blocks=with_blocks)
        return PreparedModel(
            model_id=DEFAULT_MODEL_ID, model_dir=folder, tokenizer_dir=folder, revision=None
        )
    path = Path(model_id).expanduser()
    commit = None
    if source == "s3":
        _refuse_revision(model_id, revision)
        folder = fetch_model(model_id, s3_endpoint, cache_dir, trust_remote_code, progress)
    elif source == "local" or is_path(model_id):
        _refuse_revision(model_id, revision)
        folder = _local_folder(path.absolute(), cache_dir, progress, with_blocks=with_blocks)
    else:
        name, revision = split_revision(model_id, revision)
        folder, commit = fetch_snapshot(
            name, revision, with_code=trust_remote_code, progress=progress
        )
        model_id = name
    if with_blocks and not blocks_folder(folder).is_dir():
        raise StartupError(
            f"--quantize gguf: {model_id} is no GGUF file. Name one with --model-id, or use "
            "--quantize int8.",
            ExitCode.USAGE,
        )
    check_model_folder(folder)
    tokenizer_dir = _tokenizer_folder(folder, cache_dir, trust_remote_code)
    return PreparedModel(
        model_id=model_id, model_dir=folder, tokenizer_dir=tokenizer_dir, revision=commit
    )


def _refuse_revision(what: str, revision: str | None) -> None:
    if revision is not None:
        raise StartupError(
            f"--revision {revision}: only models from the hub have revisions, and {what} is none. "
            "Leave the option out.",
            ExitCode.USAGE,
        )


def is_path(model_id: str) -> bool:
    """Tell a path, mistyped ones too, from a hub id, which is ``name`` or ``org/name``."""
    return (
        Path(model_id).expanduser().exists()
        or model_id.startswith(("/", ".", "~"))
        or model_id.lower().endswith(".gguf")
        or model_id.count("/") > 1
    )


def _local_folder(path: Path, cache_dir: Path, progress: Progress, *, with_blocks: bool) -> Path:
    if not path.exists():
        raise StartupError(
            f"there is no model at {path}. Check the path; a model from the hub is named like "
            "org/name.",
            ExitCode.MODEL_NOT_FOUND,
        )
    gguf = path if path.is_file() else _only_gguf(path)
    if gguf is None:
        return path
    if gguf.suffix.lower() != ".gguf":
        raise StartupError(
            f"{path} is a file; --model-id takes a folder, a .gguf file or a hub id. Name the "
            "folder that holds config.json.",
            ExitCode.MODEL_NOT_FOUND,
        )
    with disk_errors(cache_dir):
        digest = remembered_digest(gguf.resolve(), cache_dir, progress)
    folder = convert_gguf(gguf, digest, cache_dir, progress)
    if with_blocks:
        keep_blocks(gguf, folder, cache_dir, progress)
    return folder


def _only_gguf(folder: Path) -> Path | None:
    """Return the folder's GGUF file if that is the only form its model has."""
    ggufs = sorted(folder.glob("*.gguf"))
    if not ggufs or any(folder.glob("*.safetensors")):
        return None
    if len(ggufs) > 1:
        raise StartupError(
            f"{folder} holds {len(ggufs)} GGUF files ({', '.join(path.name for path in ggufs[:4])}"
            "). Name one of them with --model-id.",
            ExitCode.MODEL_NOT_FOUND,
        )
    return ggufs[0]


def check_model_folder(folder: Path) -> None:
    """Raise StartupError unless the folder holds a configuration and whole safetensors."""
    config = folder / "config.json"
    if not config.is_file():
        raise _no_config(folder)
    if read_json(config) is None:
        raise StartupError(
            f"{config} is not a JSON object. Fetch the model again.", ExitCode.MODEL_CORRUPT
        )
    for weights in _weight_files(folder):
        check_safetensors(weights)


def _no_config(folder: Path) -> StartupError:
    if (folder / "adapter_config.json").is_file():
        return StartupError(
            f"{folder} is a LoRA adapter, not a model. Name its base model with --model-id, and "
            "the adapter in each request.",
            ExitCode.MODEL_UNSUPPORTED,
        )
    return StartupError(
        f"{folder} has no config.json, so it is not a transformers model. Name the folder that "
        "holds config.json and the .safetensors files.",
        ExitCode.MODEL_NOT_FOUND,
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model; all files that its index names must be there."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        if files := sorted(folder.glob("*.safetensors")):
            return files
        raise _no_weights(folder)
    weight_map = (read_json(index_path) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(
            f"{index_path} names no weights. Fetch the model again.", ExitCode.MODEL_CORRUPT
        )
    files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise StartupError(
            f"{folder} lacks {', '.join(missing[:4])}, which its index names. Fetch the model "
            "again.",
            ExitCode.MODEL_CORRUPT,
        )
    return files


def _no_weights(folder: Path) -> StartupError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return StartupError(
            f"{folder} holds its weights as pickle only ({', '.join(pickles[:4])}), which is never "
            "loaded because it can run code. Convert them to safetensors (save_pretrained of "
            "transformers does) or use a revision that has them.",
            ExitCode.MODEL_UNSUPPORTED,
        )
    return StartupError(
        f"{folder} has no .safetensors files. Weights in other formats are not loaded: convert "
        "them with save_pretrained of transformers, or choose a model that has safetensors.",
        ExitCode.MODEL_NOT_FOUND,
    )


def _tokenizer_folder(folder: Path, cache_dir: Path, trust_remote_code: bool) -> Path:
    """Return the folder with tokenizer.json, made in the cache if the model has none."""
    if (folder / "tokenizer.json").is_file():
        return folder
    names = sorted({path for name in _TOKENIZER_FILES for path in folder.glob(name)})
    digest = hashlib.sha256()
    for path in names:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    target = cache_dir / "tokenizers" / digest.hexdigest()[:24]

    def build(temporary: Path) -> None:
        _build_tokenizer(folder, temporary, trust_remote_code)

    def on_wait() -> None:
        logger.info("another process makes the tokenizer of %s; waiting for it", folder)

    with disk_errors(cache_dir):
        return publish_folder(target, build, {"source": str(folder)}, on_wait)


def _build_tokenizer(folder: Path, target: Path, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    adopt_transformers_logs()
    logger.info("%s has no tokenizer.json; making one", folder)
    reason = "its tokenizer has no fast form"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        if tokenizer.is_fast:
            tokenizer.save_pretrained(str(target))
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    for name in ("chat_template.jinja",):
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copy2(folder / name, target / name)
    if not (target / "tokenizer.json").is_file():
        raise StartupError(
            f"{folder} has no tokenizer.json, and none could be made: {reason}. Put the model's "
            "tokenizer.json into the folder.",
            ExitCode.TOKENIZER_UNUSABLE,
        )
