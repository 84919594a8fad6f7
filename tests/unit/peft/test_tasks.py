"""What adapters of each task see of a base, and what is said of those that cannot be served."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.base import BaseDescription, HeadDescription, ModuleInfo
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.tasks import refuse_headless, seen_base


def linear(width: int = 8) -> ModuleInfo:
    return ModuleInfo(
        kind="linear", type_name="Linear", in_features=width, out_features=width, has_bias=True
    )


EMBEDDING = ModuleInfo(kind="embedding", type_name="Embedding", in_features=20, out_features=8)
BLOCK = ModuleInfo(kind="other", type_name="Pooler")


def head(kind: str, *, prefix: str = "bert", has_pooler: bool = False) -> HeadDescription:
    return HeadDescription(
        architecture=f"Bert{kind}", prefix=prefix, modules={"classifier": linear()},
        has_pooler=has_pooler, output="classifier", pooling=Pooling.FIRST,
    )  # fmt: skip


ENCODER = BaseDescription(
    architecture="BertModel",
    modules={
        "words": EMBEDDING,
        "layer.query": linear(),
        "pooler": BLOCK,
        "pooler.dense": linear(),
    },
    input_embedding="words",
    weight_digests={"words": "d"},
    is_backbone=True,
    heads={"sequence": head("Sequence", has_pooler=True), "tokens": head("Tokens")},
)
DECODER = BaseDescription(
    architecture="LlamaForCausalLM",
    modules={
        "model": BLOCK,
        "model.embed": EMBEDDING,
        "model.q_proj": linear(),
        "lm_head": linear(),
    },
    tied=(("model.embed", "lm_head"),),
    input_embedding="model.embed",
    output_head="lm_head",
    heads={"sequence": head("Score", prefix="model")},
)


def experts(prefix: str) -> ModuleInfo:
    linears = tuple(f"{prefix}moe.experts.*.{own}" for own in ("w1", "w3"))
    return ModuleInfo(kind="experts", type_name="parameter", num_experts=2, older=linears)


def test_older_names_have_the_prefix_of_the_class() -> None:
    decoder = dataclasses.replace(
        DECODER, modules={**DECODER.modules, "model.mlp.experts.gate_up_proj": experts("model.")}
    )
    for task, prefix in (("SEQ_CLS", "model."), ("FEATURE_EXTRACTION", "")):
        modules = seen_base(decoder, task).base.modules
        assert modules[f"{prefix}mlp.experts.gate_up_proj"] == experts(prefix)
    backbone = dataclasses.replace(
        ENCODER, modules={**ENCODER.modules, "mlp.experts.gate_up_proj": experts("")}
    )
    modules = seen_base(backbone, "SEQ_CLS").base.modules
    assert modules["bert.mlp.experts.gate_up_proj"] == experts("bert.")


def served(base: BaseDescription, task: str | None) -> dict[str, str]:
    seen = seen_base(base, task)
    return {name: seen.served.get(name, name) for name in seen.base.modules}


def test_a_description_survives_the_wire() -> None:
    facts = HeadFacts(pooling=Pooling.FIRST, labels=("no", "yes"), scores=ScoreKind.ANY_OF)
    heads = {**ENCODER.heads, "tokens": HeadDescription(**{
        **{name: getattr(head("Tokens"), name) for name in HeadDescription.__dataclass_fields__},
        "facts": facts,
    })}  # fmt: skip
    base = BaseDescription(**{
        **{name: getattr(ENCODER, name) for name in BaseDescription.__dataclass_fields__},
        "heads": heads,
    })  # fmt: skip
    assert BaseDescription.from_json(base.to_json()) == base


def test_classifiers_of_texts_see_prefixes_and_the_pooler() -> None:
    assert served(ENCODER, "SEQ_CLS") == {
        "bert.words": "words", "bert.layer.query": "layer.query",
        "bert.pooler": "sequence_head.pooler", "bert.pooler.dense": "sequence_head.pooler.dense",
        "classifier": "sequence_head.classifier",
    }  # fmt: skip
    base = seen_base(ENCODER, "SEQ_CLS").base
    assert base.architecture == "BertSequence"
    assert base.input_embedding == "bert.words"
    assert base.weight_digests == {"bert.words": "d"}


def test_classifiers_of_tokens_have_no_pooler() -> None:
    assert served(ENCODER, "TOKEN_CLS") == {
        "bert.words": "words", "bert.layer.query": "layer.query",
        "classifier": "tokens_head.classifier",
    }  # fmt: skip


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_extractors_of_an_encoder_s_features_see_it_as_it_is(task: str | None) -> None:
    names = {**{name: name for name in ENCODER.modules}}
    names |= {name: f"sequence_head.{name}" for name in ("pooler", "pooler.dense")}
    assert served(ENCODER, task) == names


def test_a_decoder_s_classifiers_have_its_names_without_its_own_head() -> None:
    assert served(DECODER, "SEQ_CLS") == {
        "model": "model", "model.embed": "model.embed", "model.q_proj": "model.q_proj",
        "classifier": "sequence_head.classifier",
    }  # fmt: skip
    base = seen_base(DECODER, "SEQ_CLS").base
    assert base.output_head == ""
    assert base.tied == ()


def test_extractors_of_a_decoder_s_features_have_no_prefix() -> None:
    names = {"embed": "model.embed", "q_proj": "model.q_proj"}
    assert served(DECODER, "FEATURE_EXTRACTION") == names


def test_texts_generators_of_a_decoder_see_it_as_it_is() -> None:
    assert served(DECODER, "CAUSAL_LM") == {name: name for name in DECODER.modules}


@pytest.mark.parametrize(
    ("base", "task", "words"),
    [
        (ENCODER, "CAUSAL_LM", "which generates no text"),
        (DECODER, "TOKEN_CLS", "has no classification head of this kind"),
    ],
)
def test_what_is_not_served_is_said(base: BaseDescription, task: str, words: str) -> None:
    with pytest.raises(AdapterRefusedError, match=words):
        seen_base(base, task)


def adapter(*names: str) -> HostAdapter:
    weight = ModuleDelta(weight=torch.zeros(2, 8), bias=torch.zeros(2))
    return HostAdapter(digest="", modules=dict.fromkeys(names, weight))


def test_without_a_head_of_its_own_the_base_needs_the_adapter_s() -> None:
    needed = ENCODER.heads["sequence"]
    refuse_headless(adapter("classifier"), needed)
    refuse_headless(adapter(), None)
    with pytest.raises(AdapterRefusedError, match="no weights for classifier.*modules_to_save"):
        refuse_headless(adapter("bert.layer.query"), needed)


@pytest.mark.parametrize(("num", "kind"), [(1, ScoreKind.ANY_OF), (4, ScoreKind.ONE_OF)])
def test_labels_without_names_are_called_as_transformers_calls_them(
    num: int, kind: ScoreKind
) -> None:
    facts = ENCODER.heads["sequence"].facts_with(num)
    assert facts.labels == tuple(f"LABEL_{each}" for each in range(num))
    assert facts.scores is kind
