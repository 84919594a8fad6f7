"""tokenizer.json of adapters: verified as shards do, and used in the router's limited process."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz.targets.lost_processes import ProcessesLost
from tests.fuzz.targets.mutate import DOCUMENT_MUTATORS, ODD, TEXT_MUTATORS, dumped
from tests.fuzz.targets.target import (
    Case,
    FoundFaultError,
    LoopTarget,
    Mutator,
    require,
    require_words,
)
from tests.helpers import tiny_tokenizers

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.errors import ValidationError
from lorax_router.service.prompts.encoding import TextToEncode
from lorax_router.service.prompts.own_tokenizers import OwnTokenizers, TokenizerLimits
from lorax_shard.adapter_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits, find_text_files
from lorax_shard.peft.tokenizer import read_tokenizer
from lorax_shard.vocabulary import Vocabulary, write_vocabulary

_LIMITS = TokenizerLimits(
    cache_bytes=48 << 20, reading_bytes=192 << 20, deadline_s=5.0, num_processes=1
)
_FILE_LIMITS = AdapterLimits(max_tokenizer_bytes=4 << 20)
_KINDS = ("byte_level", "byte_fallback", "unigram", "word_piece", "end_of_word")
_TEXTS = (
    "the quick brown fox",
    "naïve café 🙂",
    "",
    "a" * 3_000,
    "<|end|> \x00\n",
    "1 2 3",
    "你好",
)


class TokenizerFiles(LoopTarget):
    """A content has the document of a tokenizer, that of its configuration, and the kind of the base's."""

    name = "tokenizers"
    num_per_opening = 1500
    most_cpu_s = 5.0

    def __init__(self) -> None:
        self.mutators = {
            name: _of("document", each) for name, each in DOCUMENT_MUTATORS.items()
        } | {
            each.__name__.removeprefix("_"): each
            for each in (_rule, _added, _id, _merge, _token, _model, _padding, _config, _other_kind)
        }
        self.raw_mutators = {name: _of_raw(each) for name, each in TEXT_MUTATORS.items()}
        self._lost = ProcessesLost()
        self._documents: dict[str, Any] = {}

    def plain(self, draw: random.Random) -> Any:
        """Return the base's own, as adapters often bring it."""
        kind = draw.choice(_KINDS)
        if kind not in self._documents:
            self._documents[kind] = getattr(tiny_tokenizers, kind)().to_str()
        return {
            "document": json.loads(self._documents[kind]),
            "config": {"eos_token": tiny_tokenizers.EOS},
            "base": kind,
            "text": draw.choice(_TEXTS),
        }

    def written(self, content: Any) -> Any:
        """Return the same with the files as bytes."""
        config = dumped(content["config"])
        return {**content, "document": dumped(content["document"]), "config": config}

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Write bases' tokenizers, start what uses the others."""
        self._folder = Path(stack.enter_context(TemporaryDirectory()))
        for kind in _KINDS:
            getattr(tiny_tokenizers, kind)().save(str(self._folder / f"{kind}.json"))
        self._raw = b""

        async def read(_key: str) -> bytes:
            return self._raw

        self._own = OwnTokenizers(read, _LIMITS)
        stack.push_async_callback(self._own.close)
        log = logging.getLogger("lorax_router.service.prompts.own_tokenizers")
        log.addHandler(self._lost)
        stack.callback(log.removeHandler, self._lost)

    async def judged(self, case: Case) -> str:
        """It is refused by name, or both sides know the same tokens of it."""
        raw = case.content["document"]
        folder = self._folder / "own"
        folder.mkdir(exist_ok=True)
        (folder / TOKENIZER_FILE).write_bytes(raw)
        (folder / TOKENIZER_CONFIG_FILE).write_bytes(case.content["config"])
        verified = _verified(folder, self._folder / f"{case.content['base']}.json")
        if len(raw) > _FILE_LIMITS.max_tokenizer_bytes:
            require(verified is None, "it is too large, and taken")
            return "refused"
        self._lost.words.clear()
        self._raw = raw
        own = self._own.get(f"{hash(raw)}", "adapter a")
        try:
            await self._own.ready(own)
            ids = (await own.encode(TextToEncode(case.content["text"]))).ids
        except (AdapterUnavailableError, ValidationError) as error:
            require_words(str(error))
            require(
                verified is None or isinstance(error, ValidationError),
                f"verified, and then: {error}",
            )
            return "refused"
        finally:
            require(not self._lost.words, f"a process ended by an error: {self._lost.words}")
        if verified is None:
            # No shard lets it come here; it harmed nobody.
            return "refused"
        require(all(0 <= each < len(verified) for each in ids), "an id is beyond what was verified")
        return "taken"


def _verified(folder: Path, base: Path) -> Vocabulary | None:
    """Return the tokens by which a shard knows it; None: it is refused."""
    try:
        find_text_files(folder, _FILE_LIMITS)
        found = read_tokenizer(folder, base)
    except AdapterRefusedError as error:
        require_words(error.public)
        return None
    if found is None:
        raise FoundFaultError("it is there, and nobody sees it")
    write_vocabulary(found.vocabulary, folder)
    return found.vocabulary


def _of(part: str, mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        return {**content, part: mutator(draw, content[part])}

    return change


def _of_raw(mutator: Mutator) -> Mutator:
    return _of("document", mutator)


def _with(content: Any, **parts: Any) -> Any:
    if not isinstance(content["document"], dict):
        return content
    return {**content, "document": {**content["document"], **parts}}


def _rule(draw: random.Random, content: Any) -> Any:
    """Another rule for texts."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000}
    rules = [None, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [grow] * 3}, {"type": "Nope"}, {"type": "ByteLevel"},
             {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}, {"type": "Split", "pattern": {"Regex": "("}},
             {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
              "special_tokens": {}}, {"type": "Metaspace"}, {"type": "Strip"}, *ODD]  # fmt: skip
    name = draw.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
    return _with(content, **{name: draw.choice(rules)})


def _added(draw: random.Random, content: Any) -> Any:
    """Tokens that are added."""
    token = {"id": draw.choice([0, 1, 500, 40_000, 2**31, 2**32, -1, *ODD[:12]]), "content": draw.choice(["<new>", "", "a", "é" * 2_000, "\x00", " ", "<|end|>"]),
             "single_word": False, "lstrip": draw.random() < 0.5, "rstrip": False, "normalized": draw.random() < 0.5, "special": draw.random() < 0.5}  # fmt: skip
    if draw.random() < 0.3:
        token[draw.choice(sorted(token))] = draw.choice(ODD)
    many = draw.choice(
        [
            [token],
            [token] * 2,
            [
                {**token, "id": n, "content": f"<{n}>"}
                for n in range(600, 600 + draw.choice([3, 40_000]))
            ],
        ]
    )
    before = (
        content["document"].get("added_tokens") if isinstance(content["document"], dict) else None
    )
    return _with(content, added_tokens=[*(before if isinstance(before, list) else []), *many])


def _model_with(content: Any, **parts: Any) -> Any:
    model = content["document"].get("model") if isinstance(content["document"], dict) else None
    return _with(content, model={**model, **parts}) if isinstance(model, dict) else content


def _vocabulary(content: Any) -> Any:
    document = content["document"]
    model = document.get("model") if isinstance(document, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None


def _id(draw: random.Random, content: Any) -> Any:
    """A token with another id, or another's."""
    vocabulary = _vocabulary(content)
    value = draw.choice([0, 1, 499, 500, 40_000, 2**31, 2**32 - 1, 2**32, -1, *ODD])
    if isinstance(vocabulary, dict) and vocabulary:
        return _model_with(content, vocab={**vocabulary, draw.choice(sorted(vocabulary)): value})
    if isinstance(vocabulary, list) and vocabulary:
        return _model_with(content, vocab=[*vocabulary, [draw.choice(["x", 5, None]), value]])
    return content


def _token(draw: random.Random, content: Any) -> Any:
    """One more token, or one less, or a very long one."""
    vocabulary = _vocabulary(content)
    if not isinstance(vocabulary, dict):
        return content
    vocabulary = dict(vocabulary)
    if vocabulary and draw.random() < 0.4:
        del vocabulary[draw.choice(sorted(vocabulary))]
    else:
        vocabulary[draw.choice(["zz", "", "é" * 600, "a" * 2_000, "\ud800", "\x00", " "])] = len(
            vocabulary
        )
    return _model_with(content, vocab=vocabulary)


def _merge(draw: random.Random, content: Any) -> Any:
    """Merges of what there is or is not."""
    merges = content["document"].get("model", {}) if isinstance(content["document"], dict) else {}
    before = merges.get("merges") if isinstance(merges, dict) else None
    piece = draw.choice(
        [["t", "h"], "t h", "t", ["t"], ["t", "h", "e"], ["", ""], "", " ", ["zz", "qq"], *ODD]
    )
    return _model_with(
        content,
        merges=[
            *(before if isinstance(before, list) else []),
            *[piece] * draw.choice([1, 2, 2_000]),
        ],
    )


def _model(draw: random.Random, content: Any) -> Any:
    """An option of the model."""
    name = draw.choice(["type", "dropout", "unk_token", "unk_id", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
                        "ignore_merges", "max_input_chars_per_word", "vocab", "merges", "extra"])  # fmt: skip
    return _model_with(
        content, **{name: draw.choice(["BPE", "WordLevel", "Unigram", "WordPiece", [], {}, *ODD])}
    )


def _padding(draw: random.Random, content: Any) -> Any:
    """Settings of a training."""
    padding = {"strategy": {"Fixed": draw.choice([10, 10**9, 2**63])}, "direction": "Right", "pad_to_multiple_of": draw.choice([None, 0, 2**40]), "pad_id": 0,
               "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    truncation = {
        "direction": "Right",
        "max_length": draw.choice([0, 1, 2**63]),
        "strategy": "LongestFirst",
        "stride": draw.choice([0, 5, 2**40]),
    }
    return _with(
        content,
        padding=draw.choice([padding, None, *ODD]),
        truncation=draw.choice([truncation, None, *ODD]),
    )


def _config(draw: random.Random, content: Any) -> Any:
    """Another configuration beside it."""
    values = [
        {"eos_token": draw.choice(["a", "no token", {"content": "a"}, {"content": 5}, *ODD])},
        *ODD,
    ]
    return {**content, "config": draw.choice(values)}


def _other_kind(draw: random.Random, content: Any) -> Any:
    """A base with a tokenizer of another kind."""
    return {**content, "base": draw.choice(_KINDS)}
