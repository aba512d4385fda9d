"""One RetroMAE step of FlagEmbedding: its collator, its model class. Runs in its own environment.

The last release with `retromae_pretrain` is 1.2.11; its three files are loaded from the unpacked source
distribution (`source`), since the rest of that release does not import with today's transformers.

Spec: model_folder, texts (strings), max_tokens, source; optional threads.
"""

import importlib.util
import sys
import time
import types
from pathlib import Path

import torch
import transformers.modeling_utils
import transformers.pytorch_utils
from transformers import AutoTokenizer

from benchmarks.worker import Step, serve


def _load(source: str) -> tuple[type, type]:
    """Collator and model class of the release in folder `source`, unchanged."""
    # the release imports these from where transformers had them until 4.4x
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(transformers.modeling_utils, name, getattr(transformers.pytorch_utils, name))
    folder = Path(source) / "FlagEmbedding" / "baai_general_embedding" / "retromae_pretrain"
    package = types.ModuleType("retromae_pretrain")
    package.__path__ = [str(folder)]
    sys.modules["retromae_pretrain"] = package
    found = {}
    for name in ("utils", "arguments", "enhancedDecoder", "data", "modeling"):
        spec = importlib.util.spec_from_file_location(f"retromae_pretrain.{name}", folder / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found[name]
        spec.loader.exec_module(found[name])
    return found["data"].RetroMAECollator, found["modeling"].RetroMAEForPretraining


def build(spec: dict) -> Step:
    """Collator and model with the shares of its published command line (0.3 and 0.5)."""
    collator_class, model_class = _load(spec["source"])
    folder = spec["model_folder"]
    collator = collator_class(
        AutoTokenizer.from_pretrained(folder),
        encoder_mlm_probability=0.3,
        decoder_mlm_probability=0.5,
        max_seq_length=spec["max_tokens"],
    )
    model = model_class.from_pretrained(None, folder, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> dict:
        started = time.perf_counter()
        batch = collator(spec["texts"])
        collated = time.perf_counter() - started
        loss = model(**batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {
            "loss": float(loss.detach()),
            "collate_seconds": collated,
            "tokens": int(batch["encoder_attention_mask"].sum()),
            "hidden": int((batch["encoder_labels"] != -100).sum()),
            "decoded": int((batch["decoder_labels"] != -100).sum()),
        }

    return step


if __name__ == "__main__":
    serve(build)
