"""One megam3 RetroMAE step: masks, forward, backward, AdamW.

Spec: model_folder, texts (strings), max_tokens; optional threads, bag_of_words_weight, chunk_tokens.
"""

import time

import torch
from transformers import AutoTokenizer

from benchmarks.worker import Step, serve
from megam3.batch import Progress, TextBatch
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig
from megam3.model.retromae import RetroMAE
from megam3.objectives.pretrain import PretrainObjective
from megam3.packed_texts import pack_texts


class _Plain:
    """Forward and backward without an engine, as the other side has none."""

    def __init__(self, model: RetroMAE):
        self.model = model

    def forward(self, *args):
        return self.model(*args)

    def backward(self, loss, is_last):
        loss.backward()


def build(spec: dict) -> Step:
    """Tokenizing and masking are in the step, as the other side's collator does both there."""
    folder = spec["model_folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    section = PretrainConfig(bag_of_words_weight=spec.get("bag_of_words_weight", 0.0))
    objective = PretrainObjective(section, spec.get("chunk_tokens"))
    model = objective.load_model(ModelConfig(path=folder), torch.float32).train()
    engine = _Plain(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step_number = 0

    def step() -> dict:
        nonlocal step_number
        started = time.perf_counter()
        texts = spec["texts"]
        encoded = tokenizer(texts, truncation=True, max_length=spec["max_tokens"])["input_ids"]
        batch = TextBatch(
            texts=pack_texts(encoded),
            document_offsets_N1=torch.arange(len(texts) + 1),
            rows=torch.arange(len(texts)),
        )
        progress = Progress(step=step_number)
        (prepared,) = objective.prepare([batch], progress)
        collated = time.perf_counter() - started
        figures = objective.run(engine, prepared, progress)
        optimizer.step()
        optimizer.zero_grad()
        step_number += 1
        hidden, decoded, _ = (sum(x) for x in zip(*(chunk.counts for chunk in prepared.chunks)))
        return {
            "loss": float(figures["loss/total"]),
            "collate_seconds": collated,
            "tokens": batch.texts.num_tokens,
            "hidden": hidden,
            "decoded": decoded,
        }

    return step


if __name__ == "__main__":
    serve(build)
