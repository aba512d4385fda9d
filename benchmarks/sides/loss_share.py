"""What three heads and all losses add: forward and backward of the encoder alone, then of the whole
objective, in one process.

Spec: model_folder, texts; optional threads. Answers the seconds of both and of the whole; no optimizer on
either.
"""

import time
from typing import Any

import torch

from benchmarks.sides.megam3_step import make_batch
from benchmarks.worker import Step, serve
from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.model.backbone import encode_packed
from megam3.model.m3 import M3Model
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective


class PlainEngine:
    """The objective's view of a model without an engine."""

    def __init__(self, model: M3Model):
        self._model = model

    def forward(self, *args: Any) -> Any:
        return self._model(*args)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        loss.backward()


def build(spec: dict) -> Step:
    """See the module's docstring."""
    folder = spec["model_folder"]
    model = load_m3(folder, ModelConfig(path=folder), special_ids=(0, 1, 2, 3)).train()
    batch, objective, engine = (
        make_batch(folder, spec["texts"]),
        UnifiedObjective(UnifiedConfig()),
        PlainEngine(model),
    )
    texts = batch.texts
    upstream_TD = torch.randn(texts.num_tokens, model.encoder.config.hidden_size) * 1e-3

    def step() -> dict:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        encode_packed(
            model.encoder, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths
        ).backward(upstream_TD)
        encoder_seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        objective.run(engine, batch, Progress())
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "encoder_seconds": encoder_seconds}

    return step


if __name__ == "__main__":
    serve(build)
