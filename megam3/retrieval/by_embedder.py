"""An M3Embedder in the two forms that `evaluate` takes."""

from collections.abc import Sequence

from megam3.batch import Representations
from megam3.config.schema import MODE_HEADS
from megam3.embedder import M3Embedder
from megam3.retrieval.encode import EncodeIds
from megam3.retrieval.evaluate import Tokenize


def embedder_tokenize(embedder: M3Embedder) -> Tokenize:
    """The embedder's tokenizer in the form `evaluate` takes; a limit beyond the model's positions is lowered
    to them."""

    def tokenize(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return embedder.token_ids(texts, max_tokens=min(max_tokens, embedder.max_tokens))

    return tokenize


def embedder_encode(embedder: M3Embedder, modes: Sequence[str] | None = None) -> EncodeIds:
    """The embedder's model in the form `evaluate` takes: one batch, longest text first; only the heads that
    `modes` need are computed (None: all)."""
    needed = None if modes is None else sorted({head for mode in modes for head in MODE_HEADS.get(mode, ())})

    def encode_ids(token_ids: Sequence[Sequence[int]]) -> Representations:
        total = sum(len(ids) for ids in token_ids)
        (order, representations), *more = embedder.represent_ids(token_ids, batch_tokens=total, heads=needed)
        assert order == list(range(len(token_ids))), "one batch, sorted by length already"
        assert not more
        return representations

    return encode_ids
