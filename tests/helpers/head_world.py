"""Adapters with classification heads, as PEFT makes and computes them, beside a served engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tests.helpers.peft_folders import quiet, randomise
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.thread_ranks import ThreadGroup
from tests.helpers.tiny_models import make_tokenizer, widen
from tokenizers import Tokenizer

from lorax_contract.adapters import AdapterContent
from lorax_contract.config import ShardConfig
from lorax_contract.pooling import Pooling
from lorax_contract.step import AdapterHandle, WarmupSpec
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.store.store import AdapterStore

BLOCK_SIZE, MAX_TOKENS, MAX_ROWS = 8, 64, 12
_SHAPE = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 80,
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The family's name in transformers' classes, and what its config has beside the shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "distilbert": ("DistilBert", {"sinusoidal_pos_embds": False}),
    "electra": ("Electra", {"embedding_size": 24}),
    "modernbert": (
        "ModernBert",
        {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2, **_IDS},
    ),
    "deberta-v2": (
        "DebertaV2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
    ),
    "mpnet": ("MPNet", {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "llama": ("Llama", {"num_key_value_heads": 2, **_IDS}),
}
_TARGETS = {
    "bert": ["query", "value"], "roberta": ["query", "key"], "distilbert": ["q_lin", "v_lin"],
    "electra": ["query", "value"], "modernbert": ["Wqkv"], "mpnet": ["q", "k"],
    "deberta-v2": ["query_proj", "value_proj"], "llama": ["q_proj", "down_proj"],
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """An adapter: its task ("": of the plain backbone), how many labels it has, its options."""

    task: str
    num_labels: int
    options: dict[str, Any]

    @property
    def pooling(self) -> Pooling | None:
        """What its head is given where that is no question of the family."""
        return Pooling.EACH if self.task == "TOKEN_CLS" else None


def adapters_of(family: str) -> list[Trained]:
    """Return adapters with heads of different widths and kinds, and one without a head."""
    some: dict[str, Any] = {"target_modules": _TARGETS[family]}
    # PEFT itself fails where it would adapt a linear that it saves as a whole.
    is_named = family in ("deberta-v2", "distilbert")
    every = {"target_modules": _TARGETS[family] if is_named else "all-linear"}
    # Its defaults leave out what these families have before their classifiers.
    before = {"deberta-v2": "pooler", "modernbert": "head"}.get(family)
    saved = {"modules_to_save": [before, "classifier"]} if before else {}
    of_tokens = {} if before == "pooler" else saved
    return [
        Trained("SEQ_CLS", 2, {**some, **saved, "r": 4}),
        Trained("SEQ_CLS", 5, {**every, **saved, "r": 3, "use_dora": True}),
        Trained("TOKEN_CLS", 4, {**some, **of_tokens, "r": 8, "lora_alpha": 4}),
        Trained("SEQ_CLS", 1, {**some, **saved, "r": 2, "use_rslora": True}),
        Trained("FEATURE_EXTRACTION", 0, {**some, "r": 4}),
    ]


class HeadWorld:
    """A tiny model, adapters of all tasks on it, and PEFT's own model of each.

    Args:
        head: the task of the head that the model itself has, with three labels; "": none.
        without: the task of adapters that are left out.
    """

    def __init__(self, root: Path, family: str, head: str = "", without: str = "") -> None:
        self.family, self.path = family, root / "model"
        self._name, extra = FAMILIES[family]
        self.path.mkdir(parents=True)
        make_tokenizer(self.path)
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        values = {**_SHAPE, "vocab_size": self.tokenizer.get_vocab_size(), **extra}
        self._config = getattr(transformers, f"{self._name}Config")(**values, num_labels=3)
        suffix = {"": "ForCausalLM" if family == "llama" else "Model"}.get(head, _suffix(head))
        self.stock = getattr(transformers, f"{self._name}{suffix}")(self._config).eval()
        with torch.no_grad():
            widen(self.stock, 1)
        self.stock.save_pretrained(self.path)
        self.adapters = [each for each in adapters_of(family) if each.task != without]
        self.folders = [self._save(n, each, root) for n, each in enumerate(self.adapters)]
        self.peft = [self._loaded(n) for n in range(len(self.adapters))]
        self._store = AdapterStore(root / "store", max_bytes=1 << 30)
        self._root = root

    def _class(self, trained: Trained) -> Any:
        return getattr(transformers, f"{self._name}{_suffix(trained.task)}")

    def _bare(self, trained: Trained) -> Any:
        labels = {"num_labels": trained.num_labels} if trained.num_labels else {}
        with quiet():
            return self._class(trained).from_pretrained(
                self.path, ignore_mismatched_sizes=True, **labels
            )

    def _save(self, number: int, trained: Trained, root: Path) -> Path:
        torch.manual_seed(number)
        with quiet():
            config = LoraConfig(task_type=trained.task, **trained.options)
            tuned = get_peft_model(self._bare(trained), config)
            randomise(tuned, "none", number)
            tuned.save_pretrained(root / f"saved-{number}")
        return root / f"saved-{number}"

    def _loaded(self, number: int) -> Any:
        with quiet():
            bare = self._bare(self.adapters[number])
            return PeftModel.from_pretrained(bare, self.folders[number]).eval()

    @property
    def config(self) -> ShardConfig:
        """What a shard is told."""
        return ShardConfig(
            model_dir=str(self.path), model_id="tiny", shard_uris=["unix:///unused"],
            adapters=True, adapter_store_dir=str(self._root / "store"), linear_backend="panel",
        )  # fmt: skip

    def engine(self, paged: HFPagedModel | None = None, group: ThreadGroup | None = None) -> Engine:
        """Return a warm engine on whose lane all adapters lie; of a part, one rank's."""
        paged = load_paged_model(self.config) if paged is None else paged
        assert paged.lora is not None
        assert paged.base is not None
        host = HostCache(self._store, host_bytes=1 << 30)
        lane = PrepareLane(host, paged.lora, dtype=torch.float32)
        for handle, folder in enumerate(self.folders, start=1):
            content = AdapterContent(parts=(put_adapter(self._store, folder, paged.base),))
            lane.prepare(AdapterHandle(handle), content)
        pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5)
        graphs = (
            None if group is not None else GraphLimits(MAX_ROWS, max_rank=8, max_slots=MAX_ROWS)
        )
        engine = Engine(paged, self.tokenizer, pool, adapters=lane, group=group, graphs=graphs)
        engine.warm_up(
            WarmupSpec(
                max_input_length=MAX_TOKENS, max_total_tokens=MAX_TOKENS,
                max_step_tokens=2 * MAX_TOKENS, max_rows=MAX_ROWS, max_blocks=200,
            )
        )  # fmt: skip
        return engine

    @torch.no_grad()
    def scores(self, number: int, ids: list[int]) -> torch.Tensor:
        """Return what PEFT's model of an adapter gives for a text: its scores."""
        return self.peft[number](input_ids=torch.tensor([ids])).logits[0].float()

    @torch.no_grad()
    def states(self, number: int | None, ids: list[int]) -> torch.Tensor:
        """Return what the last layer gives, with an adapter without a head or none."""
        model = self.stock.base_model if number is None else self.peft[number]
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].float()


def _suffix(task: str) -> str:
    named = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
    return named.get(task, "Model")
