"""A tiny encoder with adapters that PEFT made, texts for them, and what transformers and PEFT give."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.helpers.drive_engine import Answer
from tests.helpers.encoder_models import (
    LONGEST,
    TELLS_TEXTS_APART,
    load_encoder,
    make_tiny_encoder,
)
from tests.helpers.paged_runner import RELATIVE_TOLERANCE
from tests.helpers.peft_folders import quiet, randomise
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.thread_ranks import ThreadGroup
from tests.helpers.tiny_models import VOCAB_SIZE
from tests.helpers.toy_paged_model import pooled
from tokenizers import Tokenizer

from lorax_contract.adapters import AdapterContent
from lorax_contract.config import ShardConfig
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    AdapterHandle,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.store.store import AdapterStore

BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS, MAX_STEP_TOKENS = 4, 200, 8, 100
# Each but EACH, whose vectors have another length for each text.
POOLINGS = tuple(each for each in Pooling if each is not Pooling.EACH)
# Two of the longest, several of one length, and those of a single token among them.
LENGTHS = (1, 7, LONGEST, 13, 7, 2, 1, 31, 7, 5, LONGEST, 19)
# Of each family: all linears by the names that adapters know them by, a query, a value, what puts
# heads together, a norm.
_BERT = (
    ["query", "key", "value", "dense"],
    ["query", "value", "attention.output.dense"],
    "LayerNorm",
)
_TARGETS = {
    "albert": (
        ["query", "value", "dense", "ffn", "ffn_output"],
        ["query", "value", "attention.dense"],
        "full_layer_layer_norm",
    ),
    "deberta": (
        ["in_proj", "pos_proj", "pos_q_proj", "dense"],
        ["in_proj", "attention.output.dense", "pos_q_proj"],
        "LayerNorm",
    ),
    "deberta-v2": (
        ["query_proj", "key_proj", "value_proj", "dense"],
        ["query_proj", "value_proj", "attention.output.dense"],
        "LayerNorm",
    ),
    "distilbert": (
        ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
        ["q_lin", "v_lin", "out_lin"],
        "sa_layer_norm",
    ),
    "modernbert": (["Wqkv", "Wo", "Wi"], ["Wqkv", "Wi", "attn.Wo"], "mlp_norm"),
    "mpnet": (["q", "k", "v", "o", "dense"], ["q", "v", "attn.o"], "LayerNorm"),
}


@dataclass(frozen=True)
class Text:
    """A text, or two of which the second begins at ``second``, and with which adapter."""

    ids: list[int]
    second: int = 0
    handle: int = 0


class EncoderWorld:
    """Owns a folder with the model and its adapters, and the models that are right by definition."""

    def __init__(
        self,
        family: str,
        root: Path,
        adapters: list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> None:
        self.family = family
        self.path = make_tiny_encoder(family, root / "model", **overrides)
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self.config = ShardConfig(
            model_dir=str(self.path), model_id="tiny", shard_uris=["unix:///unused"],
            adapters=True, adapter_store_dir=str(root / "store"),
        )  # fmt: skip
        self.folders = [
            self._save(root / f"saved-{number}", number, options)
            for number, options in enumerate(
                adapter_options(family) if adapters is None else adapters
            )
        ]
        self.stock = [load_encoder(self.path), *(self._load(each) for each in self.folders)]
        self.store = AdapterStore(root / "store", max_bytes=1 << 30)

    def _save(self, folder: Path, seed: int, options: dict[str, Any]) -> Path:
        with quiet():
            tuned = get_peft_model(load_encoder(self.path), LoraConfig(**options))
            randomise(tuned, options.get("bias", "none"), seed)
            tuned.save_pretrained(folder)
        return folder

    def _load(self, folder: Path) -> Any:
        with quiet():
            return PeftModel.from_pretrained(load_encoder(self.path), folder).eval()

    def texts(self, handles: tuple[int, ...] = (0,)) -> list[Text]:
        """Return texts of all lengths, by turns with these adapters, each third one a pair."""
        draw = random.Random(7)
        made = []
        for number in range(3 * len(LENGTHS)):
            length = LENGTHS[number % len(LENGTHS)]
            ids = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
            is_pair = self.family in TELLS_TEXTS_APART and length > 1 and draw.random() < 0.4
            second = draw.randrange(1, length) if is_pair else 0
            made.append(Text(ids, second, handles[number % len(handles)]))
        draw.shuffle(made)
        return made

    @torch.no_grad()
    def hidden(self, text: Text) -> torch.Tensor:
        """Return what the last layer gives for each token of a text that is computed alone."""
        arguments: dict[str, Any] = {"input_ids": torch.tensor([text.ids])}
        if self.family in TELLS_TEXTS_APART:
            kinds = [int(text.second and at >= text.second) for at in range(len(text.ids))]
            arguments["token_type_ids"] = torch.tensor([kinds])
        states: torch.Tensor = self.stock[text.handle](**arguments).last_hidden_state[0]
        return states.float()

    def engine(
        self,
        paged: HFPagedModel,
        group: ThreadGroup | None = None,
        graphs: GraphLimits | None = None,
    ) -> Engine:
        """Return a warm engine on whose lane all adapters lie."""
        assert paged.lora is not None
        assert paged.base is not None
        lane = PrepareLane(
            HostCache(self.store, host_bytes=1 << 30), paged.lora, dtype=torch.float32
        )
        for handle, folder in enumerate(self.folders, start=1):
            content = AdapterContent(parts=(put_adapter(self.store, folder, paged.base),))
            lane.prepare(AdapterHandle(handle), content)
        pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
        engine = Engine(paged, self.tokenizer, pool, adapters=lane, group=group, graphs=graphs)
        spec = WarmupSpec(
            max_input_length=LONGEST, max_total_tokens=LONGEST + 1,
            max_step_tokens=MAX_STEP_TOKENS, max_rows=MAX_ROWS,
        )  # fmt: skip
        engine.warm_up(spec)
        return engine


def adapter_options(family: str) -> list[dict[str, Any]]:
    """Return what PEFT is told of each adapter; the handles of requests begin at 1."""
    linears, some, norm = _TARGETS.get(family, _BERT)
    embedding = "tok_embeddings" if family == "modernbert" else "word_embeddings"
    # The first DeBERTa keeps some beside its linears, where adapters have no place.
    bias = "lora_only" if family == "deberta" else "all"
    return [
        {"target_modules": linears, "r": 8, "lora_alpha": 8},
        {"target_modules": some, "r": 3, "lora_alpha": 3, "use_dora": True},
        {"target_modules": some[1:2], "r": 2, "bias": bias},
        {"target_modules": some[:1], "r": 4, "use_rslora": True, "modules_to_save": [norm]},
        {"target_modules": "all-linear", "r": 2, "use_dora": True},
        {"target_modules": [embedding, some[0]], "r": 4, "lora_alpha": 2},
    ]


def whole_scheduler(num_adapters: int, *, max_rows: int = MAX_ROWS) -> Scheduler:
    """Return the router's scheduler as it is for encoders; three adapters fit at once."""
    table = AdapterTable(max_resident=3)
    for handle in range(1, num_adapters + 1):
        table.add(AdapterHandle(handle), 1)
    return Scheduler(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=MAX_STEP_TOKENS,
        max_rows=max_rows, whole_prompts=True, prefix_caching=False, adapters=table,
    )  # fmt: skip


def specs_of(texts: list[Text], poolings: tuple[Pooling, ...] = POOLINGS) -> list[RequestSpec]:
    """Return what asks for a vector of each text, by all poolings in turn."""
    return [
        RequestSpec(
            request_id=RequestId(number), prompt_ids=text.ids, sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=0), adapter=AdapterHandle(text.handle),
            output=OutputKind.VECTOR, pooling=poolings[number % len(poolings)],
            second_start=text.second,
        )
        for number, text in enumerate(texts, start=1)
    ]  # fmt: skip


def check_vectors(
    world: EncoderWorld,
    texts: list[Text],
    asked: list[RequestSpec],
    answers: dict[RequestId, Answer],
) -> float:
    """Fail unless each vector is made of the text's own states; return the largest difference."""
    worst = 0.0
    for text, spec in zip(texts, asked, strict=True):
        answer = answers[spec.request_id]
        assert answer.error is None
        assert answer.vector is not None
        found = torch.from_numpy(np.frombuffer(answer.vector, dtype="<f4").copy())
        expected = pooled(world.hidden(text), spec.pooling)
        difference = float((found - expected).abs().max()) / float(expected.abs().max())
        assert difference <= RELATIVE_TOLERANCE, (spec.pooling.name, len(text.ids), difference)
        assert float(torch.cosine_similarity(found, expected, dim=0)) >= 0.99999
        worst = max(worst, difference)
    return worst
