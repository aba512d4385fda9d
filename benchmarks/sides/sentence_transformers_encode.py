"""`SentenceTransformer.encode`: the dense vectors of the same folder. Runs in its own environment. Spec:
model_folder, texts, max_tokens, batch_size."""

from sentence_transformers import SentenceTransformer

from benchmarks.worker import Step, serve


def build(spec: dict) -> Step:
    """One step encodes all texts, tokenising included."""
    model = SentenceTransformer(spec["model_folder"], device="cpu")
    model.max_seq_length = spec["max_tokens"]

    def step() -> dict:
        dense = model.encode(spec["texts"], batch_size=spec["batch_size"], show_progress_bar=False)
        return {"dense": float(dense[:, 0].sum())}

    return step


if __name__ == "__main__":
    serve(build)
