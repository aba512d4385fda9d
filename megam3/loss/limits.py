"""When score matrices are too many to hold, and how large a tile is then. Free of torch: the memory plan
reads the same numbers.

MaxSim's own chunk sizes lie beside it, in megam3/scoring/chunks.py.
"""

MATRIX_SCORES = 1 << 26
"""Scores of one head held at once before the loss goes over to tiles: 256 MB in fp32, times
`score_matrices`."""

WINNERS = 1 << 30
"""MaxSim's (query row, passage) pairs held at once before the loss goes over to tiles: 4 GB of winners."""

TILE_TEXTS = 2048
"""Queries and passages of a tile: 4 M scores, 16 MB each in fp32."""

TILE_WINNERS = 1 << 24
"""With the multi-vector head, bound on a tile's (query rows × passages), each of which keeps an int32 between
its
passes: 64 MB."""

GROUP_TILE_TEXTS = 64
"""The tiled loss scores this many queries against their own groups at a time, of which each query keeps
one."""

MATRICES_PER_SCORE = 4
"""fp32 matrices queries × passages of one score at the peak of the plain loss: itself, masked logits,
log-probabilities and one gradient."""

MATRICES_PER_DIMENSION = 1.5
"""The same of each Matryoshka dimension, beside the dense head alone."""

MATRICES_IN_MAXSIM = 5
"""Of them all, those that are left when MaxSim's backward pass runs: a gradient a score, and one score."""


def score_matrices(num_heads: int, num_dimensions: int = 0) -> float:
    """fp32 matrices queries × passages alive at the peak of the plain loss: of every head and, where there
    are several, of their sum and the distillation's target.

    >>> score_matrices(3), score_matrices(1)
    (17.0, 4.0)
    """
    if num_heads > 1:
        # the dimensions' own come and go while fewer are alive
        return MATRICES_PER_SCORE * (num_heads + 1) + 1.0
    return MATRICES_PER_SCORE + MATRICES_PER_DIMENSION * num_dimensions


def loss_needs_tiles(num_queries: int, num_columns: int, query_rows: int, num_passages: int) -> bool:
    """Whether whole score matrices, or MaxSim's winners with them, would be too many to hold.

    Args:
        num_queries, num_passages: of one rank.
        num_columns: passages of all ranks.
        query_rows: multi-vector rows of all ranks' queries; 0 without that head.
    """
    return num_queries * num_columns > MATRIX_SCORES or query_rows * num_passages > WINNERS


def texts_per_tile(rows_per_query: float) -> int:
    """Texts per side of a tile, for queries of so many multi-vector rows on average; 0 without that head."""
    if rows_per_query == 0:
        return TILE_TEXTS
    # a square tile of n texts a side keeps rows_per_query · n² winners
    side = int((TILE_WINNERS / max(1.0, rows_per_query)) ** 0.5)
    return max(1, min(TILE_TEXTS, side))
