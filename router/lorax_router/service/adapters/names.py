"""What is known of each name, and to whom. Nothing waits here, and nobody is asked.

A *view* is what some callers know of a name: everybody, or those who present one token. An
adapter that took a token is in the views of the tokens that its source let in, and in no
other: to everybody else the name stays what their own asking made of it, which is what an
unknown name would be to them.

Names are many, and few of them change: pages are read from sorted lists, and what stands
where is counted when it changes.
"""

from __future__ import annotations

import bisect
import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, FetchedAdapter, Reason

EVERYBODY = ""
# How many views are looked at for one that may go, before there is one more than wanted.
_TRIES = 8


@dataclass(slots=True)
class KnownName:
    """A name that somebody asked for. Owned by the NameBook."""

    ref: AdapterRef
    # Unix time at which somebody first asked for it.
    first_seen_at: float = field(default_factory=time.time)
    # By scope.
    views: dict[str, NameView] = field(default_factory=dict)
    # The content that it leads to now, and the answer that named it.
    content_key: str | None = None
    fetched: FetchedAdapter | None = None
    # Why it could not be had when somebody last asked.
    failure: AdapterUnavailableError | None = None
    num_resolving: int = 0
    # The tenants that keep it on the shards; the server's operator is the empty one.
    pinned_by: set[str] = field(default_factory=set)
    num_uses: int = 0
    # Unix time.
    last_used_at: float | None = None
    # Where it was counted.
    stand: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether anybody keeps it on the shards."""
        return bool(self.pinned_by)

    @property
    def is_public(self) -> bool:
        """Whether everybody may use it."""
        view = self.views.get(EVERYBODY)
        return view is not None and view.fetched is not None


@dataclass(slots=True)
class NameView:
    """What the callers of one scope know of a name."""

    name: KnownName
    scope: str
    # Requests that wait for an answer.
    num_resolving: int = 0
    # The last good answer, and until when nobody needs to ask again.
    fetched: FetchedAdapter | None = None
    holds_until: float = 0.0
    # Unix time at which the source was asked for that.
    asked_at: float = 0.0
    # Why there was none when these callers last asked; it stays until asking succeeds.
    failure: AdapterUnavailableError | None = None


class NameBook:
    """Owns names and views. Holds no token.

    Args:
        max_views: how many are remembered; those that lead nowhere go first.
        clock: monotonic seconds.
        is_held: whether a name must stay, because it is pinned or in use.
        on_gone: called with each name that is forgotten.
    """

    def __init__(
        self,
        max_views: int,
        clock: Callable[[], float],
        is_held: Callable[[KnownName], bool],
        on_gone: Callable[[KnownName], None],
    ) -> None:
        self._max_views = max_views
        self._clock = clock
        self._is_held = is_held
        self._on_gone = on_gone
        # Keyed, so that a dump of this table cannot be compared with known tokens.
        self._secret = secrets.token_bytes(32)
        self._names: dict[str, KnownName] = {}
        # Least recently asked for first: those that lead somewhere, and those that do not.
        self._good: OrderedDict[tuple[str, str], NameView] = OrderedDict()
        self._bad: OrderedDict[tuple[str, str], NameView] = OrderedDict()
        # The names that a scope has views of, sorted.
        self._sorted: dict[str, list[str]] = {}
        # Names that somebody waits for.
        self.resolving: dict[str, KnownName] = {}
        # All names: led (to a content), refused, failed, absent (nothing is known yet).
        self.stands: Counter[str] = Counter()

    def __len__(self) -> int:
        """The number of views."""
        return len(self._good) + len(self._bad)

    # --- asking -------------------------------------------------------------------

    def scope_of(self, token: str | None) -> str:
        """Return what stands for a caller."""
        if token is None:
            return EVERYBODY
        return hashlib.blake2b(token.encode(), key=self._secret, digest_size=32).hexdigest()

    def find(self, ref: AdapterRef) -> KnownName | None:
        """Return what is known of a name, None if nothing is."""
        return self._names.get(str(ref))

    def scopes(self, *tokens: str | None) -> tuple[str, ...]:
        """Return what stands for somebody who presents some tokens: everybody's scope, and theirs."""
        return (EVERYBODY, *(self.scope_of(token) for token in tokens if token is not None))

    def good_view(self, name: KnownName, token: str | None) -> NameView | None:
        """Return the view by which a caller may use a name; it may have to be asked again."""
        return self.good_in(name, self.scopes(token))

    def any_view(self, name: KnownName, token: str | None) -> NameView | None:
        """Return what a caller knows of a name: the good, else their own, else everybody's."""
        return self.any_in(name, self.scopes(token))

    def good_in(self, name: KnownName, scopes: Sequence[str]) -> NameView | None:
        """Return the view by which somebody of some scopes may use a name."""
        for scope in scopes:
            view = name.views.get(scope)
            if view is not None and view.fetched is not None:
                return view
        return None

    def any_in(self, name: KnownName, scopes: Sequence[str]) -> NameView | None:
        """Return what somebody of some scopes, everybody's first, knows of a name."""
        if (good := self.good_in(name, scopes)) is not None:
            return good
        return next((name.views[each] for each in reversed(scopes) if each in name.views), None)

    def holds(self, view: NameView) -> bool:
        """Whether an answer can be used without asking again."""
        return view.fetched is not None and view.holds_until > self._clock()

    def answer(self, ref: AdapterRef, token: str | None) -> FetchedAdapter | None:
        """Return the answer that a caller may have without asking."""
        name = self._names.get(str(ref))
        if name is None:
            return None
        for scope in self.scopes(token):
            view = name.views.get(scope)
            if view is not None and self.holds(view):
                return view.fetched
        return None

    # --- what comes of it -----------------------------------------------------------

    def began(self, ref: AdapterRef, token: str | None) -> NameView:
        """A request asks for a name; ``ended`` must follow."""
        view = self._view(ref, self.scope_of(token))
        view.num_resolving += 1
        view.name.num_resolving += 1
        self.resolving[str(view.name.ref)] = view.name
        self._count(view.name)
        return view

    def answered(
        self,
        ref: AdapterRef,
        token: str | None,
        fetched: FetchedAdapter,
        asked_at: float | None = None,
    ) -> None:
        """The source let a caller have a name, which leads to ``fetched`` now.

        ``asked_at``: when it was asked, as Unix time; None: now.
        """
        is_private = fetched.access == "token"
        if is_private and token is None:
            return
        view = self._view(ref, self.scope_of(token) if is_private else EVERYBODY)
        name = view.name
        name.fetched = view.fetched = fetched
        view.holds_until = self._clock() + fetched.valid_s
        own = name.views.get(self.scope_of(token))
        if not fetched.stale:
            view.asked_at = time.time() if asked_at is None else asked_at
            name.failure = view.failure = None
            if own is not None:
                own.failure = None
        everybodys = name.views.get(EVERYBODY)
        if is_private and everybodys is not None and _is_open(everybodys.fetched):
            # What everybody could have is not theirs any more.
            everybodys.fetched = None
            self._settle(everybodys)
        self._settle(view)

    def failed(self, view: NameView, error: AdapterUnavailableError) -> None:
        """The source did not; what the name led to goes on for those who had it."""
        everybodys = view.name.views.get(EVERYBODY)
        if everybodys is not None and everybodys.fetched is not None:
            # It is asked without a token first: what fails now fails for everybody.
            everybodys.failure = error
        else:
            view.failure = error
        view.name.failure = error
        if view.scope != EVERYBODY and error.reason in (Reason.NO_ACCESS, Reason.NOT_FOUND):
            view.fetched = None
        self._settle(view)

    def ended(self, view: NameView) -> None:
        """A request that asked has its answer, or gave up."""
        name = view.name
        view.num_resolving -= 1
        name.num_resolving -= 1
        if not name.num_resolving:
            self.resolving.pop(str(name.ref), None)
        self._settle(view)

    def expire(self, name: KnownName, until: float) -> bool:
        """Have the source asked anew where it was asked up to a Unix time; whether that is all."""
        old = [view for view in name.views.values() if view.asked_at <= until]
        for view in old:
            view.holds_until = 0.0
        return len(old) == len(name.views)

    def lead(self, name: KnownName, content_key: str | None) -> None:
        """Note which content a name leads to."""
        name.content_key = content_key
        self._count(name)

    def touch(self, name: KnownName, token: str | None) -> None:
        """Note that a caller uses a name: others are forgotten before it."""
        if (view := self.good_view(name, token)) is not None:
            self._good.move_to_end(_key(view))

    def forget(self, name: KnownName) -> None:
        """Forget what a name led to, for everybody; those who wait for it go on waiting."""
        for view in list(name.views.values()):
            view.fetched = view.failure = None
            self._settle(view)
        name.fetched = name.failure = None
        self._count(name)

    # --- pages ----------------------------------------------------------------------

    def __iter__(self) -> Iterator[KnownName]:
        return iter(self._names.values())

    def sorted_from(self, first: str, after: str, scopes: Sequence[str]) -> Iterator[str]:
        """The names from ``first`` on and behind ``after`` that scopes have views of, in order.

        None before them is looked at.
        """
        lists = [self._sorted.get(scope, []) for scope in scopes]
        places = [
            max(bisect.bisect_left(names, first), bisect.bisect_right(names, after))
            for names in lists
        ]
        while heads := [
            names[place] for names, place in zip(lists, places, strict=True) if place < len(names)
        ]:
            least = min(heads)
            yield least
            places = [
                place + (place < len(names) and names[place] == least)
                for names, place in zip(lists, places, strict=True)
            ]

    def named(self, key: str) -> KnownName | None:
        """Return a name by its text, if it is known."""
        return self._names.get(key)

    # --- housekeeping -----------------------------------------------------------------

    def _view(self, ref: AdapterRef, scope: str) -> NameView:
        """Return a view, made if it is new."""
        key = str(ref)
        name = self._names.get(key)
        view = name.views.get(scope) if name is not None else None
        if view is not None:
            self._of(view).move_to_end(_key(view))
            return view
        self._make_place()
        # One that was forgotten just now must not come back as it was.
        name = self._names.setdefault(key, KnownName(ref))
        view = name.views[scope] = NameView(name, scope)
        self._bad[key, scope] = view
        bisect.insort(self._sorted.setdefault(scope, []), key)
        return view

    def _of(self, view: NameView) -> OrderedDict[tuple[str, str], NameView]:
        return self._good if _key(view) in self._good else self._bad

    def _settle(self, view: NameView) -> None:
        """Keep the indices true after a view changed; one that says nothing goes."""
        key = _key(view)
        if view.name.views.get(view.scope) is view:
            if view.fetched is None and view.failure is None and not view.num_resolving:
                self._drop(view)
            elif (view.fetched is not None) != (key in self._good):
                self._of(view).pop(key)
                (self._bad if view.fetched is None else self._good)[key] = view
        self._count(view.name)

    def _drop(self, view: NameView) -> None:
        name, key = view.name, str(view.name.ref)
        del name.views[view.scope]
        self._of(view).pop((key, view.scope))
        names = self._sorted[view.scope]
        del names[bisect.bisect_left(names, key)]
        if not names:
            del self._sorted[view.scope]
        if not name.views:
            del self._names[key]
            self._on_gone(name)
        self._count(name)

    def _count(self, name: KnownName) -> None:
        stand = None
        if name.views:
            stand = "led" if name.content_key is not None else stand_of(name.failure)
        if stand != name.stand:
            if name.stand is not None:
                self.stands[name.stand] -= 1
            if stand is not None:
                self.stands[stand] += 1
            name.stand = stand

    def _make_place(self) -> None:
        """Forget views until there is a place for one more, if any may go."""
        for views in (self._bad, self._good):
            for _ in range(min(_TRIES, len(views))):
                if len(self) < self._max_views:
                    return
                view = next(iter(views.values()))
                if view.num_resolving or (view.fetched and self._is_held(view.name)):
                    views.move_to_end(_key(view))
                else:
                    self._drop(view)


def stand_of(failure: AdapterUnavailableError | None) -> str:
    """Return where a name stands that leads nowhere, in one word."""
    if failure is None:
        return "absent"
    return "refused" if failure.reason.permanent else "failed"


def _is_open(fetched: FetchedAdapter | None) -> bool:
    return fetched is not None and fetched.access == "public"


def _key(view: NameView) -> tuple[str, str]:
    return str(view.name.ref), view.scope
