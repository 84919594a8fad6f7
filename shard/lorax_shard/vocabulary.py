"""The tokens of a tokenizer, as arrays: what texts are made from.

Reading a tokenizer takes its library, which runs with Python's lock held and does what the
tokenizer says. So that is left to the process that verifies adapters; the process that holds
the model reads the arrays, which are the tokens and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax_contract.errors import LoraxError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY_FILE = "vocabulary.safetensors"
_DIGEST = "sha256"
_ARRAYS = ("starts", "text", "kinds", "end_ids")

# Kinds of ids: no token has the id; an ordinary token; a special one.
NO_TOKEN, PLAIN, SPECIAL = 0, 1, 2


class VocabularyDamagedError(LoraxError):
    """A stored vocabulary is not what was stored."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens with the ids from 0 on."""

    # Token i is text[starts[i] : starts[i + 1]], in UTF-8.
    starts: NDArray[np.int32]
    text: NDArray[np.uint8]
    kinds: NDArray[np.uint8]
    # What its configuration calls the end of a text.
    end_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    @property
    def digest(self) -> str:
        """A name that no other vocabulary has."""
        return _digest(self)

    def token(self, token_id: int) -> str | None:
        """Return a token; None if there is none with this id."""
        if not 0 <= token_id < len(self) or self.kinds[token_id] == NO_TOKEN:
            return None
        raw = self.text[self.starts[token_id] : self.starts[token_id + 1]].tobytes()
        return raw.decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Return whether a token is a special one."""
        return 0 <= token_id < len(self) and bool(self.kinds[token_id] == SPECIAL)

    def num_shared(self, other: Vocabulary) -> int:
        """Return up to which id both have the same tokens."""
        count = min(len(self), len(other))
        count = _first_difference(self.kinds[:count], other.kinds[:count])
        count = _first_difference(self.starts[1 : count + 1], other.starts[1 : count + 1])
        end = int(self.starts[count])
        same = _first_difference(self.text[:end], other.text[:end])
        return count if same == end else int(np.searchsorted(self.starts, same, "right")) - 1


def _first_difference(one: NDArray[Any], other: NDArray[Any]) -> int:
    differs = one != other
    return int(differs.argmax()) if differs.any() else len(one)


def vocabulary_of(tokenizer: Tokenizer, end_token: str | None = None) -> Vocabulary:
    """Return the tokens of a tokenizer."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(size)]
    added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    parts = [b"" if token is None else token.encode("utf-8", "replace") for token in tokens]
    kinds = [
        NO_TOKEN if token is None else SPECIAL if token_id in special else PLAIN
        for token_id, token in enumerate(tokens)
    ]
    end = None if end_token is None else tokenizer.token_to_id(end_token)
    return Vocabulary(
        starts=np.cumsum([0, *map(len, parts)], dtype=np.int32),
        text=np.frombuffer(b"".join(parts), dtype=np.uint8),
        kinds=np.array(kinds, dtype=np.uint8),
        end_ids=np.array([] if end is None else [end], dtype=np.int64),
    )


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Store a vocabulary in an existing folder."""
    arrays = {name: getattr(vocabulary, name) for name in _ARRAYS}
    save_file(arrays, folder / VOCABULARY_FILE, metadata={_DIGEST: _digest(vocabulary)})


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the vocabulary that was stored; None if there is none.

    Raises VocabularyDamagedError if it is not what was stored.
    """
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            vocabulary = Vocabulary(**{name: file.get_tensor(name) for name in _ARRAYS})
            stored = (file.metadata() or {}).get(_DIGEST)
    except (OSError, SafetensorError) as error:
        raise VocabularyDamagedError(f"the stored vocabulary is damaged: {error!r}") from error
    if stored != _digest(vocabulary):
        raise VocabularyDamagedError(
            "the stored vocabulary is damaged: it is not what was verified"
        )
    return vocabulary


def _digest(vocabulary: Vocabulary) -> str:
    hashed = hashlib.sha256()
    for name in _ARRAYS:
        hashed.update(np.ascontiguousarray(getattr(vocabulary, name)).data)
    return hashed.hexdigest()
