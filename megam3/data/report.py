"""What was prepared, and what a plan will do, as text a person reads before spending days of compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megam3.cost import assign_ranks
from megam3.data.assemble import Assembler
from megam3.data.manifest import Manifest
from megam3.data.plan import Plan, PlannedBatch

BAR_WIDTH = 40
LANGUAGES_SHOWN = 50


def store_report(manifest: Manifest) -> str:
    """Records, tokens, languages, lengths, truncations and rejects of one finished dataset."""
    totals = manifest.totals
    lines = [
        f"{manifest.name}: {totals.rows:,} records, {totals.texts:,} texts, {totals.tokens:,} tokens, "
        f"{len(manifest.shards)} shards, {totals.bytes / 1e6:,.1f} MB",
        f"  truncated texts   {totals.truncated:,}",
        f"  rejected records  {totals.rejected:,}",
        *(f"    {count:,} × {reason}" for reason, count in totals.reasons.items()),
        "  language       records         tokens",
    ]
    ranked = sorted(manifest.per_language.items(), key=lambda item: (-item[1].rows, item[0]))
    lines += [
        f"  {name:<10} {counts.rows:>11,} {counts.tokens:>14,}" for name, counts in ranked[:LANGUAGES_SHOWN]
    ]
    if len(ranked) > LANGUAGES_SHOWN:
        rest = ranked[LANGUAGES_SHOWN:]
        rows, tokens = sum(counts.rows for _, counts in rest), sum(counts.tokens for _, counts in rest)
        lines.append(f"  {len(rest):,} others {rows:>9,} {tokens:>14,}")
    lines.append("  longest text of a record, in tokens")
    shown = [(edge, count) for edge, count in manifest.length_histogram if count]
    most = max(count for _, count in shown)
    lines += [
        f"  ≤ {edge:>6,} {count:>12,} {'█' * max(1, round(BAR_WIDTH * count / most))}"
        for edge, count in shown
    ]
    return "\n".join(lines)


def store_facts(manifest: Manifest) -> dict[str, Any]:
    """As `store_report`, for programs."""
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        **manifest.totals.model_dump(mode="json"),
        "languages": {name: counts.model_dump() for name, counts in manifest.per_language.items()},
        "length_histogram": [
            {"max_tokens": edge, "records": count} for edge, count in manifest.length_histogram
        ],
    }


def draw_histogram(manifests: Sequence[Manifest], path: Path) -> None:
    """Write the length histograms of finished datasets as a picture (PNG)."""
    # half a second that no other use of this module shall pay
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for manifest in manifests:
        edges, counts = zip(*manifest.length_histogram)
        axes.step([str(edge) for edge in edges], counts, where="mid", label=manifest.name)
    axes.set(xlabel="tokens of a record's longest text, at most", ylabel="records", yscale="symlog")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


@dataclass(frozen=True, kw_only=True)
class PlanEstimate:
    """Means over a sample of an epoch's batches."""

    num_sampled: int
    tokens_per_batch: float
    padding_avoided: float
    """Share of the tokens a padded pipeline would process that are padding."""
    imbalance: float
    """Cost of the busiest rank over the mean of all, minus one."""


def estimate_plan(plan: Plan, assembler: Assembler, world_size: int, max_batches: int = 200) -> PlanEstimate:
    """Read the index (no tokens) for evenly spaced batches of the first epoch.

    Texts drawn from many count with their mean length.
    """
    numbers = np.unique(
        np.linspace(0, plan.num_batches - 1, min(max_batches, plan.num_batches)).astype(int)
    ).tolist()
    tokens, padded, imbalances = [], [], []
    for number in numbers:
        planned = plan.batch(number)
        costs = assembler.row_costs(planned)
        lengths = assembler.row_tokens(planned)
        shares = assign_ranks(costs, world_size)
        tokens.append(lengths[:2].sum())  # the third row counts passages
        padded.append(sum(_padded(lengths[:, share]) for share in shares))
        loads = np.array([costs[share].sum() for share in shares])
        imbalances.append(loads.max() / loads.mean() - 1)
    return PlanEstimate(
        num_sampled=len(numbers),
        tokens_per_batch=float(np.mean(tokens)),
        padding_avoided=1 - float(np.sum(tokens) / np.sum(padded)),
        imbalance=float(np.mean(imbalances)),
    )


def _padded(lengths: np.ndarray) -> float:
    """Tokens of one rank, queries and passages each padded to the longest; see Assembler.row_tokens."""
    query, passages, group = lengths[0], lengths[1], lengths[2]
    longest = (passages / np.maximum(group, 1)).max()
    return float(query.max() * len(query) + longest * group.sum())


def plan_facts(
    plan: Plan, estimate: PlanEstimate, accumulation_steps: int, world_size: int
) -> dict[str, Any]:
    """As `plan_report`, for programs."""
    return {
        "queries": plan.num_served,
        "batches": plan.num_batches,
        "optimizer_steps": plan.num_batches / accumulation_steps,
        "tokens_per_batch": estimate.tokens_per_batch,
        "padding_avoided": estimate.padding_avoided,
        "ranks": world_size,
        "imbalance": estimate.imbalance,
        "cells": [
            {
                "group": cell.group,
                "max_tokens": cell.max_tokens,
                "queries": cell.num_full * cell.batch_queries + sum(cell.tails),
                "batch_queries": cell.batch_queries,
                "batches": cell.num_batches,
                "short_batches": list(cell.tails),
            }
            for cell in plan.cells
        ],
        "queries_by_language": _served_by_language(plan),
    }


def _served_by_language(plan: Plan) -> dict[str, int]:
    served: dict[str, int] = {}
    for stratum in plan.strata:
        served[stratum.language] = served.get(stratum.language, 0) + stratum.num_served
    return served


def plan_report(plan: Plan, estimate: PlanEstimate, accumulation_steps: int, world_size: int) -> str:
    """Steps, tokens, padding avoided, cells and the share of each language in one epoch."""
    served = _served_by_language(plan)
    tokens_per_epoch = estimate.tokens_per_batch * plan.num_batches
    lines = [
        f"one epoch: {plan.num_served:,} queries in {plan.num_batches:,} batches",
        f"optimizer steps: {plan.num_batches / accumulation_steps:,.1f}",
        f"tokens: about {estimate.tokens_per_batch:,.0f} a batch, {tokens_per_epoch:,.0f} an epoch",
        f"padding avoided: {estimate.padding_avoided:.1%} of what padded batches would process",
        f"imbalance: the busiest of {world_size} ranks has {estimate.imbalance:.1%} more than the mean",
        "",
        f"{'group':<24} {'≤ tokens':>8} {'queries':>12} {'a batch':>8} {'batches':>9} {'short':>12}",
    ]
    for cell in plan.cells:
        short = ", ".join(map(str, cell.tails)) or "–"
        served_here = cell.num_full * cell.batch_queries + sum(cell.tails)
        lines.append(
            f"{cell.group:<24} {cell.max_tokens:>8,} {served_here:>12,} "
            f"{cell.batch_queries:>8,} {cell.num_batches:>9,} {short:>12}"
        )
    lines += ["", f"{'language':<24} {'queries':>12} {'share':>8}"]
    ranked = sorted(served.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(
        [*lines, *(f"{name:<24} {count:>12,} {count / plan.num_served:>8.2%}" for name, count in ranked)]
    )


def batch_text(plan: Plan, planned: PlannedBatch) -> str:
    """One line about a planned batch: where it comes from."""
    cell = plan.cells[planned.cell]
    place = f"epoch {planned.epoch}, batch {planned.index} of it"
    return f"{place}: {cell.group}, texts of at most {cell.max_tokens} tokens, {len(planned.rows)} queries"


def batch_facts(plan: Plan, planned: PlannedBatch) -> dict[str, Any]:
    """As `batch_text`, for programs."""
    cell = plan.cells[planned.cell]
    return {
        "epoch": planned.epoch,
        "batch": planned.index,
        "group": cell.group,
        "max_tokens": cell.max_tokens,
        "queries": len(planned.rows),
    }
