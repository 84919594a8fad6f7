"""What FakeShard computes: tokens that depend on the whole sequence, and when they end.

A "key" stands for what a real model keeps of one token in its KV cache. The
digest of a sequence is the sum of its keys, so it does not depend on the block
size, on how a prompt was cut into chunks, or on batch mates, and it changes with
every token and every position.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorax_contract.pooling import HeadFacts, Pooling
from lorax_contract.step import Alternatives, FinishCode, OutputKind, RequestSpec

_MASK = (1 << 64) - 1


def mix(number: int) -> int:
    """Return 64 bits that depend on all bits of ``number`` (the finalizer of SplitMix64)."""
    number = (number ^ (number >> 64)) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def key_of(token_id: int, position: int) -> int:
    """Return what the cache keeps of a token at a position."""
    return mix((position << 32) + token_id + 1)


def digest_of(keys: Iterable[int]) -> int:
    """Return the digest of a sequence from its keys, or from sums of some of them."""
    return sum(keys) & _MASK


def default_text(token_id: int) -> str:
    """Return the text of a token."""
    return f" t{token_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeModel:
    """A deterministic language model: the next token is a hash of what was read back."""

    vocab_size: int = 1000
    eos_token_ids: frozenset[int] = frozenset({0})
    text_of: Callable[[int], str] = default_text

    def next_token(self, spec: RequestSpec, digest: int) -> int:
        """Return the token after a sequence; drawn ones depend on the seed as well."""
        seed = mix(spec.sampling.seed + 1) if spec.sampling.do_sample else 0
        return mix(digest + mix(seed + spec.adapter)) % self.vocab_size

    def logprob(self, token_id: int, digest: int) -> float:
        """Return a negative number that single precision holds exactly."""
        return -(1 + mix(digest ^ token_id) % 1024) / 256

    def vector(self, spec: RequestSpec, digest: int) -> bytes:
        """Return four numbers for a prompt, or for each token; they depend on what its row asks for, too."""
        if spec.pooling is Pooling.EACH:
            ids = enumerate(spec.prompt_ids)
            return b"".join(self._numbers(spec, key_of(token, place)) for place, token in ids)
        return self._numbers(spec, digest)

    def _numbers(self, spec: RequestSpec, digest: int) -> bytes:
        seed = mix(digest + mix(spec.adapter + (spec.pooling << 32)))
        return struct.pack("<4f", *(1 + (seed >> 16 * place) % (1 << 16) for place in range(4)))

    def scores(self, spec: RequestSpec, digest: int, head: HeadFacts) -> bytes:
        """Return what a head makes of a prompt, from -4 to 4: of all of it, or of each token."""
        ids = spec.prompt_ids
        seeds = [digest]
        if head.classifies_tokens:
            seeds = [key_of(token, position) for position, token in enumerate(ids)]
        labels = range(len(head.labels))
        drawn = [mix(seed + mix(spec.adapter) + label) % 1024 for seed in seeds for label in labels]
        return struct.pack(f"<{len(drawn)}f", *((each - 512) / 128 for each in drawn))

    def is_special(self, token_id: int) -> bool:
        """Whether the generated text leaves this token out."""
        return token_id in self.eos_token_ids

    def text(self, output_ids: Iterable[int]) -> str:
        """Return the text of an output without its special tokens."""
        return "".join(self.text_of(token) for token in output_ids if not self.is_special(token))

    def alternatives(self, token_id: int, logprob: float, count: int) -> Alternatives:
        """Return ``count`` tokens, the chosen one first."""
        ids = [(token_id + i) % self.vocab_size for i in range(count)]
        return Alternatives(
            ids, [logprob - i for i in range(count)], [self.text_of(token) for token in ids]
        )

    def finish(self, spec: RequestSpec, output_ids: Sequence[int]) -> FinishCode:
        """Say whether a request ends with the last of its output tokens, and why."""
        stopping = spec.stopping
        last = output_ids[-1]
        if len(output_ids) <= stopping.min_new_tokens:
            at_limit = len(output_ids) >= stopping.max_new_tokens
            return FinishCode.LENGTH if at_limit else FinishCode.RUNNING
        if last in self.eos_token_ids and not stopping.ignore_eos:
            return FinishCode.EOS_TOKEN
        if stopping.stop_sequences:
            text = self.text(output_ids)
            if any(stop in text for stop in stopping.stop_sequences):
                return FinishCode.STOP_SEQUENCE
        if last in stopping.stop_token_ids:
            return FinishCode.STOP_SEQUENCE
        if len(output_ids) >= stopping.max_new_tokens:
            return FinishCode.LENGTH
        return FinishCode.RUNNING

    def expected_tokens(self, spec: RequestSpec) -> list[int]:
        """Return what an uninterrupted run of the request alone generates: the oracle."""
        digest = digest_of(key_of(token, i) for i, token in enumerate(spec.prompt_ids))
        output: list[int] = []
        if spec.output is not OutputKind.TOKENS:
            return output
        while not output or self.finish(spec, output) is FinishCode.RUNNING:
            output.append(self.next_token(spec, digest))
            position = len(spec.prompt_ids) + len(output) - 1
            digest = digest_of((digest, key_of(output[-1], position)))
        return output


def expected_tokens(spec: RequestSpec, model: FakeModel | None = None) -> list[int]:
    """Return what FakeShard generates for a request that runs alone (default model if None)."""
    return (model or FakeModel()).expected_tokens(spec)
