"""The vectors that a model was made for, as its folder says in sentence-transformers' files.

``modules.json`` names a folder for each step between the model and the vector: how tokens become
one (pooling), and whether its length is made one. ``config_sentence_transformers.json`` has what
texts begin with, ``sentence_bert_config.json`` how long they may be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import Pooling, VectorFacts

_BY_FLAG = {
    "pooling_mode_cls_token": Pooling.FIRST,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
# Later releases name the one that is meant.
_BY_NAME = {
    "cls": Pooling.FIRST,
    "max": Pooling.MAX,
    "mean": Pooling.MEAN,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "weightedmean": Pooling.WEIGHTED_MEAN,
    "lasttoken": Pooling.LAST,
}


def read_vector_facts(folder: Path, *, is_encoder: bool) -> VectorFacts:
    """Return how a folder's model makes vectors; without such files as is usual for its kind.

    Raises StartupError: MODEL_UNSUPPORTED for steps that are not computed here, MODEL_CORRUPT.
    """
    prompts = _document(folder / "config_sentence_transformers.json")
    texts = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()}
    modules = _modules(folder)
    pooling = Pooling.MEAN if is_encoder else Pooling.LAST
    if (place := modules.pop("Pooling", None)) is not None:
        pooling = _pooling(folder, place)
    has_norm = modules.pop("Normalize", None) is not None
    modules.pop("Transformer", None)
    if modules:
        raise _unsupported(folder, f"modules.json names {', '.join(sorted(modules))}")
    return VectorFacts(
        pooling=pooling,
        normalize=has_norm or place is None,
        prompts=tuple(sorted(texts.items())),
        default_prompt=str(prompts.get("default_prompt_name") or ""),
    )


def longest_text(folder: Path) -> int:
    """Return how many tokens a text may have as the folder says; 0: it does not."""
    limit = _document(folder / "sentence_bert_config.json").get("max_seq_length")
    return int(limit) if isinstance(limit, int) else 0


def _modules(folder: Path) -> dict[str, str]:
    """Return where the settings of each step are, by its kind."""
    listed = _read(folder / "modules.json") or []
    if not isinstance(listed, list):
        raise _corrupt(folder / "modules.json", "it must hold one list")
    return {str(each["type"]).rpartition(".")[2]: str(each["path"]) for each in listed}


def _pooling(folder: Path, place: str) -> Pooling:
    """Return the pooling that is set, which must be one alone."""
    document = _document(folder / place / "config.json")
    if document.get("include_prompt") is False:
        raise _unsupported(folder, "its vectors leave out the tokens of prompts (include_prompt)")
    named = document.get("pooling_mode")
    found = [pooling for flag, pooling in _BY_FLAG.items() if document.get(flag)]
    if isinstance(named, str):
        found = [_BY_NAME[each] for each in [named] if each in _BY_NAME]
    if len(found) != 1:
        raise _unsupported(folder, f"{place}/config.json sets {len(found)} kinds of pooling")
    return found[0]


def _document(path: Path) -> Mapping[str, Any]:
    document = _read(path)
    if not isinstance(document, dict | None):
        raise _corrupt(path, "it must hold one JSON object")
    return document or {}


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _corrupt(path, str(error)) from error


def _corrupt(path: Path, reason: str) -> StartupError:
    return StartupError(f"{path} cannot be read: {reason}", ExitCode.MODEL_CORRUPT)


def _unsupported(folder: Path, reason: str) -> StartupError:
    return StartupError(
        f"vectors of {folder} cannot be made: {reason}, which this server does not compute",
        ExitCode.MODEL_UNSUPPORTED,
    )
