"""The vectors that a model was made for, as its folder says in sentence-transformers' files.

``modules.json`` names a folder for each step between the model and the vector: how tokens become
one (pooling), linears behind that (``dense``), and whether its length is made one. ``config_sentence_transformers.json`` has what
texts begin with; ``sentence_bert_config.json``, or the tokenizer's own file, how long they may be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_contract.pooling import Pooling, VectorFacts
from lorax_shard.model.step_files import corrupt, document_of, read_json, unsupported

# What the file of a text's length is called; old releases named it after the model's family.
_LENGTH_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The steps that are computed, in their order; of Dense there may be several.
_STEPS = ("Transformer", "Pooling", "Dense", "Normalize")
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


@functools.cache
def read_vector_facts(folder: Path, *, is_encoder: bool) -> VectorFacts:
    """Return how a folder's model makes vectors; without such files as is usual for its kind.

    Read once. Raises StartupError: MODEL_UNSUPPORTED for steps that are not computed here,
    MODEL_CORRUPT.
    """
    prompts = document_of(folder / "config_sentence_transformers.json")
    modules = _modules(folder)
    _check_order(folder, [kind for kind, _ in modules])
    pooling = Pooling.MEAN if is_encoder else Pooling.LAST
    place = dict(modules).get("Pooling")
    if place is not None:
        pooling = _pooling(folder, place)
    has_norm = "Normalize" in dict(modules)
    _refuse_lowering(folder)
    return VectorFacts(
        pooling=pooling,
        normalize=has_norm or place is None,
        prompts=_prompts(folder, prompts.get("prompts")),
        default_prompt=str(prompts.get("default_prompt_name") or ""),
    )


def dense_folders(folder: Path) -> tuple[Path, ...]:
    """Return where the linears behind the pooling are, in their order; raises StartupError."""
    return tuple(folder / place for kind, place in _modules(folder) if kind == "Dense")


def longest_text(folder: Path) -> int:
    """Return how many tokens a text may have as the folder says; 0: it does not."""
    limit = _settings(folder).get("max_seq_length")
    if limit is None:
        limit = document_of(folder / "tokenizer_config.json").get("model_max_length")
    # A tokenizer without a limit has a number with thirty digits, some as a fraction.
    return int(limit) if isinstance(limit, int) and 0 < limit < 1 << 31 else 0


def _settings(folder: Path) -> Mapping[str, Any]:
    found = (document_of(folder / name) for name in _LENGTH_FILES)
    return next((each for each in found if each), {})


def _refuse_lowering(folder: Path) -> None:
    """Refuse texts in small letters, unless the tokenizer makes them so itself."""
    if not _settings(folder).get("do_lower_case"):
        return
    normalizer = document_of(folder / "tokenizer.json").get("normalizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", ())]
    if not any(each.get("type") == "Lowercase" or each.get("lowercase") for each in steps):
        raise unsupported(folder, "texts are put in lower case before their tokens are found")


def _prompts(folder: Path, named: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(named, dict | None):
        raise corrupt(
            folder / "config_sentence_transformers.json", "prompts must be one JSON object"
        )
    return tuple(sorted((str(name), str(text)) for name, text in (named or {}).items()))


def _check_order(folder: Path, kinds: list[str]) -> None:
    """Raise StartupError for steps that are not computed, or in another order."""
    if unknown := sorted(set(kinds) - set(_STEPS)):
        raise unsupported(folder, f"modules.json names {', '.join(unknown)}")
    again = [each for each in _STEPS if each != "Dense" and kinds.count(each) > 1]
    if again or kinds != sorted(kinds, key=_STEPS.index):
        raise unsupported(folder, f"modules.json has the steps {', '.join(kinds)}")
    if "Dense" in kinds and "Pooling" not in kinds:
        raise unsupported(folder, "modules.json has Dense without Pooling")


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return the kind of each step and where its settings are; others' code has its full name."""
    path = folder / "modules.json"
    listed = read_json(path) or []
    if not isinstance(listed, list):
        raise corrupt(path, "it must hold one list")
    found: list[tuple[str, str]] = []
    for each in listed:
        if not isinstance(each, dict) or not all(
            isinstance(each.get(key), str) for key in ("type", "path")
        ):
            raise corrupt(path, "each of its steps must have a type and a path")
        own, _, name = each["type"].rpartition(".")
        is_own = own.startswith("sentence_transformers.")
        found.append((name if is_own else each["type"], each["path"]))
    return found


def _pooling(folder: Path, place: str) -> Pooling:
    """Return the pooling that is set, which must be one alone; where none is, it is the mean."""
    path = folder / place / "config.json"
    if not path.is_file():
        raise corrupt(
            path, "it is not there, and modules.json names it; serve a folder that has it"
        )
    document = document_of(path)
    if document.get("include_prompt") is False:
        raise unsupported(folder, "its vectors leave out the tokens of prompts (include_prompt)")
    named = document.get("pooling_mode")
    if named is None:
        found = [pooling for flag, pooling in _BY_FLAG.items() if document.get(flag)]
        found = found or [Pooling.MEAN]
    else:
        names = [named] if isinstance(named, str) else list(named)
        if unknown := [each for each in names if each not in _BY_NAME]:
            raise unsupported(folder, f"{place}/config.json names the pooling {unknown[0]!r}")
        found = [_BY_NAME[each] for each in names]
    if len(found) != 1:
        raise unsupported(folder, f"{place}/config.json sets {len(found)} kinds of pooling")
    return found[0]
