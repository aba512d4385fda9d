"""What evaluations during a run found, and what follows from it: which checkpoint is the best one, and
whether the run still gets better.

    checkpoints/evaluations.json      {"100": {"eval/heldout/All/ndcg@10": 0.61, …}, "200": …}

Both answers are functions of this file, so a run that is started again gives the same ones.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Collection, Mapping

from megam3.config.schema import EarlyStoppingConfig, MetricConfig
from megam3.dist import comm
from megam3.files import read_json, write_json

logger = logging.getLogger(__name__)

FILE = "evaluations.json"


class Evaluations:
    """Figures by step; the main rank's to write.

    Args:
        run_dir: of the run.
        last_step: later figures belong to steps that are taken again, and are dropped.
    """

    def __init__(self, run_dir: str, last_step: int):
        self._path = os.path.join(run_dir, "checkpoints", FILE)
        self._by_step: dict[int, dict[str, float]] = {}
        try:
            found = read_json(self._path)
            self._by_step = {int(step): dict(figures) for step, figures in found.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning(
                "%s cannot be read (%s): the best checkpoint is looked for anew", self._path, error
            )
        self._by_step = {step: figures for step, figures in self._by_step.items() if step <= last_step}

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Note what an evaluation after `step` steps found."""
        self._by_step[step] = dict(figures)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        write_json(self._path, {str(step): self._by_step[step] for step in sorted(self._by_step)})

    def __contains__(self, step: int) -> bool:
        """Whether this run was evaluated after `step` steps, to the end."""
        return step in self._by_step

    def values(self, metric: MetricConfig) -> dict[int, float]:
        """The mean of a metric over all test sets, by step, ascending."""
        wanted = f"/{metric.mode}/{metric.metric}"
        found = {
            step: [value for name, value in figures.items() if name.endswith(wanted)]
            for step, figures in sorted(self._by_step.items())
        }
        return {step: statistics.fmean(values) for step, values in found.items() if values}

    def best_step(self, metric: MetricConfig, among: Collection[int]) -> int | None:
        """The step with the highest value, the earliest of equal ones; None: none of them was evaluated."""
        values = {step: value for step, value in self.values(metric).items() if step in among}
        return max(values, key=lambda step: (values[step], -step)) if values else None

    def num_without_gain(self, metric: MetricConfig, min_gain: float) -> int:
        """Evaluations since the last one that was better by `min_gain` than all before it."""
        best, since = float("-inf"), 0
        for value in self.values(metric).values():
            is_better = value > best + min_gain
            best, since = (value, 0) if is_better else (best, since + 1)
        return since

    def end_run(self, rule: EarlyStoppingConfig | None, step: int) -> bool:
        """Whether `rule` ends the run after `step` steps, said once; collective, the main rank's file
        decides."""
        if rule is None:
            return False
        since = comm.gather_objects_json(self.num_without_gain(rule, rule.min_gain))[0]
        if since >= rule.patience:
            said = "step %d: ended early, %s %s has not got better for %d evaluations (train.early_stopping)"
            logger.info(said, step, rule.mode, rule.metric, since)
        return since >= rule.patience
