"""What goes wrong, as programs read it: codes, reasons, fields, when to try again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorax_proto import lorax_pb2, lorax_pb2_grpc

TRIES = 5


def details_of(error: grpc.RpcError) -> dict[str, str]:
    """Return what a rich status says beside its text."""
    found: dict[str, str] = {}
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            found["reason"] = info.reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            found["field"] = bad.field_violations[0].field
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            found["retry_after_s"] = str(retry.retry_delay.ToMilliseconds() / 1000)
    return found


def with_retries(call: Callable[[], lorax_pb2.GenerateResponse]) -> lorax_pb2.GenerateResponse:
    """Make a call again as long as the server says that it makes sense, and when."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except grpc.RpcError as error:
            seconds = details_of(error).get("retry_after_s")
            if seconds is None:
                raise
            time.sleep(float(seconds))
    return call()


def show(call: Callable[[], object]) -> None:
    """Make a call that fails and print how."""
    try:
        call()
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}")
        for name, value in details_of(error).items():
            print(f"    {name}: {value}")


def main(address: str) -> None:
    """Ask for what cannot be had, then for what can."""
    with grpc.insecure_channel(address) as channel:
        stub = lorax_pb2_grpc.LoraxStub(channel)
        request = lorax_pb2.GenerateRequest(text="The capital of France is")
        request.parameters.temperature = -1.0
        show(lambda: stub.Generate(request, timeout=30))
        request.parameters.ClearField("temperature")
        request.parameters.adapter.id = "no-such-adapter"
        request.parameters.adapter.source = "local"
        show(lambda: stub.Generate(request, timeout=30))
        show(lambda: stub.LoadAdapter(lorax_pb2.LoadAdapterRequest(), timeout=30))
        request.parameters.ClearField("adapter")
        request.parameters.max_new_tokens = 4096 - 16
        show(lambda: stub.Generate(request, timeout=0.2))
        request.parameters.max_new_tokens = 8
        print(with_retries(lambda: stub.Generate(request, timeout=120)).sequences[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:3002"])
