"""As what a model is served, where that is said (``--task``) and not left to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorax_contract.config import Task
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.families import backbone_name, generates
from lorax_shard.model.heads import kind_of
from lorax_shard.model.interface import SEQUENCE, TOKENS

# The kind of the head that each needs.
_HEADS = {"classify": SEQUENCE, "token-classify": TOKENS, "rerank": SEQUENCE}


def serve_as(hf_config: Any, task: Task, folder: Path, *, is_remote: bool) -> None:
    """Let a config ask for the class that does a task; raises StartupError if it has none.

    A model that shall make vectors is its backbone alone: its head, of tokens or of labels, is not
    loaded. ``is_remote``: its code is its own, and so is what its classes do.
    """
    if task == "auto" or (task == "generate" and generates(hf_config)):
        return
    reason = _lacking(hf_config, task, is_remote=is_remote)
    if reason is not None:
        raise StartupError(
            f"{folder} cannot be served with --task {task}: {reason}", ExitCode.MODEL_UNSUPPORTED
        )
    if task == "embed":
        hf_config.architectures = [backbone_name(hf_config.model_type)]


def _lacking(hf_config: Any, task: Task, *, is_remote: bool) -> str | None:
    """Return in words what a model lacks for a task; None: nothing."""
    named = (getattr(hf_config, "architectures", None) or [hf_config.model_type])[0]
    if is_remote:
        return f"it brings code of its own, so that only {named} is known of it"
    if task == "generate":
        return f"{named} has no head that makes tokens"
    if task == "embed":
        return _without_backbone(hf_config, named)
    kind = kind_of(hf_config)
    if kind != _HEADS[task]:
        return _without_head(named, kind)
    if task == "rerank" and hf_config.num_labels != 1:
        return f"to rank texts needs a head with one label, and its own has {hf_config.num_labels}"
    return None


def _without_backbone(hf_config: Any, named: str) -> str | None:
    if not backbone_name(hf_config.model_type):
        return f"transformers has no class of {hf_config.model_type!r} models without a head"
    if hf_config.get_text_config() is not hf_config:
        return f"{named} has more parts than the one that reads texts"
    return None


def _without_head(named: str, kind: str | None) -> str:
    if kind is None:
        return (
            f"{named} has no classification head. Adapters bring theirs whatever the task is: leave "
            "--task out"
        )
    of, task = ("texts", "classify") if kind == SEQUENCE else ("tokens", "token-classify")
    return f"the head of {named} is one for {of} (--task {task})"
