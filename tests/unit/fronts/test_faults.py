"""Every error of ours arrives in another process as what it was."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest

import lorax_router.grpc_api
import lorax_router.http_api
import lorax_router.service
from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.errors import BusyError, LoraxError, QuotaError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.fronts.faults import Fault, pack_fault, unpack_fault

for room in (lorax_router.grpc_api, lorax_router.http_api, lorax_router.service):
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        # A limited process is a program, and begins when it is imported.
        if not module.name.endswith("_process"):
            importlib.import_module(module.name)


def kinds_below(kind: type[LoraxError]) -> Iterator[type[LoraxError]]:
    if kind.__module__.startswith(("lorax_contract", "lorax_router")):
        yield kind
    for each in kind.__subclasses__():
        yield from kinds_below(each)


def examples_of(kind: type[LoraxError]) -> Iterator[LoraxError]:
    if issubclass(kind, AdapterUnavailableError):
        for reason in Reason:
            yield kind(reason, "it is not to be had", retry_after_s=2.5, detail="for the log")
    elif issubclass(kind, QuotaError | BusyError):
        yield kind("used up", retry_after_s=17)
    elif issubclass(kind, StartupError):
        yield kind("no port", ExitCode.PORT_IN_USE)
    else:
        yield kind("all of it, for the log", public="what clients see")
        yield kind()


EXAMPLES = [each for kind in dict.fromkeys(kinds_below(LoraxError)) for each in examples_of(kind)]


def crossed(error: LoraxError) -> LoraxError:
    data = msgspec.msgpack.encode(pack_fault(error))
    return unpack_fault(msgspec.msgpack.decode(data, type=Fault))


def test_there_are_errors_of_all_rooms() -> None:
    assert len({type(each) for each in EXAMPLES}) > 25
    assert {"BodyError", "SlowReaderError"} <= {type(each).__name__ for each in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda each: type(each).__name__)
def test_an_error_crosses_unchanged(error: LoraxError) -> None:
    found = crossed(error)
    assert type(found) is type(error)
    assert (str(found), found.public, found.kind) == (str(error), error.public, error.kind)
    assert vars(found) == vars(error)
    assert [type(each) for each in vars(found).values()] == [
        type(each) for each in vars(error).values()
    ]


def test_a_class_that_is_not_known_here_is_its_nearest_base() -> None:
    fault = pack_fault(QuotaError("used up", retry_after_s=3))
    stranger = msgspec.structs.replace(fault, kinds=["OfAnotherVersion", *fault.kinds])
    found = unpack_fault(stranger)
    assert type(found) is QuotaError
    assert found.kind.retry_after_s == 3
