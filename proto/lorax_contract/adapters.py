"""What router and shards agree on about adapters: names, contents, facts, failures.

A *name* (source, id, revision) leads to a *content* (digests, and how they are merged);
a content gets a *handle*, which is what steps speak of. Names can come to lead elsewhere;
a content never changes, and a handle never names another.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from lorax_contract.errors import ErrorKind, LoraxError, ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import AdapterHandle

# Who may use an adapter: everybody; whoever the source lets in; whoever asks this server.
Access = Literal["public", "token", "server"]

# Places that adapters come from, in the words of requests.
LOCAL_SOURCE = "local"
SOURCES = ("hub", LOCAL_SOURCE, "s3")
# Where names of the operator's own choosing are: each stands for an adapter of a source above.
ALIAS_SOURCE = "alias"
# Those that let callers in by their own tokens; to the others all callers are this server.
TOKEN_SOURCES = ("hub",)

_MAX_ID_LENGTH = 512


class Reason(enum.Enum):
    """What kept an adapter from being had."""

    # The id or the revision does not exist at its source.
    NOT_FOUND = "not_found"
    # It exists, or may exist, and this caller is not let in.
    NO_ACCESS = "no_access"
    # The source is switched off, or this machine may not use the network.
    OFFLINE = "offline"
    # A limit on bytes or files was passed.
    TOO_LARGE = "too_large"
    # The bytes are not what the source announced, or cannot be read.
    CORRUPT = "corrupt"
    # Readable and not served: a wrong id, a pickle, an option or a shape that does not fit.
    REFUSED = "refused"
    # The source or the way to it is in trouble; a later try may succeed.
    TRANSIENT = "transient"
    # No entry of the store may give way for this one.
    STORE_FULL = "store_full"
    # The process that fetched it ended by itself or was ended for passing its limits.
    CRASHED = "crashed"
    # It made rows fail again and again; loading it by hand gives it another try.
    QUARANTINED = "quarantined"
    # Its files left the store since it was fetched; fetching it again helps.
    EVICTED = "evicted"

    @property
    def permanent(self) -> bool:
        """Whether the same request gets the same answer until somebody changes something."""
        return self in _PERMANENT


_PERMANENT = frozenset(
    (
        Reason.NOT_FOUND,
        Reason.NO_ACCESS,
        Reason.TOO_LARGE,
        Reason.CORRUPT,
        Reason.REFUSED,
        Reason.QUARANTINED,
    )
)
# LoRAX answers 424 when an adapter cannot be had. What another name, another token or a change
# to the adapter would mend is 422, and whether a name is unknown or hidden makes no difference.
_UNAVAILABLE = ErrorKind(424, "ABORTED", "generation")
_AT_FAULT = ErrorKind(422, "INVALID_ARGUMENT", "validation", "Input validation error")


class AdapterUnavailableError(LoraxError):
    """An adapter cannot be had. ``reason`` says why, the text says what to do."""

    def __init__(
        self, reason: Reason, text: str, *, retry_after_s: float | None = None, detail: str = ""
    ) -> None:
        super().__init__(text)
        self.kind = _AT_FAULT if reason.permanent else _UNAVAILABLE
        self.reason = reason
        self.text = text
        # When a new try makes sense, if anybody knows.
        self.retry_after_s = retry_after_s
        # For the log only.
        self.detail = detail

    def to_json(self) -> dict[str, Any]:
        """Return what crosses the pipe."""
        return {
            "reason": self.reason.value,
            "text": self.text,
            "retry_after_s": self.retry_after_s,
            "detail": self.detail,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote."""
        return cls(
            Reason(document["reason"]),
            str(document["text"]),
            retry_after_s=document.get("retry_after_s"),
            detail=str(document.get("detail", "")),
        )


def refused(text: str) -> AdapterUnavailableError:
    """Return the error for an adapter that is not served as it is."""
    return AdapterUnavailableError(Reason.REFUSED, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """The name of an adapter as a request gives it; ``of`` checks and normalises it."""

    source: str
    id: str
    revision: str | None = None

    @classmethod
    def of(cls, source: str, id: str, revision: str | None = None) -> Self:
        """Return the checked name; ``org/name@revision`` of the hub is taken apart."""
        if source == "hub" and "@" in id:
            name, _, inline = id.partition("@")
            if revision not in (None, inline):
                raise refused(f"adapter {id!r} names two revisions; give one")
            return cls.of(source, name, inline)
        for what, value in (("source", source), ("id", id), ("revision", revision)):
            if value is not None and not _is_plain(value):
                raise refused(
                    f"the adapter's {what} is empty, longer than {_MAX_ID_LENGTH} characters, "
                    "or has control characters"
                )
        return cls(source=source, id=id, revision=revision)

    @classmethod
    def parse(cls, text: str, default_source: str) -> Self:
        """Read a name in one text, as lists show it: ``local:folder``, ``s3://bucket/prefix``.

        Without a source an absolute path is a folder's, and the rest is of the default source.
        """
        source, colon, rest = text.partition(":")
        if colon and source in (*SOURCES, ALIAS_SOURCE) and not rest.startswith("//"):
            return cls.of(source, rest)
        if text.startswith("s3://"):
            return cls.of("s3", text)
        return cls.of("local" if text.startswith("/") else default_source, text)

    @property
    def plain(self) -> Self:
        """The name without what spells it differently and means nothing.

        A source may know more spellings of one adapter; then its answer names one of them.
        """
        plain = self.id
        if self.source == "local" and ".." not in plain.split("/"):
            # Of two slashes in front it would leave both.
            plain = posixpath.normpath(plain).replace("//", "/", 1)
        elif self.source == "s3":
            plain = "s3://" + plain.removeprefix("s3://").strip("/")
        return self if plain == self.id else replace(self, id=plain)

    @property
    def key(self) -> str:
        """A short name for files and caches, different for each different name."""
        return key_of(self.source, self.id, self.revision)

    @property
    def spoken(self) -> str:
        """The id as a request gives it, its revision included."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    def __str__(self) -> str:
        return f"{self.source}:{self.id}" + (f"@{self.revision}" if self.revision else "")


def _is_plain(value: str) -> bool:
    return 0 < len(value) <= _MAX_ID_LENGTH and value.isprintable()


def key_of(*parts: str | None) -> str:
    """Return a digest of ``parts`` that no other list of parts has."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


class Combination(enum.Enum):
    """How adapters are combined."""

    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    CAT = "cat"

    @property
    def prunes(self) -> bool:
        """Whether only a part of the values is kept, which needs a density."""
        return self not in (Combination.LINEAR, Combination.CAT)

    @property
    def elects_signs(self) -> bool:
        """Whether values of the minority's sign are dropped."""
        return self in (Combination.TIES, Combination.DARE_TIES)


class MajoritySign(enum.Enum):
    """Whose sign wins: of the sum of the values, or of most of them."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSpec:
    """A merge: everything but the adapters. Raises ValidationError for bad values."""

    weights: tuple[float, ...]
    combination: Combination = Combination.LINEAR
    # The fraction of values that is kept; needed where Combination.prunes.
    density: float | None = None
    majority_sign: MajoritySign = MajoritySign.TOTAL

    def __post_init__(self) -> None:
        if not self.weights or not all(math.isfinite(weight) for weight in self.weights):
            raise ValidationError(
                "`merged_adapters.weights`: a merge needs one finite weight for each adapter"
            )
        if self.combination.prunes:
            if self.density is None:
                raise ValidationError(
                    f"`merged_adapters.density`: merging by {self.combination.value} needs a density"
                )
            if not 0 < self.density <= 1:
                raise ValidationError("`merged_adapters.density` must be above 0 and at most 1")

    @property
    def words(self) -> tuple[str, ...]:
        """What tells this spec from every other."""
        density = "" if self.density is None else float(self.density).hex()
        weights = (float(weight).hex() for weight in self.weights)
        return (self.combination.value, *weights, density, self.majority_sign.value)


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One stored adapter: the digest of what it computes and that of its files."""

    content_digest: str
    store_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterContent:
    """What a handle names: one stored adapter, or several and how they are merged."""

    parts: tuple[AdapterPart, ...]
    merge: MergeSpec | None = None

    @property
    def key(self) -> str:
        """A name of the content: what it computes decides it, not where its files lie."""
        digests = [part.content_digest for part in self.parts]
        if self.merge is None:
            return digests[0]
        return key_of("merge", *self.merge.words, *digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterQuery:
    """Which adapter is asked for, by whom."""

    ref: AdapterRef
    # A secret: never part of a repr, a log line or an error text.
    token: str | None = field(default=None, repr=False)
    # Ask the source anew, also for what failed or was asked for a moment ago.
    refresh: bool = False
    # What rank 0 has found by this name, which a rank with a store of its own is to have, too.
    wanted: FetchedAdapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedAdapter:
    """An adapter that lies in the shards' store, verified, and what is known of it."""

    # The concrete version: a commit, a digest of entity tags or of file times.
    version: str
    part: AdapterPart
    # Bytes of its files, and what it will take on each device at most.
    disk_bytes: int
    device_bytes: int
    max_rank: int
    # Rows of its vocabulary where it adds tokens; 0: the base's.
    vocab_size: int = 0
    access: Access = "public"
    # For how many seconds this answer holds without asking again.
    valid_s: float = 0.0
    downloaded: bool = False
    # Whether the source was out of reach, and this is what it named last.
    stale: bool = False
    # Seconds by phase: queue, resolve, wait (for another process), download, verify.
    timings: Mapping[str, float] = field(default_factory=dict)
    # Names of its own tokenizer and template files.
    text_files: tuple[str, ...] = ()
    # What somebody should know who wonders why it does not do what it was made for.
    warnings: tuple[str, ...] = ()
    # The one spelling of its id, where a source knows several; None: as it was asked for.
    id: str | None = None
    # The tokens that invoke it (aLoRA): it acts from the last of them in a prompt on. Empty: on
    # every token.
    invocation_ids: tuple[int, ...] = ()
    # Its classification head; None: it has none.
    head: HeadFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What preparing an adapter took."""

    # Bytes on the fullest rank.
    device_bytes: int = 0
    # Seconds from the files to the host copy, and from there to the device.
    parse_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTiers:
    """Where adapters lie in a shard group: what is there, in bytes."""

    # By handle: content key, bytes on the fullest rank.
    device: Mapping[AdapterHandle, tuple[str, int]] = field(default_factory=dict)
    # Of those that were asked for. By content digest: bytes of the parsed copy.
    host: Mapping[str, int] = field(default_factory=dict)
    # By store digest: bytes of the files.
    disk: Mapping[str, int] = field(default_factory=dict)
