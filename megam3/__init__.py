"""megam3: train multilingual retrieval encoders with dense, lexical and multi-vector heads, from one CPU to
many GPUs."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`from megam3 import M3Embedder, train`, loaded on first use: torch and DeepSpeed take seconds.

    `train` is the module megam3.train, which can be called: `train("my.yaml", "optim.lr=2e-5")`.
    """
    if name == "M3Embedder":
        return importlib.import_module("megam3.embedder").M3Embedder
    if name == "train":
        return importlib.import_module("megam3.train")
    raise AttributeError(f"module 'megam3' has no attribute {name!r}")
