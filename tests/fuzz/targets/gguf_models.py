"""GGUF files: what they say is read, and what is taken is converted."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz.targets.mutate import BYTE_MUTATORS
from tests.fuzz.targets.target import Case, Target, require, require_words
from tests.helpers.tiny_gguf import write_gguf

from lorax_contract.errors import StartupError
from lorax_shard.prepare.gguf import convert_gguf, read_facts
from lorax_shard.prepare.gguf_blocks import keep_blocks

# The head: a magic word, the version, the numbers of tensors and of values.
_HEAD = struct.Struct("<4sIQQ")
_COUNTS = (0, 1, 2, 255, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1)
_QUANTIZED = {"blk.0.ffn_down.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0"}


class GgufModels(Target):
    """A content is the bytes of a file."""

    name = "gguf"
    num_per_opening = 500
    most_cpu_s = 20.0

    def __init__(self) -> None:
        self.mutators = BYTE_MUTATORS | {
            each.__name__.removeprefix("_"): each
            for each in (
                _count,
                _length,
                _type,
                _name,
                _text,
                _number,
                _head_byte,
                _dimension,
                _zeros,
            )
        }
        self._files: list[bytes] = []

    def open(self) -> None:
        """Make a place for files."""
        self._folder = TemporaryDirectory()
        self._root = Path(self._folder.name)

    def close(self) -> None:
        """Remove it."""
        self._folder.cleanup()

    def plain(self, draw: random.Random) -> Any:
        """Return a small model, quantized in part or not."""
        if not self._files:
            with TemporaryDirectory() as folder:
                for number, options in enumerate(({}, {"tied": False}, {"types": _QUANTIZED})):
                    path = Path(folder, f"{number}.gguf")
                    write_gguf(path, **options)  # type: ignore[arg-type]
                    self._files.append(path.read_bytes())
        return draw.choice(self._files)

    def judge(self, case: Case) -> str:
        """It is refused in words, or becomes a folder with weights."""
        with TemporaryDirectory(dir=self._root) as name:
            folder = Path(name)
            source = folder / "model.gguf"
            source.write_bytes(case.content)
            try:
                read_facts(source)
                made = convert_gguf(source, "0" * 64, folder, lambda _event: None)
                require((made / "tokenizer.json").is_file(), "it has no tokenizer")
                require(list(made.glob("*.safetensors")), "it has no weights")
                keep_blocks(source, made, folder, lambda _event: None)
            except StartupError as error:
                require_words(str(error))
                return "taken" if "holds no quantized weights" in str(error) else "refused"
        return "taken"


def _patched(raw: bytes, place: int, piece: bytes) -> bytes:
    return raw[:place] + piece + raw[place + len(piece) :]


def _words(raw: bytes) -> list[int]:
    """Return where texts of the file have their lengths, as far as one sees."""
    found = []
    for name in (
        b"general.architecture",
        b"llama.",
        b"tokenizer.ggml.",
        b"blk.0.",
        b"token_embd",
        b"<|im_",
        b"tokenizer.chat_template",
    ):
        place = raw.find(name)
        while place >= 8 and len(found) < 200:
            found.append(place - 8)
            place = raw.find(name, place + 1)
    return found


def _count(draw: random.Random, raw: bytes) -> bytes:
    """Another number of tensors or of values, or another version."""
    if len(raw) < _HEAD.size:
        return raw
    if draw.random() < 0.2:
        return _patched(raw, 4, struct.pack("<I", draw.choice([0, 1, 2, 4, 2**24 * 3, 2**32 - 1])))
    return _patched(raw, draw.choice([8, 16]), struct.pack("<Q", draw.choice(_COUNTS)))


def _length(draw: random.Random, raw: bytes) -> bytes:
    """A text, or a list, of another length."""
    places = _words(raw)
    if not places:
        return raw
    place = draw.choice(places)
    if draw.random() < 0.5:
        # Behind a name there is a kind, and of lists a kind and a length.
        size = int.from_bytes(raw[place : place + 8], "little")
        place += 8 + min(size, 64) + draw.choice([0, 4, 8])
    return _patched(raw, place, struct.pack("<Q", draw.choice([*_COUNTS, 3, 20])))[: len(raw)]


def _type(draw: random.Random, raw: bytes) -> bytes:
    """A value, or a tensor, of another type."""
    places = _words(raw)
    if not places:
        return raw
    place = draw.choice(places)
    size = int.from_bytes(raw[place : place + 8], "little")
    place += 8 + min(size, 64) + draw.choice([0, 4, 20, 12])
    return _patched(
        raw, place, struct.pack("<I", draw.choice([*range(14), 20, 30, 39, 99, 2**32 - 1]))
    )


def _name(draw: random.Random, raw: bytes) -> bytes:
    """Another name of the same length."""
    names = [b"llama", b"gpt2\0", b"general.architecture", b"blk.0.attn_q.weight", b"token_embd.weight", b"tokenizer.ggml.tokens", b"smollm",
             b"tokenizer.ggml.model", b"llama.block_count", b"output_norm.weight"]  # fmt: skip
    name = draw.choice(names)
    other = draw.choice([name[::-1], name.upper(), b"x" * len(name), b"\xff" * len(name), b"qwen2"[: len(name)].ljust(len(name), b"x"),
                         b"gemma"[: len(name)].ljust(len(name), b"x"), b"phi3\0"[: len(name)].ljust(len(name), b"\0")])  # fmt: skip
    return raw.replace(name, other, draw.choice([1, -1]))


def _text(draw: random.Random, raw: bytes) -> bytes:
    """A token, or a merge, that is another one."""
    pairs = [
        (b"<|im_end|>", b"<|im_sta|>"),
        (b"a b", b"zzz"),
        (b"1 2", b"\xff\xfe\xfd"),
        (b"<|endoftext|>", b"\0" * 13),
        (b"messages[0]", b"{{{{{{{{{{{"),
    ]
    return raw.replace(*draw.choice(pairs), 1)


def _number(draw: random.Random, raw: bytes) -> bytes:
    """A value of the model's shape that is another number."""
    names = [b"llama.block_count", b"llama.context_length", b"llama.embedding_length", b"llama.attention.head_count", b"llama.feed_forward_length",
             b"llama.rope.dimension_count", b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.bos_token_id", b"llama.vocab_size",
             b"llama.attention.layer_norm_rms_epsilon", b"llama.attention.head_count_kv"]  # fmt: skip
    name = draw.choice(names)
    place = raw.find(name)
    if place < 0:
        return raw
    value = draw.choice([0, 1, 2, 3, 5, 31, 33, 64, 1_000, 100_000, 2**31 - 1, 2**31, 2**32 - 1])
    return _patched(raw, place + len(name) + 4, struct.pack("<I", value))


def _head_byte(draw: random.Random, raw: bytes) -> bytes:
    """A byte of what comes before the tensors."""
    place = draw.randrange(min(len(raw), 6_000)) if raw else 0
    return _patched(raw, place, bytes([draw.randrange(256)])) if raw else raw


def _dimension(draw: random.Random, raw: bytes) -> bytes:
    """A tensor of another shape, or at another place."""
    names = [
        b"blk.0.attn_q.weight",
        b"token_embd.weight",
        b"blk.0.ffn_down.weight",
        b"output_norm.weight",
    ]
    place = raw.find(name := draw.choice(names))
    if place < 0:
        return raw
    place += len(name)
    if draw.random() < 0.3:
        return _patched(
            raw, place, struct.pack("<I", draw.choice([0, 1, 3, 4, 5, 100, 2**31, 2**32 - 1]))
        )
    value = draw.choice([0, 1, 16, 31, 33, 64, *_COUNTS])
    return _patched(raw, place + 4 + draw.choice([0, 8, 12, 20]), struct.pack("<Q", value))


def _zeros(draw: random.Random, raw: bytes) -> bytes:
    """A stretch of zeros."""
    place = draw.randint(0, len(raw))
    return _patched(raw, place, bytes(draw.choice([4, 64, 1_000])))[: len(raw)]
