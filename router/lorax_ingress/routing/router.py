"""Adapter-affine routing: where the adapter is, unless far more is to be done there than elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

from lorax_ingress.routing.book import SentRequest
from lorax_ingress.routing.fleet import FULL_KV, FleetBooks
from lorax_ingress.routing.popularity import Popularity
from lorax_ingress.routing.prefixes import PrefixMemory
from lorax_ingress.routing.preloads import Preload, Preloads
from lorax_ingress.routing.values import (
    ReplicaView,
    RouteDecision,
    RouteReason,
    RouteRequest,
    RoutingSettings,
)

# Parts of what traffic leaves behind for ever. Before the first free slots are filled before all
# else; before the other they are kept for adapters that are still to come, as if one held them
# that so many requests of late asked for.
_LITTLE, _MUCH = 0.5, 0.75
_FREE_SLOT = 2.0
_DEFAULTS = RoutingSettings()


class AffineRouter:
    """Decides where requests go; the same calls give the same answers.

    ``route`` asks and books nothing; ``sent``, ``begins`` and ``ended`` tell what was done. Times are those of one clock that never goes back.

    Args:
        draw: draw(n) gives a whole number from 0 to n - 1; seeded by whoever hands it in.
        settings: the policy's constants.
    """

    def __init__(self, draw: Callable[[int], int], settings: RoutingSettings = _DEFAULTS) -> None:
        self._draw = draw
        self.settings = settings
        self.fleet = FleetBooks(settings.prompt_unit, settings.max_ranked)
        self._rates = Popularity(
            half_life_s=settings.half_life_s,
            home_share=settings.home_share,
            shrink_at=settings.shrink_at,
            max_keys=settings.max_rates,
        )
        self._prefixes = PrefixMemory(settings.max_prefixes, settings.max_prefix_blocks)
        self._preloads = Preloads(settings.patience_s, settings.max_ranked)
        self._places: dict[str, str] = {}
        # Who was sent an adapter last, of those that were sent something lately.
        self._latest: OrderedDict[str, str] = OrderedDict()

    # --- what happens ---------------------------------------------------------------

    def see(self, view: ReplicaView) -> None:
        """Take a replica's view of itself; the first one lets it join.

        One that begins to take requests is to load the adapters that it is a home of.
        """
        was_open = view.name in self.fleet.open
        self.fleet.see(view)
        book, at = self.fleet.books[view.name], view.taken_at
        book.ladder = sorted(self._worth(key, at) for key in view.resident if key not in book.users)
        for key in self._preloads.see(book):
            self._goes_to(key, view.name)
        if not was_open and view.name in self.fleet.open:
            keys = self._rates.hottest(self.settings.max_preloads, self.settings.preload_from, at)
            self._preload(
                ((key, view.name) for key in keys if view.name in self.homes(key, at)), at
            )

    def _preload(self, wanted: Iterable[tuple[str, str]], now: float) -> None:
        """Have replicas load adapters, the first ones first, where there are free slots."""
        if not self.settings.preloads:
            return
        free = {name: book.num_free_slots for name, book in self.fleet.open.items()}
        for adapter, name in wanted:
            book = self.fleet.books[name]
            is_new = self._preloads.allows(adapter) and not book.holds(adapter)
            if is_new and free[name] > 0:
                free[name] -= 1
                self._preloads.tell(adapter, book, now)

    def _worth(self, adapter: str, at: float) -> float:
        """Return the requests of late that would miss an adapter; 0 where it has copies to spare."""
        num_homes = self._rates.num_homes(adapter, max(len(self.fleet.open), 1), at)
        spare = len(self.fleet.holders(adapter)) > num_homes
        return 0.0 if spare else self._rates.recent(adapter, at)

    def forget(self, name: str) -> list[str]:
        """A replica is dead: nothing goes there before it is seen again. Returns what was on it.

        What it alone had is to be loaded by who is home now.
        """
        book = self.fleet.books.get(name)
        held = [] if book is None else [*book.view.resident]
        lost = self.fleet.forget(name)
        self._preloads.forget(name)
        if book is not None:
            self._move_homes(held, book.view.taken_at)
        for request_id in lost:
            del self._places[request_id]
        self._prefixes.forget(name)
        return lost

    def _move_homes(self, held: Sequence[str], now: float) -> None:
        """Have adapters that lost their only replica loaded at home, the hottest first."""
        least, recent = self.settings.preload_from, self._rates.recent
        alone = [key for key in held if not self.fleet.holders(key) and recent(key, now) >= least]
        alone.sort(key=lambda key: (-recent(key, now), key))
        self._preload(((key, name) for key in alone for name in self.homes(key, now)[:1]), now)

    def sent(self, request_id: str, request: RouteRequest, replica: str, now: float) -> None:
        """A request was sent to a replica that is known."""
        if request_id in self._places:
            raise ValueError(f"request {request_id} was sent already; end it first")
        prompt = request.num_prompt_tokens / self.settings.prompt_unit
        self._places[request_id] = replica
        self._rates.note(request.adapter, 1.0 + prompt, now)
        self._prefixes.note(request, replica)
        ahead = prompt + self._load_work(request.adapter, replica)
        sent = SentRequest(replica, request.adapter, now, 1.0 + ahead, ahead, request.can_preload)
        self.fleet.add(request_id, sent)
        if request.adapter is not None:
            self.fleet.books[replica].told.pop(request.adapter, None)
            self._goes_to(request.adapter, replica)

    def _goes_to(self, adapter: str, replica: str) -> None:
        self._latest[adapter] = replica
        self._latest.move_to_end(adapter)
        if len(self._latest) > self.settings.max_ranked:
            self._latest.popitem(last=False)

    def begins(self, request_id: str) -> None:
        """A request's first token is there; one that is not known is passed over."""
        if (replica := self._places.get(request_id)) is None:
            return
        sent = self.fleet.books[replica].sent[request_id]
        if sent.can_preload and sent.adapter is not None:
            self._preloads.allow(sent.adapter)
        self.fleet.begins(request_id, replica)

    def ended(self, request_id: str, now: float) -> None:
        """A request is over, whichever way; one that is not known is passed over."""
        if (replica := self._places.pop(request_id, None)) is not None:
            self.fleet.remove(request_id, replica, now)

    def preloads_at(self, adapter: str, replica: str, now: float) -> None:
        """What a decision said is done: a replica is to load an adapter."""
        self._preloads.tell(adapter, self.fleet.books[replica], now)

    def take_preloads(self) -> list[Preload]:
        """Return who is to load what, as far as it was not returned yet."""
        return self._preloads.take()

    # --- what is decided ------------------------------------------------------------

    def route(self, request: RouteRequest, now: float) -> RouteDecision | None:
        """Return where a request goes; None where no replica takes requests.

        O(homes) for an adapter that is on some device, O(replicas) at most.
        """
        if not self.fleet.open:
            return None
        work = 1.0 + request.num_prompt_tokens / self.settings.prompt_unit
        mean = self.fleet.mean_with(work)
        places = self._prefixes.find(request, self.settings.min_prefix_blocks)
        known = [name for name in places if name in self.fleet.open]
        if request.adapter is None:
            return self._by_prefix(known, mean) or self._by_load(mean)
        holders = self.fleet.holders(request.adapter)
        known = [name for name in known if name in holders]
        return self._by_prefix(known, mean) or self._by_adapter(request.adapter, holders, mean, now)

    def homes(self, adapter: str, now: float) -> list[str]:
        """Return the homes of an adapter, the first first: where to preload or pin it."""
        ranked = [name for name in self.fleet.ranked(adapter) if name in self.fleet.open]
        return ranked[: self._rates.num_homes(adapter, max(len(ranked), 1), now)]

    # --- by rule --------------------------------------------------------------------

    def _by_prefix(self, known: Sequence[str], mean: float) -> RouteDecision | None:
        fitting = [name for name in known if self._fits(name, mean)]
        return RouteDecision(self._lighter(fitting), RouteReason.PREFIX) if fitting else None

    def _by_load(self, mean: float) -> RouteDecision:
        names = list(self.fleet.open)
        chosen = self._lighter(names)
        if not self._fits(chosen, mean):
            fitting = [name for name in names if self._fits(name, mean)]
            chosen = self._lighter(fitting) if fitting else chosen
        return RouteDecision(chosen, RouteReason.LOAD)

    def _by_adapter(
        self, adapter: str, holders: Sequence[str], mean: float, now: float
    ) -> RouteDecision:
        if not holders:
            return self._to_home(adapter, mean, now)
        num_homes = self._rates.num_homes(adapter, len(self.fleet.open), now)
        chosen = self._holder(adapter, holders, num_homes, mean)
        grows = len(holders) < num_homes
        # It grows where its replicas have more than others; one with a single home only where that
        # has too much. At the price of another adapter, only where it has far too much.
        if self.fleet.load(chosen) <= mean or (not grows and self._fits(chosen, mean)):
            return RouteDecision(chosen, RouteReason.RESIDENT)
        price = self._copy_price(adapter, chosen, len(holders), mean, now)
        is_far = not self._fits(chosen, mean, self.settings.far)
        is_far = is_far and self.fleet.open[chosen].users.get(adapter, 0) >= self.settings.many
        new = self._new_home(adapter, holders, mean, price, now, is_far=is_far)
        if new is None or (self._fits(chosen, mean) and self.fleet.load(new) >= mean):
            return RouteDecision(chosen, RouteReason.RESIDENT)
        if self._can_wait(adapter, chosen, new, mean, now):
            return RouteDecision(chosen, RouteReason.RESIDENT, preload_at=new)
        return RouteDecision(new, RouteReason.SPREAD if grows else RouteReason.OVERFLOW)

    def _can_wait(self, adapter: str, chosen: str, new: str, mean: float, now: float) -> bool:
        """Whether a request goes where its adapter is until a new home has loaded it."""
        return (
            self.settings.preloads
            and self._preloads.allows(adapter)
            and self._fits(chosen, mean, self.settings.far)
            and (adapter in self.fleet.open[new].told or self.fleet.open[new].num_free_slots > 0)
            and self._preloads.is_awaited(adapter, self.fleet.open[new], now)
        )

    def _copy_price(
        self, adapter: str, chosen: str, num_holders: int, mean: float, now: float
    ) -> float:
        """Return the most that may go for a copy, in requests of late, if it is not a free slot."""
        settings = self.settings
        own = self._rates.recent(adapter, now) / num_holders
        price = max(settings.cheap * self._rates.seen(now), own / settings.copy_gain)
        if self._rates.num_known <= self.fleet.num_slots:
            # All that are known have a slot: whatever goes is brought again, and again.
            price = 0.0
        if not self._fits(chosen, mean, settings.urgent):
            price = max(price, own / settings.urgent_gain)
        return price

    def _holder(self, adapter: str, holders: Sequence[str], num_homes: int, mean: float) -> str:
        """Choose among those that have it; of more than it needs some are left to forget it."""
        fitting = [name for name in holders if self._fits(name, mean)]
        if num_homes < len(fitting):
            latest = self._latest.get(adapter)
            if num_homes == 1 and latest in fitting:
                return latest
            names = set(fitting)
            fitting = [name for name in self._ranked(adapter) if name in names][:num_homes]
        return self._lighter(fitting or holders)

    def _to_home(self, adapter: str, mean: float, now: float) -> RouteDecision:
        """Choose who loads it: a free slot, else where little goes for it; host memory comes first."""
        hosts = set(self.fleet.hosts(adapter))
        ranked = self._ranked(adapter)
        fitting = [name for name in ranked if self._fits(name, mean)]
        near = [name for name in ranked if self._fits(name, mean, self.settings.far)]
        hosting = [name for name in fitting if name in hosts]
        cheap = self.settings.cheap
        # While little traffic was seen, nothing that is there is known to be worth little.
        free = [(fitting, 0.0)] if self._rates.seen(now) < _LITTLE else []
        for names, most in (*free, (hosting, cheap), (fitting, cheap)):
            if found := self._up_to(names, most):
                return self._home(self._lighter(found), hosts)
        if not near:
            return RouteDecision(self._lighter(ranked), RouteReason.OVERFLOW)
        books = self.fleet.open
        return self._home(min(near, key=lambda n: (books[n].price, self.fleet.load(n))), hosts)

    def _home(self, name: str, hosts: Collection[str]) -> RouteDecision:
        return RouteDecision(name, RouteReason.HOST if name in hosts else RouteReason.HOME)

    def _up_to(self, names: Iterable[str], most: float) -> list[str]:
        """Return the first so many where nothing goes that is worth more."""
        found: list[str] = []
        for name in names:
            if self.fleet.open[name].price <= most:
                found.append(name)
                if len(found) == self.settings.num_choices:
                    break
        return found

    def _new_home(
        self,
        adapter: str,
        holders: Sequence[str],
        mean: float,
        price: float,
        now: float,
        *,
        is_far: bool,
    ) -> str | None:
        """Return the next home that an adapter does not have yet, takes it, and costs no more."""
        free = 0.0 if is_far or self._rates.seen(now) >= _MUCH else _FREE_SLOT
        for name in self._ranked(adapter):
            if (
                name not in holders
                and self._fits(name, mean)
                and (self.fleet.open[name].price or free) <= price
            ):
                return name
        return None

    # --- pieces ---------------------------------------------------------------------

    def _ranked(self, adapter: str) -> list[str]:
        return [name for name in self.fleet.ranked(adapter) if name in self.fleet.open]

    def _load_work(self, adapter: str | None, replica: str) -> float:
        """Return what bringing an adapter there is worth in requests; 0 if it is there."""
        is_there = adapter is None or self.fleet.books[replica].holds(adapter)
        return 0.0 if is_there else self.settings.load_work

    def _fits(self, name: str, mean: float, times: float = 1.0) -> bool:
        """Whether a replica's work is within so many times the bound, and its memory is not full."""
        book, settings = self.fleet.open[name], self.settings
        capacity = book.view.capacity
        most = (1.0 + times * settings.tolerance) * mean * capacity + times * settings.slack
        return book.work <= most and book.view.kv_in_use < FULL_KV

    def _lighter(self, names: Sequence[str]) -> str:
        """Return the lighter of two that are drawn."""
        num = len(names)
        if num == 1:
            return names[0]
        one = self._draw(num)
        other = (one + 1 + self._draw(num - 1)) % num
        return min(names[one], names[other], key=self.fleet.load)
