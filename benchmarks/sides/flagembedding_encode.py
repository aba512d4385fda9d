"""`BGEM3FlagModel.encode`, all three outputs. Runs in its own environment. Spec: model_folder, texts,
max_tokens, batch_size."""

from FlagEmbedding import BGEM3FlagModel

from benchmarks.worker import Step, serve


def build(spec: dict) -> Step:
    """One step encodes all texts, tokenising included."""
    model = BGEM3FlagModel(spec["model_folder"], use_fp16=False, devices="cpu")

    def step() -> dict:
        encoded = model.encode(
            spec["texts"],
            batch_size=spec["batch_size"],
            max_length=spec["max_tokens"],
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )
        return {
            "dense": float(encoded["dense_vecs"][:, 0].sum()),
            "lexical": float(sum(sum(weights.values()) for weights in encoded["lexical_weights"])),
            "multi_vector": float(sum(rows[:, 0].sum() for rows in encoded["colbert_vecs"])),
        }

    return step


if __name__ == "__main__":
    serve(build)
