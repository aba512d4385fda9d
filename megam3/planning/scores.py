"""What representations and the loss over them hold: of all texts of a rank, between the encoder's passes."""

from megam3.loss.limits import (
    GROUP_TILE_TEXTS,
    MATRICES_IN_MAXSIM,
    loss_needs_tiles,
    score_matrices,
    texts_per_tile,
)
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from megam3.scoring.chunks import passages_at_a_time, products_at_a_time, rows_widened_at_a_time

FP32, INT32 = 4, 4

WINNER_BYTES = 28
"""MaxSim's backward pass per (query row, passage): column, coefficient, sorted column, order (int64), row and
value."""


def representation_bytes(model: ModelShape, strategy: Strategy, step: StepShape) -> int:
    """What the gradient cache keeps of all texts, and its gradient: multi-vector rows, dense vectors (fp32),
    lexical (id, weight) pairs."""
    num_texts = step.num_queries + step.num_passages
    rows = step.num_tokens * model.row_width * strategy.precision_bytes
    if "lexical" not in model.heads:
        return 2 * (rows + num_texts * model.hidden_size * FP32)
    return 2 * (rows + num_texts * model.hidden_size * FP32 + step.num_tokens * FP32) + step.num_tokens * 8


def loss_bytes(model: ModelShape, strategy: Strategy, step: StepShape) -> dict[str, int]:
    """Peak of the loss over all ranks' passages: score matrices, MaxSim's winners and its backward pass,
    every rank's queries."""
    ranks, size, width = strategy.world_size, strategy.precision_bytes, model.row_width
    queries, passages, query_rows = (
        step.num_queries,
        step.num_passages,
        step.num_queries * step.query_tokens * ranks * ("multi_vector" in model.heads),
    )
    scores, rows, kept = queries * passages * ranks, query_rows, query_rows * passages
    needs_tiles = loss_needs_tiles(queries, passages * ranks, query_rows, passages)
    if step.loss_tiles == "always" or (step.loss_tiles == "auto" and needs_tiles):
        side = texts_per_tile(step.query_tokens if query_rows else 0)
        group = -(-passages // max(1, queries))
        scores, rows = (
            min(side, queries * ranks) * min(side, passages),
            min(side, queries * ranks) * step.query_tokens,
        )
        passages = min(side, passages)
        # the queries' own groups keep an ordinary graph, tiles only their own winners
        kept = rows * passages + queries * step.query_tokens * min(
            step.num_passages, GROUP_TILE_TEXTS * group
        )
    matrices = int(scores * score_matrices(len(model.heads), model.num_dimensions) * FP32)
    if not query_rows:
        return {"score matrices": matrices}
    gathered = query_rows * width * ((size if ranks > 1 else 0) + 2 * FP32)
    backward = _maxsim_backward(strategy, rows, passages, step.passage_tokens, width)
    backward += products_at_a_time(strategy.on_gpu) * FP32
    # MaxSim's backward pass comes when most matrices are gone
    left = scores * MATRICES_IN_MAXSIM * FP32
    if left + backward > matrices:
        return {"score matrices": left, "MaxSim": kept * INT32 + backward, "gathered queries": gathered}
    return {"score matrices": matrices, "MaxSim": kept * INT32, "gathered queries": gathered}


def _maxsim_backward(
    strategy: Strategy, query_rows: int, num_passages: int, passage_tokens: int, width: int
) -> int:
    """Pairs in work at a time: chunks of passages, and of query rows where those are widened."""
    product = products_at_a_time(strategy.on_gpu)
    held_rows = rows_widened_at_a_time(product, width, strategy.on_gpu)
    per_sort = passages_at_a_time(product, query_rows)
    texts = max(1, min(num_passages, held_rows // max(1, passage_tokens), per_sort))
    rows = query_rows if strategy.precision_bytes == FP32 else min(query_rows, held_rows)
    return rows * texts * WINNER_BYTES
