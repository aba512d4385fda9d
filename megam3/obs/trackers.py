"""Experiment trackers behind the one metrics file: Weights & Biases and MLflow, each an optional extra.

    MEGAM3_TRACKERS=wandb,mlflow megam3 train RECIPE

What goes to metrics.jsonl goes to them, and nothing else: no recipe, no environment, no address. A key or a
store is taken from the variables that the libraries read themselves (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI), and is never read, logged or written here. A tracker that fails during a run is left out
from then on with one warning: a network that is away must not end a training.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megam3.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "MEGAM3_TRACKERS"
"""Names of trackers, separated by commas. A variable and no field: who watches a run is no part of it."""


class Tracker(Protocol):
    """Takes figures of steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step; all are finite."""

    def close(self) -> None:
        """Send what is left."""


class WandbTracker:
    """A run of Weights & Biases, kept under RUN/wandb and continued under the same id."""

    def __init__(self, run_dir: Path, start_step: int):
        self._run = _library("wandb").init(
            dir=str(run_dir), name=run_dir.name, id=_id_of(run_dir), resume="allow", reinit="create_new"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow in the store that MLFLOW_TRACKING_URI names."""

    def __init__(self, run_dir: Path, start_step: int):
        self._client = _library("mlflow").MlflowClient()
        experiment = self._client.get_experiment_by_name("megam3")
        found = experiment.experiment_id if experiment else self._client.create_experiment("megam3")
        self._run = self._client.create_run(found, run_name=run_dir.name).info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            # MLflow allows letters, digits and _-. /: in names; the @ of ndcg@10 is none of them
            self._client.log_metric(
                self._run, name.replace("@", "_at_").replace("+", "_and_"), value, step=step
            )

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


@dataclass
class _Named:
    name: str
    tracker: Tracker


class Trackers:
    """All trackers of a run; without any, every call does nothing.

    Raises:
        ConfigError: an unknown name, or a library that is not installed.
    """

    def __init__(self, run_dir: Path, start_step: int, names: str | None = None):
        given = os.environ.get(VARIABLE, "") if names is None else names
        wanted = [name.strip() for name in given.split(",") if name.strip()]
        for name in wanted:
            if name not in TRACKERS:
                raise ConfigError(
                    VARIABLE, name, f"must be among {', '.join(TRACKERS)}", "check the spelling"
                )
        self._open: list[_Named] = []
        for name in wanted:
            tracker = _guarded(name, partial(TRACKERS[name], run_dir.resolve(), start_step))
            if tracker is not None:
                self._open.append(_Named(name, tracker))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on the finite figures of a step."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.write(step, finite))

    def close(self) -> None:
        """Send what is left; the trackers are gone then."""
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        kept = []
        for named in self._open:

            def done(tracker: Tracker = named.tracker) -> bool:
                call(tracker)
                return True

            if _guarded(named.name, done):
                kept.append(named)
        self._open = kept


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; None after a warning when the tracker fails."""
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:  # of a library and its network: whatever it is, training goes on
        # the kind alone: a message may hold an address with a key in it
        logger.warning("%s fails (%s) and is left out from here on", name, type(error).__name__)
        return None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        rule = "is not installed"
        raise ConfigError(VARIABLE, name, rule, f"pip install 'megam3[{name}]', or leave it out") from None


def _id_of(run_dir: Path) -> str:
    """The same for every start of a run, so that a requeued job continues its curves."""
    file = run_dir / "wandb-id"
    if not file.exists():
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
