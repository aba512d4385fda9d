"""One FlagEmbedding training step: its M3 model class, its collator's padding, its trainer's optimizer. Runs
in its own environment.

Spec: model_folder, texts; optional threads, checkpointing, address_space_bytes, device.
"""

import torch
from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator
from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
from FlagEmbedding.finetune.embedder.encoder_only.m3.runner import EncoderOnlyEmbedderM3Runner
from transformers import AutoTokenizer

from benchmarks.worker import Step, serve


def _moved(value, device: str):
    """The collator's columns are batches of the tokenizer, lists of them, or None."""
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.to(device) if hasattr(value, "to") else value


def build(spec: dict) -> Step:
    """Batch and model as `EncoderOnlyEmbedderM3Runner` makes them for the published m3 recipe, on one
    process."""
    folder, texts = spec["model_folder"], spec["texts"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    group_size = len(texts["passages"]) // len(texts["queries"])
    groups = [texts["passages"][i * group_size : (i + 1) * group_size] for i in range(len(texts["queries"]))]
    longest = max(texts["query_lengths"] + texts["passage_lengths"])
    collator = AbsEmbedderCollator(tokenizer, query_max_len=longest, passage_max_len=longest)
    batch = collator([(query, passages, None) for query, passages in zip(texts["queries"], groups)])
    model = EncoderOnlyEmbedderM3Model(
        EncoderOnlyEmbedderM3Runner.get_model(folder),
        tokenizer=tokenizer,
        temperature=0.02,
        normalize_embeddings=True,
        unified_finetuning=True,
        use_self_distill=True,
        self_distill_start_step=-1,
    ).train()
    device = spec.get("device", "cpu")
    model.to(device)
    batch = {name: _moved(value, device) for name, value in batch.items()}
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    plain = [p for p in model.parameters() if p.dim() == 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.01}],
        lr=1e-5,
        fused=True,
    )

    def step() -> dict:
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    return step


if __name__ == "__main__":
    serve(build)
