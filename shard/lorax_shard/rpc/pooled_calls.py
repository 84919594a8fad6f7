"""LoRAX's Embed and Classify: a batch of texts, computed at once and kept nowhere."""

from __future__ import annotations

import numpy as np

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import HeadFacts, ScoreKind, VectorFacts
from lorax_contract.step import BASE_ADAPTER, OutputKind
from lorax_proto import generate_pb2 as pb
from lorax_shard.engine.engine import Engine
from lorax_shard.model.interface import SEQUENCE, TOKENS
from lorax_shard.rpc.errors import NotServedError
from lorax_shard.rpc.lorax_batches import LoraxBatches
from lorax_shard.rpc.lorax_requests import LoraxRequest, read_pooled


class PooledCalls:
    """Reads batches and computes them. Those that compute run in the command queue's thread.

    Args:
        vectors: how the model's vectors are made.
    """

    def __init__(
        self, engine: Engine, batches: LoraxBatches, vectors: VectorFacts, max_input_length: int
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._vectors = vectors
        self._max_input_length = max_input_length

    def read_embed(self, batch: pb.Batch) -> list[LoraxRequest]:
        """Read and tokenize texts to embed; ValidationError names the request at fault."""
        return self._read(batch, OutputKind.VECTOR)

    def read_classify(self, batch: pb.Batch) -> list[LoraxRequest]:
        """Read and tokenize texts to classify; NotServedError: the model has no head."""
        return self._read(batch, OutputKind.SCORES)

    def embed(self, requests: list[LoraxRequest]) -> pb.EmbedResponse:
        """Return the vectors, as the model was made to make them."""
        reply = pb.EmbedResponse()
        for request_id, raw in self._batches.pooled(requests).items():
            vector = np.frombuffer(raw, dtype="<f4")
            length = float(np.linalg.norm(vector.astype(np.float64)))
            if self._vectors.normalize and length:
                vector = (vector / length).astype(np.float32)
            reply.embeddings.add(request_id=request_id, values=vector)
        return reply

    def classify(self, requests: list[LoraxRequest]) -> pb.ClassifyResponse:
        """Return the likeliest label of each token, or all labels of a text, likeliest first."""
        head, reply = self._head(), pb.ClassifyResponse()
        for request_id, raw in self._batches.pooled(requests).items():
            scores = np.frombuffer(raw, dtype="<f4").reshape(-1, len(head.labels))
            shares = _probabilities(scores.astype(np.float64), head.scores)
            if head.classifies_tokens:
                places = shares.argmax(axis=1)
                best = shares.max(axis=1)
            else:
                places = np.argsort(-shares[0], kind="stable")
                best = shares[0][places]
            names = [head.labels[place] for place in places.tolist()]
            reply.classify_prediction_lists.add(
                request_id=request_id, predictions=names, scores=best
            )
        return reply

    def _read(self, batch: pb.Batch, output: OutputKind) -> list[LoraxRequest]:
        scores = output is OutputKind.SCORES
        pooling = self._head().pooling if scores else self._vectors.pooling
        for each in batch.requests:
            if scores and each.adapter_index != BASE_ADAPTER:
                raise ValidationError(
                    f"request {each.id}: adapters do not classify by this call, which knows the "
                    "labels of the model alone; send a step whose row asks for scores"
                )
        tokenizer = self._engine.tokenizer
        return [
            read_pooled(each, tokenizer, self._max_input_length, output, pooling)
            for each in batch.requests
        ]

    def _head(self) -> HeadFacts:
        model = self._engine.model
        head = model.head(TOKENS) or model.head(SEQUENCE)
        if head is None:
            raise NotServedError("this model has no classification head; it classifies nothing")
        return head


def _probabilities(scores: np.ndarray, kind: ScoreKind) -> np.ndarray:
    """Return what scores (n x labels) stand for."""
    if kind is ScoreKind.NUMBERS:
        return scores
    if kind is ScoreKind.ANY_OF or scores.shape[1] == 1:
        return np.asarray(np.exp(-np.logaddexp(0.0, -scores)))
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
