"""When score matrices are too many to hold, and how large a tile is then. Free of torch: the memory plan
reads the same numbers.

MaxSim's own chunk sizes lie beside it, in megam3/scoring/chunks.py.
"""

MATRIX_SCORES = 1 << 26
"""Scores of one head held at once before the loss goes over to tiles: 256 MB in fp32, times
SCORE_MATRICES."""

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

SCORE_MATRICES = 17
"""fp32 matrices queries × passages alive at the peak of the plain loss: per score (3 heads, sum) itself,
masked logits, log-probabilities and one gradient; and the distillation's target."""


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
