"""One step of NeMo AutoModel's bi-encoder recipe on one process: its model, two encoder calls, scores of
every query with every passage, cross-entropy, AdamW. Runs in its own environment.

Spec: model_folder, texts; optional device, checkpointing.
"""

import torch
from nemo_automodel import NeMoAutoModelBiEncoder
from nemo_automodel._transformers.retrieval import BiEncoderModel
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from benchmarks.worker import Step, serve

TEMPERATURE = 0.02


def build(spec: dict) -> Step:
    """What `TrainBiEncoderRecipe` makes of a model whose dense vector is the first token's."""
    texts, device = spec["texts"], torch.device(spec.get("device", "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(spec["model_folder"])
    # the former puts the latter on CUDA's current device, and starts nowhere else
    load = NeMoAutoModelBiEncoder.from_pretrained if device.type == "cuda" else BiEncoderModel.build
    model = load(spec["model_folder"], pooling="cls", l2_normalize=True)
    model = model.to(device).train()
    if spec.get("checkpointing"):
        encoder = next(m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable"))
        encoder.gradient_checkpointing_enable()
    sides = [
        dict(tokenizer(texts[name], padding=True, return_tensors="pt").to(device))
        for name in ("queries", "passages")
    ]
    group_size = len(texts["passages"]) // len(texts["queries"])
    labels = torch.arange(len(texts["queries"]), device=device) * group_size
    named = list(model.named_parameters())
    plain = [p for name, p in named if name.endswith(".bias") or "norm" in name.lower()]
    chosen = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in chosen]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.01}],
        lr=1e-5,
        fused=True,
    )

    def step() -> dict:
        query_QD, passage_PD = (model(dict(side)) for side in sides)
        loss = cross_entropy(query_QD @ passage_PD.T / TEMPERATURE, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    return step


if __name__ == "__main__":
    serve(build)
