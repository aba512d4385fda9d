"""What would make a step fit that no setting makes fit: for each kind of change the smallest that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from megam3.config.schema import RunConfig
from megam3.data.lengths import LongestTexts
from megam3.planning.recipe import read_model_shape, steps_of, strategies
from megam3.planning.shapes import StepShape
from megam3.planning.strategy import candidates

MAX_DOUBLINGS = 7
"""Ranks are doubled, texts and batches halved, so often at most: 128 times is no small change any more."""

MIN_TEXT_TOKENS = 64
"""Shorter texts than this are no remedy."""


def smallest_changes(
    config: RunConfig,
    templates: Sequence[str],
    world_size: int,
    limit_bytes: int,
    longest: LongestTexts | None = None,
) -> list[str]:
    """One entry for each of more ranks, a smaller batch and shorter texts that helps by itself, in words."""
    model = read_model_shape(config)

    def fits(steps: list[StepShape], ranks: int) -> bool:
        every = candidates(
            model,
            strategies(config, templates, ranks, on_gpu=True),
            steps,
            chunk_tokens=config.data.batch.chunk_tokens,
        )
        return any(each.peak_bytes <= limit_bytes for each in every)

    steps = [step for _, step in steps_of(config, world_size, longest)]
    found, powers = [], range(1, MAX_DOUBLINGS + 1)
    ranks = _first(
        (world_size << n for n in powers),
        lambda ranks: fits([step for _, step in steps_of(config, ranks, longest)], ranks),
    )
    if ranks is not None:
        found.append(f"{ranks} ranks")
    share = _first(
        (1 << n for n in powers),
        lambda share: fits([_smaller(step, share) for step in steps], world_size),
    )
    if share is not None:
        found.append(f"data.batch at 1/{share} of its size")
    longest_tokens = max(step.longest_tokens for step in steps)
    tokens = _first(
        (longest_tokens >> n for n in powers if longest_tokens >> n >= MIN_TEXT_TOKENS),
        lambda tokens: fits([_shorter(step, tokens) for step in steps], world_size),
    )
    if tokens is not None:
        found.append(f"data.passage_max_tokens={tokens} (and no longer queries)")
    return found


def _first(sizes: Iterable[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if fits(size)), None)


def _smaller(step: StepShape, share: int) -> StepShape:
    """A step of so many times fewer queries, each with its passages, one at least."""
    group = step.num_passages // max(1, step.num_queries)
    if not step.num_queries:
        return replace(step, num_passages=max(1, step.num_passages // share))
    queries = max(1, step.num_queries // share)
    return replace(step, num_queries=queries, num_passages=queries * group)


def _shorter(step: StepShape, tokens: int) -> StepShape:
    """The same texts, cut."""
    return replace(
        step, query_tokens=min(step.query_tokens, tokens), passage_tokens=min(step.passage_tokens, tokens)
    )
