"""What can be wrong with an adapter for the model at hand."""

from __future__ import annotations

from lorax_contract.errors import ErrorKind, LoraxError


class AdapterMismatchError(LoraxError):
    """The adapter does not fit the model; the text names the module and says why."""

    kind = ErrorKind(422, "INVALID_ARGUMENT", "validation", "Adapter does not fit the model")
