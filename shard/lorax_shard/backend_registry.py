"""The backends of one kind by their names, and the choice between them.

A backend's module is imported only when it is asked about, so that what one backend needs
(a compiler, a GPU library) never burdens the others.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode

logger = logging.getLogger(__name__)


class _Backend(Protocol):
    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return in words why it cannot run there, or None when it can."""


BackendT = TypeVar("BackendT", bound=_Backend)


class BackendRegistry(Generic[BackendT]):
    """Knows where each backend is, and which of them is the best that can run."""

    def __init__(
        self,
        kind: str,
        classes: Mapping[str, str],
        order: Mapping[str, Sequence[str]],
        order_elsewhere: Sequence[str],
    ) -> None:
        """Take the backends.

        Args:
            kind: what messages call them.
            classes: each one's ``module:class`` by its name.
            order: what ``auto`` tries by type of device, best first.
            order_elsewhere: the same on any other device.
        """
        self.kind, self.classes = kind, dict(classes)
        self.order, self._order_elsewhere = dict(order), tuple(order_elsewhere)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.classes)

    def load(self, name: str) -> type[BackendT]:
        """Return a backend's class; StartupError (BACKEND_UNAVAILABLE) for an unknown name."""
        if name not in self.classes:
            raise StartupError(
                f"there is no {self.kind} backend {name!r}; choose auto or one of {', '.join(self.names)}",
                ExitCode.BACKEND_UNAVAILABLE,
            )
        module, _, attribute = self.classes[name].partition(":")
        loaded: type[BackendT] = getattr(importlib.import_module(module), attribute)
        return loaded

    def probe(self, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return in words why a backend cannot run here, or None when it can."""
        try:
            return self.load(name).probe(device, dtype)
        except ImportError as error:
            return f"it needs a package that does not import: {error}"

    def runnable(self, device: torch.device, dtype: torch.dtype) -> list[BackendT]:
        """Return those of ``auto`` that can run here, best first."""
        names = self._candidates("auto", device)
        return [self.load(name)() for name in names if self.probe(name, device, dtype) is None]

    def create(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        refusal: Callable[[type[BackendT]], str | None] = lambda _: None,
    ) -> BackendT:
        """Return the named backend, or for ``auto`` the best that can run; log which was chosen.

        ``refusal`` says what else speaks against one that can run. Raises StartupError
        (BACKEND_UNAVAILABLE) for an unknown name, or where nothing can run.
        """
        refused: dict[str, str] = {}
        for each in self._candidates(name, device):
            reason = self.probe(each, device, dtype) or refusal(self.load(each))
            if reason is None:
                skipped = "; ".join(f"not {words}" for words in _told(refused))
                logger.info("%s backend: %s%s", self.kind, each, f" ({skipped})" * bool(skipped))
                return self.load(each)()
            refused[each] = reason
        raise StartupError(self._unavailable(name, refused), ExitCode.BACKEND_UNAVAILABLE)

    def _candidates(self, name: str, device: torch.device) -> Sequence[str]:
        return (name,) if name != "auto" else self.order.get(device.type, self._order_elsewhere)

    def _unavailable(self, name: str, refused: dict[str, str]) -> str:
        if name == "auto":
            return f"no {self.kind} backend can run here: {'; '.join(_told(refused))}"
        return (
            f"the {self.kind} backend {name!r} cannot run here: {refused[name]}; "
            f"choose auto or another of {', '.join(self.names)}"
        )


def _told(refused: dict[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in refused.items()]
