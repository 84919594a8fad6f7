"""What the store knows beside the entries: names, versions, verdicts, uses and pins.

Each record is one small file, replaced atomically. A record whose entry is gone means
nothing, so entries may go at any time; ``sweep`` of the store removes such records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lorax_contract.adapters import Access, AdapterRef, key_of
from lorax_shard.files import read_json, write_json
from lorax_shard.store.eviction import decayed

# A temporary file that is older belongs to nobody.
_HALF_WRITTEN_LIFE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """What a name led to when its source was last asked."""

    # Which hub, which endpoint of S3.
    realm: str
    ref: AdapterRef
    version: str
    digest: str
    access: Access
    # Seconds since the epoch.
    checked_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """When an entry was last wanted, and how often."""

    last_s: float
    uses: float


class StoreIndex:
    """Records below ``root``, one folder per kind."""

    KINDS = ("names", "versions", "verdicts", "uses", "pins")

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self) -> None:
        """Make the folders."""
        for kind in self.KINDS:
            (self._root / kind).mkdir(parents=True, exist_ok=True)

    def name(self, realm: str, ref: AdapterRef) -> NameRecord | None:
        """Return what ``ref`` led to, or None if it is not known."""
        document = read_json(self._name_path(realm, ref))
        record = None if document is None else _name_record(document)
        return record if record is not None and record.ref == ref else None

    def names(self) -> Iterator[NameRecord]:
        """All known names."""
        for path in sorted((self._root / "names").glob("*.json")):
            record = _name_record(read_json(path) or {})
            if record is not None:
                yield record

    def set_name(self, record: NameRecord) -> None:
        """Remember what a name leads to now."""
        write_json(self._name_path(record.realm, record.ref), asdict(record))

    def forget_name(self, realm: str, ref: AdapterRef) -> None:
        """Drop what a name led to."""
        self._name_path(realm, ref).unlink(missing_ok=True)

    def _name_path(self, realm: str, ref: AdapterRef) -> Path:
        return self._path("names", key_of(realm, ref.source, ref.id, ref.revision))

    def digest_of_version(self, version_key: str) -> str | None:
        """Return the digest of a concrete version's content, if it was fetched before."""
        document = read_json(self._path("versions", version_key)) or {}
        digest = document.get("digest")
        return digest if isinstance(digest, str) else None

    def set_version(self, version_key: str, digest: str) -> None:
        """Remember what a concrete version's content is."""
        write_json(self._path("versions", version_key), {"digest": digest})

    def verdict(self, digest: str, verifier: str) -> dict[str, Any] | None:
        """Return what a verifier found out about an entry, if it was asked before."""
        document = read_json(self._path("verdicts", f"{digest}.{key_of(verifier)}"))
        return None if document is None else cast(dict[str, Any], document.get("facts", {}))

    def set_verdict(self, digest: str, verifier: str, facts: dict[str, Any]) -> None:
        """Remember what a verifier found out."""
        path = self._path("verdicts", f"{digest}.{key_of(verifier)}")
        write_json(path, {"digest": digest, "facts": facts})

    def use(self, digest: str) -> Use | None:
        """Return when and how often an entry was wanted."""
        document = read_json(self._path("uses", digest)) or {}
        try:
            return Use(last_s=float(document["last_s"]), uses=float(document["uses"]))
        except (KeyError, TypeError, ValueError):
            return None

    def count_use(self, digest: str, now: float) -> None:
        """Note that an entry is wanted now."""
        before = self.use(digest)
        uses = 1.0 if before is None else 1.0 + decayed(before.uses, now - before.last_s)
        # Losing one to a power cut costs nothing: no need to wait for the disk.
        write_json(
            self._path("uses", digest),
            {"digest": digest, "last_s": now, "uses": uses},
            durable=False,
        )

    def pin(self, digest: str) -> None:
        """Keep an entry until it is unpinned, over restarts too."""
        write_json(self._path("pins", digest), {"digest": digest})

    def unpin(self, digest: str) -> None:
        """Let an entry go when its turn comes."""
        self._path("pins", digest).unlink(missing_ok=True)

    def is_pinned(self, digest: str) -> bool:
        """Tell whether an entry is kept."""
        return self._path("pins", digest).exists()

    def drop_orphans(self, exists: Callable[[str], bool], now: float) -> None:
        """Remove records whose entry does not exist, and what killed writers left.

        Each record is looked at before its entry: a record is written after its entry, so
        one that appears meanwhile is never taken for an orphan.
        """
        for kind in self.KINDS:
            for path in (self._root / kind).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.name.startswith("."):
                        orphan = now - path.stat().st_mtime > _HALF_WRITTEN_LIFE_S
                    else:
                        digest = (read_json(path) or {}).get("digest")
                        orphan = not isinstance(digest, str) or not exists(digest)
                    if orphan:
                        path.unlink()

    def _path(self, kind: str, key: str) -> Path:
        return self._root / kind / f"{key}.json"


def _name_record(document: dict[str, Any]) -> NameRecord | None:
    try:
        return NameRecord(**{**document, "ref": AdapterRef(**document["ref"])})
    except (KeyError, TypeError):
        return None
