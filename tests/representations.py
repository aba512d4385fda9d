"""Ragged representations for tests, and naive padded references of every score."""

import torch
from torch import Tensor

from megam3.batch import Representations


def make_offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def random_representations(
    num_texts: int,
    seed: int,
    vocabulary: int = 23,
    width: int = 5,
    max_rows: int = 6,
    dtype: torch.dtype = torch.float64,
) -> Representations:
    """Texts with 0 to max_rows rows and pairs each; all floats are leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, max_rows + 1, (num_texts,), generator=generator).tolist()
    pairs = torch.randint(0, max_rows + 1, (num_texts,), generator=generator).tolist()
    ids = [torch.randperm(vocabulary, generator=generator)[:count].sort().values for count in pairs]
    dense = torch.randn(num_texts, width, generator=generator, dtype=torch.float64)
    multi = torch.randn(sum(rows), width + 1, generator=generator, dtype=torch.float64)
    weights = torch.rand(sum(pairs), generator=generator, dtype=torch.float64)
    return Representations(
        dense_ND=torch.nn.functional.normalize(dense, dim=1).to(dtype).requires_grad_(),
        lexical_weights_Z=weights.to(dtype).requires_grad_(),
        lexical_ids_Z=torch.cat([torch.zeros(0, dtype=torch.int64), *ids]),
        lexical_offsets_N1=make_offsets(pairs),
        multi_KC=torch.nn.functional.normalize(multi, dim=1).to(dtype).requires_grad_(),
        multi_offsets_N1=make_offsets(rows),
    )


def naive_lexical(queries: Representations, passages: Representations) -> Tensor:
    """N×V vectors, as the peers hold them."""
    size = int(max([0, *queries.lexical_ids_Z.tolist(), *passages.lexical_ids_Z.tolist()])) + 1

    def vectors(texts: Representations) -> Tensor:
        spans = texts.lexical_offsets_N1.tolist()
        rows = []
        for start, stop in zip(spans, spans[1:]):
            zero = torch.zeros(size, dtype=texts.lexical_weights_Z.dtype)
            rows.append(
                zero.index_put((texts.lexical_ids_Z[start:stop],), texts.lexical_weights_Z[start:stop])
            )
        return (
            torch.stack(rows)
            if rows
            else texts.lexical_weights_Z.sum() * torch.ones(0, size, dtype=texts.lexical_weights_Z.dtype)
        )

    return vectors(queries) @ vectors(passages).T


def _padded(texts: Representations) -> tuple[Tensor, Tensor]:
    spans = texts.multi_offsets_N1.tolist()
    lengths = [stop - start for start, stop in zip(spans, spans[1:])]
    widest = max([1, *lengths])
    rows = [
        torch.nn.functional.pad(texts.multi_KC[start:stop], (0, 0, 0, widest - (stop - start)))
        for start, stop in zip(spans, spans[1:])
    ]
    real = torch.arange(widest) < torch.tensor(lengths)[:, None]
    return torch.stack(rows), real


def naive_maxsim(queries: Representations, passages: Representations, reduction: str = "mean") -> Tensor:
    """The whole Q×L×P×L tensor with correct masks."""
    (query_QLC, query_real), (passage_PLC, passage_real) = _padded(queries), _padded(passages)
    products = torch.einsum("qic,pjc->qpij", query_QLC, passage_PLC)
    best = products.masked_fill(~passage_real[None, :, None, :], float("-inf")).max(3).values
    keep = query_real[:, None, :] & passage_real.any(1)[None, :, None]
    total = best.masked_fill(~keep, 0.0).sum(2)
    if reduction == "sum":
        return total
    return total / query_real.sum(1).clamp(min=1)[:, None]


def naive_scores(
    queries: Representations, passages: Representations, weights: tuple[float, float, float]
) -> dict[str, Tensor]:
    scores = {
        "dense": queries.dense_ND @ passages.dense_ND.T,
        "lexical": naive_lexical(queries, passages),
        "multi_vector": naive_maxsim(queries, passages),
    }
    scores["sum"] = sum(weight * score for weight, score in zip(weights, scores.values()))
    return scores
