"""`M3Embedder.encode` with its defaults. Spec: model_folder, texts, heads, max_tokens;
optional precision."""

from benchmarks.worker import Step, serve
from megam3.embedder import M3Embedder


def build(spec: dict) -> Step:
    """One step encodes all texts, tokenising included, as a user's call does."""
    embedder = M3Embedder(spec["model_folder"], device="cpu", precision=spec.get("precision", "fp32"))

    def step() -> dict:
        encoded = embedder.encode(spec["texts"], heads=spec["heads"], max_tokens=spec["max_tokens"])
        figures = {"dense": float(encoded.dense_vecs[:, 0].sum())}
        if encoded.lexical_weights is not None:
            figures["lexical"] = sum(sum(weights.values()) for weights in encoded.lexical_weights)
        if encoded.colbert_vecs is not None:
            figures["multi_vector"] = float(sum(rows[:, 0].sum() for rows in encoded.colbert_vecs))
        return figures

    return step


if __name__ == "__main__":
    serve(build)
