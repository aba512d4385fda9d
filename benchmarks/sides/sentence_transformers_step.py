"""One sentence-transformers training step of ONE head with its cached loss. Runs in its own environment.

Spec: model_folder, texts, head (dense, multi_vector or sparse), mini_batch_tokens; optional threads, device.
Its nearest to M3's lexical head is SPLADE over the masked-language-model's logits.
"""

from pathlib import Path

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseMultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from benchmarks.worker import Step, serve

SCALE = 50.0  # 1 / temperature


def _dense(folder: str, chunk: int, device: str) -> tuple[nn.Module, nn.Module]:
    transformer = Transformer(folder)
    width = transformer.get_embedding_dimension()
    model = SentenceTransformer(modules=[transformer, Pooling(width, "cls"), Normalize()], device=device)
    return model, CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_num_tokens=chunk)


def _multi_vector(folder: str, chunk: int, device: str) -> tuple[nn.Module, nn.Module]:
    transformer = Transformer(folder)
    width = transformer.get_embedding_dimension()
    head = torch.load(Path(folder) / "colbert_linear.pt", weights_only=True)
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    linear = Dense(
        width, width, activation_function=None, init_weight=head["weight"], init_bias=head["bias"], **tokens
    )
    mask = MultiVectorMask(["<s>"], skiplist_tasks=["query", "document"])
    model = MultiVectorEncoder(modules=[transformer, linear, Normalize(**tokens), mask], device=device)
    loss = CachedMultiVectorMultipleNegativesRankingLoss(
        model, scale=SCALE, similarity_fct=mean_colbert_scores, mini_batch_num_tokens=chunk
    )
    return model, loss


def _sparse(folder: str, chunk: int, device: str) -> tuple[nn.Module, nn.Module]:
    # the folder has no head over the vocabulary: a new one, the same in each run
    torch.manual_seed(0)
    model = SparseEncoder(
        modules=[Transformer(folder, transformer_task="fill-mask"), SpladePooling("max")], device=device
    )
    inner = SparseMultipleNegativesRankingLoss(model, scale=SCALE)
    return model, CachedSpladeLoss(model, inner, 3e-5, 5e-5, mini_batch_num_tokens=chunk)


HEADS = {"dense": _dense, "multi_vector": _multi_vector, "sparse": _sparse}


def build(spec: dict) -> Step:
    """Columns as its trainer hands them over: queries, positives, and one column per further passage of the
    group."""
    texts = spec["texts"]
    device = spec.get("device", "cpu")
    model, loss_function = HEADS[spec["head"]](spec["model_folder"], spec["mini_batch_tokens"], device)
    group_size = len(texts["passages"]) // len(texts["queries"])
    columns = [texts["queries"], *(texts["passages"][i::group_size] for i in range(group_size))]
    features = [
        {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in model.preprocess(column).items()
        }
        for column in columns
    ]
    model.train()
    plain = [p for p in model.parameters() if p.dim() == 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.01}],
        lr=1e-5,
        fused=True,
    )

    def step() -> dict:
        loss = loss_function([dict(column) for column in features], None)
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    return step


if __name__ == "__main__":
    serve(build)
