"""One pylate training step of the multi-vector head with its cached contrastive loss; on a GPU its scores go
through late-interaction-kernels where that is installed. Runs in its own environment.

Spec: model_folder, texts; optional device, mini_batch_texts.
"""

from pathlib import Path

import torch
from pylate import losses, models
from pylate.models import Dense

from benchmarks.worker import Step, serve

TEMPERATURE = 0.02


def build(spec: dict) -> Step:
    """Columns as its trainer hands them over: queries, positives, and one column per further passage of the
    group; no query expansion and no skipped words, so that the tokens are everybody's."""
    texts, device, folder = spec["texts"], spec.get("device", "cpu"), spec["model_folder"]
    head = torch.load(Path(folder) / "colbert_linear.pt", weights_only=True)
    model = models.ColBERT(
        folder,
        device=device,
        embedding_size=head["weight"].shape[0],
        query_length=max(texts["query_lengths"]),
        document_length=max(texts["passage_lengths"]),
        query_prefix="",
        document_prefix="",
        skiplist_words=[],
        do_query_expansion=False,
    )
    linear = next(module for module in model.modules() if isinstance(module, Dense))
    with torch.no_grad():
        # a new one otherwise; pylate's has no bias
        linear.linear.weight.copy_(head["weight"])
    group_size = len(texts["passages"]) // len(texts["queries"])
    loss_function = losses.CachedContrastive(
        model, mini_batch_size=spec.get("mini_batch_texts", 4), temperature=TEMPERATURE
    )
    columns = [(texts["queries"], True)]
    columns += [(texts["passages"][i::group_size], False) for i in range(group_size)]
    features = [
        {name: value.to(device) for name, value in model.tokenize(column, is_query=is_query).items()}
        for column, is_query in columns
    ]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def step() -> dict:
        loss = loss_function([dict(column) for column in features])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    return step


if __name__ == "__main__":
    serve(build)
