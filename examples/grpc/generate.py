"""A text, a stream of the same text, and an adapter by name: plain blocking calls."""

from __future__ import annotations

import sys

import grpc

from lorax_proto import lorax_pb2, lorax_pb2_grpc


def main(address: str) -> None:
    """Ask a server three times."""
    with grpc.insecure_channel(address) as channel:
        stub = lorax_pb2_grpc.LoraxStub(channel)
        info = stub.Info(lorax_pb2.InfoRequest(), timeout=10)
        print(f"{info.model_id}, up to {info.max_total_tokens} tokens")

        request = lorax_pb2.GenerateRequest(text="The capital of France is")
        request.parameters.max_new_tokens = 16
        # A deadline ends the generation on the server, too.
        answer = stub.Generate(request, timeout=120)
        print(answer.sequences[0].text)
        print(f"{answer.usage.generated_tokens} tokens in {answer.timings.total_s:.2f} s")

        for chunk in stub.GenerateStream(request, timeout=120):
            print(chunk.text, end="", flush=True)
        print()

        request.parameters.adapter.id = "pirate"
        request.parameters.adapter.source = "local"
        print(stub.Generate(request, timeout=120).sequences[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:3002"])
