"""Classification heads: unchanged transformers classes, given what their backbone would give them.

A class such as BertForSequenceClassification runs its backbone and then its head, over rows that
are padded. Here the backbone runs without padding, for rows of all kinds together; then the class
runs over the picked hidden states alone, as texts of one token each, and its backbone is a stub that
hands those out. Pooler and head are computed by the class's own code, whatever that is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_shard.model.attention_hook import stock_attention
from lorax_shard.model.interface import SEQUENCE, TOKENS

_MAPPINGS = {
    SEQUENCE: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    TOKENS: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
# Tokens of the text that heads are probed with; by which share of the largest score they may differ.
_PROBED = 9
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# No token has this id: where a class looks for the last token that is no padding, it finds the one.
_NO_PADDING = -1


@dataclass
class _BackboneOutput(BaseModelOutputWithPooling):  # type: ignore[misc]
    """With what classes ask of a backbone's output beside hidden states."""

    cache: Any = None
    past_key_values: Any = None


class PickedStates:
    """Takes the place of a class's backbone while its head is computed."""

    def __init__(self) -> None:
        self.states = torch.empty(0)
        self.pooler: nn.Module | None = None

    def __call__(self, *_arguments: Any, **_named: Any) -> _BackboneOutput:
        """Return the states that were picked, pooled as the backbone would pool them."""
        pooled = None if self.pooler is None else self.pooler(self.states)
        return _BackboneOutput(last_hidden_state=self.states, pooler_output=pooled)


@dataclass(frozen=True, slots=True)
class Head:
    """One kind of head, of the model's own or only where adapters bring its weights."""

    kind: str
    # What the class has beside its backbone, the backbone's pooler included if it uses that.
    module: Any
    # The class's name for its backbone: adapters' names begin with it.
    prefix: str
    # The linear that computes the scores, by its name in ``module``.
    output: str
    picked: PickedStates
    # None: the model has no such head of its own.
    facts: HeadFacts | None
    # What it is given.
    pooling: Pooling

    @property
    def output_name(self) -> str:
        """What that is called in the model."""
        return f"{self.kind}_head.{self.output}"

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores of S rows (S x hidden): S x labels, as many as the widest has."""
        self.picked.states = rows.unsqueeze(1)
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        logits: torch.Tensor = self.module(input_ids=ids).logits
        self.picked.states = torch.empty(0)
        return logits.flatten(0, -2)


class StockScores(NamedTuple):
    """What a checkpoint's own class computes of one text, all by itself."""

    states: torch.Tensor  # n x hidden
    scores: torch.Tensor  # labels, or n x labels

    @classmethod
    def of(cls, own: Any) -> StockScores:
        """Compute it with transformers' own attention, then plug ours in again."""
        backbone = own.base_model
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(own.config.vocab_size, (1, _PROBED), generator=generator)
        ids = ids.to(backbone.device)
        with stock_attention(backbone), torch.inference_mode():
            return cls(backbone(ids).last_hidden_state[0], own(ids).logits[0])

    def check(self, heads: Mapping[str, Head], config: Any) -> None:
        """Raise StartupError (MODEL_UNSUPPORTED, MODEL_MISMATCH) unless our head gives the same."""
        head, name = heads.get(kind_of(config) or ""), config.architectures[0]
        if head is None:
            raise StartupError(
                f"{name} cannot be served: its backbone pools in a way of its own",
                ExitCode.MODEL_UNSUPPORTED,
            )
        given = pick(head.pooling, self.states)
        with torch.inference_mode():
            difference = float((head.scores(given).view_as(self.scores) - self.scores).abs().max())
        # Written so that a NaN is refused too.
        if not difference <= _TOLERANCE[self.scores.dtype] * float(self.scores.abs().max()):
            raise StartupError(
                f"{name} cannot be served exactly: its head gives scores {difference:.3g} away from "
                "transformers' own",
                ExitCode.MODEL_MISMATCH,
            )


def pick(pooling: Pooling, states: torch.Tensor) -> torch.Tensor:
    """Return what a head is given of a whole text's states (n x hidden)."""
    if pooling is Pooling.MEAN:
        return states.mean(dim=0, keepdim=True)
    if pooling is Pooling.EACH:
        return states
    return states[-1:] if pooling is Pooling.LAST else states[:1]


def stock_class(kind: str, config: Any) -> Any | None:
    """Return transformers' class with a head of a kind; None: it has none for this family."""
    mapping = _MAPPINGS[kind]
    return mapping.get(type(config), None)


def kind_of(config: Any) -> str | None:
    """Return the kind of head that a checkpoint has by its architecture; None: none."""
    named = getattr(config, "architectures", None) or [""]
    for kind in _MAPPINGS:
        found = stock_class(kind, config)
        if found is not None and found.__name__ == named[0]:
            return kind
    return None


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))


def make_heads(model: Any, own: Any | None = None) -> dict[str, Head]:
    """Return the heads that a model can have, by kind, and attach them to it.

    ``own`` is the model of the checkpoint where it has a head; its weights are the base's. Others
    are there for adapters that bring theirs. The backbone gives its pooler away to a head that
    uses it.
    """
    backbone, config, dtype = model.base_model, model.config, model.dtype
    own_kind = None if own is None else kind_of(config)
    pooler = getattr(backbone, "pooler", None)
    heads: dict[str, Head] = {}
    for kind in _MAPPINGS:
        whole = own if kind == own_kind else _empty(kind, config, dtype)
        if whole is None:
            continue
        is_own = kind == own_kind
        head = _head(kind, whole, pooler, config if is_own else None)
        if head is not None:
            if not is_own:
                _fill(head.module, backbone.device)
            heads[kind] = head
            model.add_module(f"{kind}_head", head.module)
    if any(head.picked.pooler is not None for head in heads.values()):
        # It is the head's, and adapters know it there.
        backbone.pooler = None
    return heads


def _empty(kind: str, config: Any, dtype: torch.dtype) -> Any | None:
    found = stock_class(kind, config)
    if found is None:
        return None
    plain = copy.deepcopy(config)
    with torch.device("meta"):
        return found._from_config(plain, dtype=dtype).eval().requires_grad_(False)


def _head(kind: str, whole: Any, pooler: nn.Module | None, own: Any | None) -> Head | None:
    """Take the backbone out of a class's model; None: its pooler cannot be had apart."""
    prefix = whole.base_model_prefix
    own_backbone = whole._modules.pop(prefix)
    picked = PickedStates()
    if getattr(own_backbone, "pooler", None) is not None:
        # One that is a linear and no more is used in the backbone's own way (ALBERT).
        if pooler is None or not [*pooler.children()]:
            return None
        picked.pooler = pooler
        whole.add_module("pooler", pooler)
    # Not as a module: what it computes with is the backbone's.
    whole.__dict__[prefix] = picked
    whole.config = copy.deepcopy(whole.config)
    whole.config.get_text_config().pad_token_id = _NO_PADDING
    linears = [name for name, each in whole.named_modules() if isinstance(each, nn.Linear)]
    pooling = _pooling(kind, whole)
    facts = None if own is None else head_facts(own, pooling)
    output = [name for name in linears if not name.startswith("pooler.")][-1]
    return Head(kind, whole, prefix, output, picked, facts, pooling)


def _fill(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a head without weights memory; no row computes with what is in it."""
    for name, parameter in [*module.named_parameters()]:
        if not parameter.is_meta:
            continue
        _set(module, name, torch.zeros_like(parameter, device=device))


def _pooling(kind: str, whole: Any) -> Pooling:
    """Return which hidden states a class's head is given."""
    if kind == TOKENS:
        return Pooling.EACH
    if getattr(whole.config, "classifier_pooling", None) == "mean":
        return Pooling.MEAN
    is_generic = hasattr(whole, "score")
    return Pooling.LAST if is_generic else Pooling.FIRST


def head_facts(config: Any, pooling: Pooling) -> HeadFacts:
    """Return what a checkpoint's head says, by its config."""
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return HeadFacts(pooling=pooling, labels=labels, scores=_score_kind(config))


def _score_kind(config: Any) -> ScoreKind:
    if config.problem_type == "multi_label_classification":
        return ScoreKind.ANY_OF
    # As sentence-transformers' cross-encoders are saved, by either of its releases.
    activation = str((getattr(config, "sentence_transformers", None) or {}).get("activation_fn"))
    activation += str(getattr(config, "sbert_ce_default_activation_function", None))
    if config.problem_type == "regression" or "Identity" in activation:
        return ScoreKind.NUMBERS
    # A cross-encoder's one score is the logit of a match.
    return ScoreKind.ANY_OF if config.num_labels == 1 else ScoreKind.ONE_OF
