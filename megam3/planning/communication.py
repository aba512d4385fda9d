"""How many bytes a rank sends in one optimizer step, by ZeRO stage and number of backward passes.

Published (arXiv 1910.02054, section 7), for one forward and one backward pass over Ψ parameters: an all-
reduce moves 2Ψ, as reduce-scatter and all-gather; stages 1 and 2 reduce-scatter gradients and all-gather
weights, 2Ψ; stage 3 gathers weights for the forward and for the backward pass and reduce-scatters
gradients, 3Ψ. A ring of W ranks sends the (W-1)/W part of that from every rank.

With G > 1 chunks of the gradient cache: stages 0 and 1 still reduce once a step; stage 2 keeps no full
gradient, so it reduces after every backward pass; stage 3 gathers weights for the pass without a graph
as well:

    stage       G = 1     G chunks
    0, 1        2Ψ        2Ψ
    2           2Ψ        (G + 1)Ψ
    2, once     2Ψ        2Ψ       engine.gradient_reduction: once; the whole gradient is held
    3           3Ψ        4GΨ

Small parameters that stage 3 keeps on every rank are counted as if they were gathered, and a
checkpointed layer as gathered once for its recomputation and backward pass together. Representations are
not in it: they are exchanged alike under every stage.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepVolume:
    """Bytes that one rank sends in one optimizer step."""

    weight_bytes: int
    """Weights gathered from the ranks that hold them."""
    gradient_bytes: int
    """Gradients summed over the ranks."""

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.weight_bytes + self.gradient_bytes


def step_volume(
    *,
    zero_stage: int,
    world_size: int,
    num_parameters: int,
    num_trained: int | None = None,
    num_chunks: int = 1,
    precision_bytes: int = 2,
    reduces_once: bool = False,
    has_first_pass: bool | None = None,
) -> StepVolume:
    """What one rank sends in a step of `num_chunks` backward passes, by the table at the top of this file.

    `num_trained`: those with gradients (None: all); of the others stages 0 to 2 send nothing, and stage 3
    gathers them. `reduces_once`: `engine.gradient_reduction: once`. `has_first_pass`: whether chunks are
    encoded without a graph first; None: where there are several (the gradient cache).
    """
    assert zero_stage in (0, 1, 2, 3)
    assert num_chunks >= 1
    if has_first_pass is None:
        has_first_pass = num_chunks > 1
    gathers, reductions = 1, 1
    if zero_stage == 2:
        reductions = 1 if reduces_once else num_chunks
    elif zero_stage == 3:
        gathers = (3 if has_first_pass else 2) * num_chunks
        reductions = 1 if reduces_once else num_chunks
    trained = num_parameters if num_trained is None else num_trained
    gathered = num_parameters if zero_stage == 3 else trained

    def sent(number: int) -> int:
        return number * precision_bytes * (world_size - 1) // world_size

    return StepVolume(weight_bytes=gathers * sent(gathered), gradient_bytes=reductions * sent(trained))
