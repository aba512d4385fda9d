"""What is measured: a piece is one process (or one a GPU), one line of the results and one row of the table.

Everything is a function of the node (its GPUs) and of `tiny`, so an interrupted run finds its place by name.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.models import ModelSize

BGE_M3 = ModelSize(vocab_size=250_002, num_layers=24, hidden_size=1024, max_tokens=8192)
TINY = ModelSize(vocab_size=300, num_layers=2, hidden_size=64, max_tokens=128)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One measurement; `spec` is what `benchmarks.gpu.MODULE` receives."""

    name: str
    module: Literal["step", "maxsim", "peer"]
    spec: dict[str, Any]
    num_gpus: int = 1
    environment: str = ""
    """Of benchmarks/environments.py, where a peer's package is; empty: megam3's own."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """A unified training step of one rank."""

    stage: int
    query_tokens: int
    passage_tokens: int
    num_queries: int
    passages_per_query: int
    checkpointing: bool = False
    activation_offload: bool = False
    chunk_tokens: int | None = None
    grow: bool = False
    """Double the queries until the device's memory ends, and report the last that ran."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Texts of one column of the table."""

    query_tokens: int
    passage_tokens: int
    num_queries: int
    passages_per_query: int

    @property
    def name(self) -> str:
        """Names pieces."""
        return f"{self.passage_tokens}"


FULL_LENGTHS = (
    # 512: the length most finetuning runs use, 16 × 9 texts keep a GPU busy
    Lengths(query_tokens=512, passage_tokens=512, num_queries=16, passages_per_query=8),
    # 8192: the step that issue reports of other trainers call impossible in 80 GB, 1 query × 8 passages
    Lengths(query_tokens=512, passage_tokens=8192, num_queries=1, passages_per_query=8),
)
TINY_LENGTHS = (
    Lengths(query_tokens=8, passage_tokens=16, num_queries=2, passages_per_query=2),
    Lengths(query_tokens=8, passage_tokens=96, num_queries=1, passages_per_query=2),
)

STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "checkpointing, offload": {"checkpointing": True, "activation_offload": True},
    "gradient cache": {"chunks": True},
    "gradient cache, checkpointing": {"chunks": True, "checkpointing": True},
    "gradient cache, checkpointing, offload": {
        "chunks": True,
        "checkpointing": True,
        "activation_offload": True,
    },
}
"""Every memory strategy of a recipe that one GPU can show; ZeRO's stages need several."""


def list_pieces(num_gpus: int, tiny: bool, has_device: bool) -> list[Piece]:
    """All pieces of a node, cheapest questions first."""
    pieces = list(_steps(tiny, has_device))
    # 1, 2, 4 … and all of them
    counts = sorted({1, num_gpus, *(2**k for k in range(num_gpus.bit_length()) if 2**k <= num_gpus)})
    lengths = (TINY_LENGTHS if tiny else FULL_LENGTHS)[0]
    for count in counts:
        for stage in (1, 2, 3):
            spec = asdict(StepSpec(stage=stage, checkpointing=True, **asdict(lengths)))
            name = f"ZeRO {stage}, {count} GPUs, {lengths.name} tokens"
            pieces.append(Piece(name=name, module="step", spec=spec, num_gpus=count))
    rows, passages = (16, 4) if tiny else (512, 256)
    for width in (32, 64) if tiny else (128, 1024):
        spec = {
            "num_queries": 4,
            "query_rows": rows // 4,
            "num_passages": passages,
            "passage_rows": rows,
            "width": width,
        }
        pieces.append(Piece(name=f"MaxSim, C = {width}", module="maxsim", spec=spec))
        for package in ("flash-maxsim", "late-interaction-kernels"):
            name = f"MaxSim, C = {width}: {package}"
            given = {**spec, "package": package}
            pieces.append(Piece(name=name, module="peer", spec=given, environment=package))
    return [*pieces, *_peer_steps(tiny)]


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "FlagEmbedding, three heads": ("flagembedding", {"side": "flagembedding_step"}),
    "sentence-transformers, cached, dense": (
        "sentence-transformers",
        {"side": "sentence_transformers_step", "head": "dense"},
    ),
    "sentence-transformers, cached, multi-vector": (
        "sentence-transformers",
        {"side": "sentence_transformers_step", "head": "multi_vector"},
    ),
    "sentence-transformers, cached, SPLADE": (
        "sentence-transformers",
        {"side": "sentence_transformers_step", "head": "sparse"},
    ),
    "NeMo AutoModel, dense": ("nemo-automodel", {"side": "nemo_automodel_step"}),
    "pylate, cached, multi-vector": ("pylate", {"side": "pylate_step"}),
}
"""Training steps of other libraries on the same model and texts: environment, and what their side is asked
for."""


def _peer_steps(tiny: bool) -> Iterator[Piece]:
    """Cached losses take a quarter of the step at a time, as megam3's gradient cache does; the others
    checkpoint their layers where texts are long."""
    size = TINY if tiny else BGE_M3
    for lengths in TINY_LENGTHS if tiny else FULL_LENGTHS:
        total = lengths.num_queries * (
            lengths.query_tokens + lengths.passages_per_query * lengths.passage_tokens
        )
        chunk = max(lengths.passage_tokens, total // 4)
        for name, (environment, asked) in PEERS.items():
            spec = {
                **asdict(lengths),
                **asked,
                "vocab_size": size.vocab_size,
                "mini_batch_tokens": chunk,
                "mini_batch_texts": max(1, chunk // lengths.passage_tokens),
                "checkpointing": lengths.passage_tokens > 4096,
            }
            title = f"peer: {name}, {lengths.name} tokens"
            yield Piece(name=title, module="peer", spec=spec, environment=environment)


def _steps(tiny: bool, has_device: bool) -> Iterator[Piece]:
    for lengths in TINY_LENGTHS if tiny else FULL_LENGTHS:
        for name, options in STRATEGIES.items():
            if options.get("activation_offload") and not has_device:
                # on a CPU the layers' inputs are where they would go already
                continue
            chosen = dict(options)
            # a chunk holds a quarter of the step, and never less than one text
            total = lengths.num_queries * (
                lengths.query_tokens + lengths.passages_per_query * lengths.passage_tokens
            )
            if chosen.pop("chunks", False):
                chosen["chunk_tokens"] = max(lengths.passage_tokens, total // 4)
            spec = StepSpec(stage=1, **asdict(lengths), **chosen)
            yield Piece(name=f"{name}, {lengths.name} tokens", module="step", spec=asdict(spec))
            largest = asdict(spec) | {"grow": True, "num_queries": 1}
            yield Piece(name=f"largest batch: {name}, {lengths.name} tokens", module="step", spec=largest)
