"""What the labels of an adapter's head are called: by the ``config.json`` in its folder.

PEFT saves no names of labels. transformers does, in the configuration that a model's
``save_pretrained`` writes: ``id2label``, and by ``problem_type`` what the scores stand for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_contract.pooling import HeadFacts, ScoreKind
from lorax_shard.adapter_files import LABELS_FILE
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import parse_json
from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten
from lorax_shard.peft.files import AdapterLimits, require_small

_KINDS = {
    "single_label_classification": ScoreKind.ONE_OF,
    "multi_label_classification": ScoreKind.ANY_OF,
    "regression": ScoreKind.NUMBERS,
}


def with_labels(
    adapter: HostAdapter, base: BaseDescription, folder: Path, limits: AdapterLimits
) -> HostAdapter:
    """Return the adapter with what its head says, by its folder; one without a head as it is.

    Raises AdapterRefusedError where the folder contradicts the head.
    """
    if not adapter.head:
        return adapter
    facts = _plain_facts(adapter, base)
    path = folder / LABELS_FILE
    if path.is_file():
        require_small(path, limits.max_config_bytes)
        facts = named_facts(parse_json(path.read_bytes(), LABELS_FILE), facts)
    return dataclasses.replace(adapter, head_facts=facts)


def _plain_facts(adapter: HostAdapter, base: BaseDescription) -> HeadFacts:
    """Return what the head says without names: the base's, or those that transformers gives."""
    head = base.heads[adapter.head]
    change = adapter.modules.get(f"{adapter.head}_head.{head.output}")
    facts = head.facts
    if change is not None and change.weight is not None:
        facts = head.facts_with(change.weight.shape[0])
    assert facts is not None
    return facts


def named_facts(document: Mapping[str, Any], facts: HeadFacts) -> HeadFacts:
    """Return facts with the labels and the kind of scores that a configuration names.

    What it does not name stays. Raises AdapterRefusedError for labels that are not the head's.
    """
    labels, kind = document.get("id2label"), document.get("problem_type")
    if labels is not None:
        facts = dataclasses.replace(facts, labels=_labels(labels, len(facts.labels)))
    if kind is None:
        return facts
    if not isinstance(kind, str) or kind not in _KINDS:
        raise AdapterRefusedError(
            f"problem_type in {LABELS_FILE} is {shorten(kind)}; it can be {', '.join(_KINDS)}"
        )
    is_lone = kind == "single_label_classification" and len(facts.labels) == 1
    # One score alone is the logit of a match.
    return dataclasses.replace(facts, scores=ScoreKind.ANY_OF if is_lone else _KINDS[kind])


def _labels(names: Any, count: int) -> tuple[str, ...]:
    if not isinstance(names, dict):
        raise AdapterRefusedError(f"id2label in {LABELS_FILE} is no object of numbers and names")
    if len(names) != count:
        raise AdapterRefusedError(
            f"id2label in {LABELS_FILE} names {len(names)} labels, and the adapter's head gives "
            f"{count} scores; name each of them once, or leave {LABELS_FILE} out"
        )
    numbers = [str(number) for number in range(count)]
    if strange := sorted(set(names) - set(numbers)):
        raise AdapterRefusedError(
            f"id2label in {LABELS_FILE} has the numbers {listing(strange)}; those of {count} labels "
            f"are 0 to {count - 1}"
        )
    labels = [names[number] for number in numbers]
    if unfit := [label for label in labels if not _is_text(label)]:
        raise AdapterRefusedError(
            f"id2label in {LABELS_FILE} has the label {shorten(unfit[0])}; a label is a text"
        )
    if twice := sorted(label for label, times in Counter(labels).items() if times > 1):
        raise AdapterRefusedError(
            f"id2label in {LABELS_FILE} has several labels called {listing(twice)}; call each of "
            "them otherwise"
        )
    return tuple(labels)


def _is_text(label: Any) -> bool:
    """Tell whether an answer can hold it: no blank, no half of a character."""
    if not isinstance(label, str) or not label.strip():
        return False
    return not any("\ud800" <= each <= "\udfff" for each in label)
