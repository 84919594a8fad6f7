"""Folders of adapters, through the way of a local adapter: walked, copied, verified, stored, read."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from tests.fuzz.targets import adapter_variants
from tests.fuzz.targets.mutate import BYTE_MUTATORS, DOCUMENT_MUTATORS, TEXT_MUTATORS, dumped
from tests.fuzz.targets.target import Case, FoundFaultError, Mutator, Target, require, require_words
from tests.helpers.small_adapters import make_base
from tests.helpers.tiny_tokenizers import byte_level

from lorax_contract.adapters import AdapterUnavailableError
from lorax_shard.adapter_files import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from lorax_shard.fetching.job import VerifySettings
from lorax_shard.fetching.process import Setup, answer
from lorax_shard.fetching.sources.interface import SourceSettings
from lorax_shard.peft.context import make_context
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import read_normal

_REASONS = {"refused", "too_large", "not_found", "no_access", "transient"}
_LIMITS = AdapterLimits(
    max_config_bytes=1 << 17, max_weights_bytes=1 << 20, max_header_bytes=1 << 17, max_tensors=300,
    max_rank=16,
)  # fmt: skip


class AdapterFiles(Target):
    """A content has documents by name, the tensors of a header with their bytes, and links."""

    name = "adapters"
    num_per_opening = 500
    # A base of two kinds: one whose embedding and head are tied.
    _tied = False

    def __init__(self) -> None:
        documents = {
            f"config_{name}": _of("config", each) for name, each in DOCUMENT_MUTATORS.items()
        }
        header = {f"header_{name}": _of("header", each) for name, each in DOCUMENT_MUTATORS.items()}
        self.mutators = documents | header | adapter_variants.MUTATORS
        self.raw_mutators = {
            **{
                f"weights_{name}": _of_file(WEIGHTS_FILE, each)
                for name, each in BYTE_MUTATORS.items()
            },
            **{
                f"config_{name}": _of_file(CONFIG_FILE, each)
                for name, each in TEXT_MUTATORS.items()
            },
            "length": _of_file(WEIGHTS_FILE, _length),
        }

    def open(self) -> None:
        """Make a store, and what verifies."""
        self._folder = TemporaryDirectory()
        root = Path(self._folder.name)
        self._root = root / "adapters"
        self._root.mkdir()
        (root / "secret").write_text("a secret")
        tokenizer = root / TOKENIZER_FILE
        byte_level().save(str(tokenizer))
        context = make_context(make_base(), _LIMITS, "toy", tokenizer)
        self._setup = Setup(
            store_dir=str(root / "store"),
            store_max_bytes=64 << 20,
            sources=SourceSettings(local_roots=(str(self._root),), hub_enabled=False),
            verify=VerifySettings(function="lorax_shard.peft.verify:verify", context=context),
        )
        self._verifier = self._setup.verify.load()

    def close(self) -> None:
        """Remove all."""
        self._folder.cleanup()

    def plain(self, draw: random.Random) -> Any:
        """Return an adapter of some kind."""
        options, tensors = draw.choice(adapter_variants.VARIANTS)()
        raw = save(tensors)
        size = int.from_bytes(raw[:8], "little")
        return {
            "config": copy.deepcopy(options),
            "header": json.loads(raw[8 : 8 + size]),
            "data": raw[8 + size :],
            "others": {},
            "odd": {},
        }

    def written(self, content: Any) -> Any:
        """Return files by name, and what stands in the place of some."""
        header = dumped(content["header"])
        weights = struct.pack("<Q", len(header)) + header + content["data"]
        files = {CONFIG_FILE: dumped(content["config"]), WEIGHTS_FILE: weights, **content["others"]}
        return {"files": files, "odd": content["odd"]}

    def judge(self, case: Case) -> str:
        """It is refused for a reason that is its own, or what is stored is what was verified."""
        with TemporaryDirectory(dir=self._root) as folder:
            _write(Path(folder), case.content, self._root.parent / "secret")
            command = {"ref": {"source": "local", "id": Path(folder).name, "revision": None}}
            said = answer(self._setup, self._verifier, command, lambda _told: None)
        if "error" in said:
            return _refused(said["error"])
        facts, digest = said["outcome"]["facts"], said["outcome"]["digest"]
        json.dumps(facts, allow_nan=False)
        store = self._setup.open_store()
        try:
            lease = store.lease(digest)
            if lease is None:
                raise FoundFaultError("it is not in the store")
            with lease as entry:
                require("secret" not in os.listdir(entry.folder), "a secret is in the store")
                adapter = read_normal(entry.folder / facts["derived"])
            require(adapter.digest == facts["content_digest"], "another content is stored")
            for delta in adapter.modules.values():
                for part in (delta.a, delta.b, delta.weight, delta.bias, delta.token_rows):
                    require(part is None or bool(torch.isfinite(part).all()), "it has NaN")
            store.remove(digest)
        finally:
            store.index.close()
        return "taken"


def _refused(document: dict[str, Any]) -> str:
    error = AdapterUnavailableError.from_json(document)
    require(error.reason.value in _REASONS, f"{error.reason}: {error.text}: {error.detail}")
    require_words(error.text)
    require("a secret" not in error.text, "a secret is in the refusal")
    return "refused"


def _write(folder: Path, content: dict[str, Any], secret: Path) -> None:
    for name, raw in content["files"].items():
        (folder / name).write_bytes(raw)
    for name, kind in content["odd"].items():
        path = folder / name
        path.unlink(missing_ok=True)
        match kind:
            case "link outside":
                path.symlink_to(secret)
            case "link nowhere":
                path.symlink_to(folder / "nowhere")
            case "link to itself":
                path.symlink_to(path)
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "empty":
                path.write_bytes(b"")


def _of(part: str, mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        return {**content, part: mutator(draw, content[part])}

    return change


def _of_file(name: str, mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        files = content["files"]
        return {**content, "files": {**files, name: mutator(draw, files[name])}}

    return change


def _length(draw: random.Random, raw: bytes) -> bytes:
    """Announce a header of another length."""
    length = draw.choice([0, 1, 7, len(raw), len(raw) - 8, 2**31, 2**63, 2**64 - 1, 100_000_000])
    return struct.pack("<Q", length) + raw[8:]


# What an adapter may bring beside its weights.
OTHERS = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
