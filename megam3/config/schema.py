"""The recipe: every field a run can set, with its unit and its source. `RunConfig` at the end joins the
sections.

Unknown keys and mistyped values stop a run before any device is touched. A field without a default is
required; `None` means off.
"""

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from megam3.config.objective import HeadWeights, ObjectiveSection, UnifiedConfig
from megam3.config.section import Section, Seed

MAX_STEPS = 10**9
"""Longest run: thirty years of one step a second. Whoever writes more has mistyped it."""
MAX_EPOCHS = 1e6
MAX_TIMEOUT_SECONDS = 1e7
"""Four months; waits of the operating system overflow at about 9e9 seconds."""


class ModelConfig(Section):
    """The encoder and its heads."""

    path: str
    """Hugging Face folder of the encoder; heads are read from `colbert_linear.pt` and `sparse_linear.pt`
    beside it when they are there."""
    missing_heads: Literal["error", "init"] = "error"
    """What to do when the folder has no head weights: refuse, or start heads from scratch."""
    multi_vector_dim: PositiveInt | None = None
    """Width C of the multi-vector head; None: the encoder's hidden size."""
    lexical_init_bias: float = 0.3
    """Bias of a lexical head started from scratch (its weight starts at 0): every token starts alive with
    this weight."""
    hidden_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Overrides the encoder's dropout probability; None: the encoder's own."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Overrides the dropout of attention weights; above 0 the CUDA path leaves the flash kernels, which have
    none."""


class DatasetConfig(Section):
    """One training dataset: files that share a language, a task and the options below."""

    name: str
    """Shown in logs and batches."""
    paths: list[str] = Field(min_length=1)
    """JSONL (.jsonl, .jsonl.gz, .jsonl.zst), Parquet or Arrow files, directories or globs."""
    language: str = "und"
    """BCP 47 tag used when a record has no `lang` of its own."""
    task: str = "retrieval"
    """Free label; batches can be kept homogeneous in it."""
    weight: PositiveFloat = 1.0
    """Sampling weight: 2.0 serves every row twice an epoch, 0.5 half of the rows."""
    query_instruction: str = ""
    """Put before every query."""
    passage_instruction: str = ""
    """Put before every passage."""
    in_batch_negatives: bool = True
    """False: every softmax sees the query's own group only (classification-like tasks)."""
    passages_per_query: PositiveInt | None = None
    """Overrides data.passages_per_query for this dataset."""


class BucketConfig(Section):
    """One row of a batch-size table."""

    max_tokens: PositiveInt
    """Rows whose longest text has at most this many tokens belong here (and to no smaller bucket)."""
    global_queries: PositiveInt
    """Queries of one step over all ranks."""


class BatchConfig(Section):
    """How large a step is: exactly one of the first three, over all ranks."""

    global_queries: PositiveInt | None = None
    """Queries per step over all ranks."""
    global_tokens: PositiveInt | None = None
    """Token budget per step over all ranks; each length bucket takes as many queries as fit."""
    buckets: list[BucketConfig] | Literal["m3_contrastive", "m3_unified"] | None = None
    """Table of queries by length bucket, or the paper's (arXiv 2402.03216, table 9)."""
    chunk_tokens: PositiveInt | None = None
    """Gradient cache: encode in chunks of at most this many tokens; None: one forward pass for the whole
    batch of a rank."""
    accumulation_steps: PositiveInt = 1
    """Batches whose gradients are averaged into one optimizer step; each keeps its own negatives."""


class DataConfig(Section):
    """Text in, packed batches out."""

    train: list[DatasetConfig] = Field(min_length=1)
    """Training datasets."""
    batch: BatchConfig
    """Batch size."""
    store_dir: str | None = None
    """Tokenised store; None: a folder beside the run. Prepared on first use, checked afterwards."""
    query_max_tokens: PositiveInt = 512
    """Longer queries are truncated, special tokens included, and counted."""
    passage_max_tokens: PositiveInt = 8192
    """Longer passages are truncated, special tokens included, and counted."""
    passages_per_query: PositiveInt = 8
    """Passages of a group: one positive and this many minus one negatives; a record with fewer negatives
    gives a smaller group."""
    homogeneous_by: Literal["dataset", "language", "task"] = "dataset"
    """What all rows of a batch share, besides their length bucket."""
    length_buckets: list[PositiveInt] = Field(default=[500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192])
    """Upper edges (tokens of a row's longest text) of the length buckets when `batch.buckets` gives none."""
    language_temperature: PositiveFloat = 1.0
    """Languages are sampled in proportion to rows ** (1 / temperature); 1 keeps the data's own shares."""
    segment_shuffle_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that a long passage is cut in three and reordered (arXiv 2402.03216, section 3.4:
    0.002)."""
    segment_shuffle_min_tokens: PositiveInt = 512
    """Passages shorter than this are never shuffled."""
    pack_texts_tokens: PositiveInt | None = None
    """Pretraining on texts: join short texts of a batch into sequences of at most this many tokens; None: one
    sequence per text."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Stop at the first bad record, or skip and keep it in a side file."""
    max_bad_records: NonNegativeInt = 1000
    """With `skip`: stop all the same after this many."""
    num_workers: NonNegativeInt = 1
    """Background processes per rank that build batches; 0: in the training process."""
    prefetch_batches: PositiveInt = 4
    """Batches held ready per rank."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat
    """Peak learning rate of the encoder."""
    head_lr: PositiveFloat | None = None
    """Peak learning rate of the heads; None: `lr`."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's moment decays."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay; never applied to biases and norms."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of all steps spent warming up linearly."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after the warm-up."""
    clip_norm: PositiveFloat | None = 1.0
    """Global gradient norm is clipped to this; None: off."""


class EngineConfig(Section):
    """Memory strategy and precision."""

    template: str = "zero2"
    """Name of a file in ds_configs/ (without .json) or a path: memory strategy only. zero2 is the lowest
    stage that sums the gradients of several backward passes in fp32 under bf16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one; the CPU only where neither Slurm nor the machine has a GPU to
    offer."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass."""
    activation_offload: bool = False
    """Keep the checkpointed layer inputs in host memory; needs activation_checkpointing."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient stops the run, or skips the step; it never reaches the weights."""
    max_skipped_steps: PositiveInt = 10
    """With `skip`: stop all the same after this many skipped steps in a row."""


class TrainConfig(Section):
    """How long, and what is written when."""

    steps: PositiveInt | None = Field(default=None, le=MAX_STEPS)
    """Optimizer steps; exactly one of `steps` and `epochs`."""
    epochs: PositiveFloat | None = Field(default=None, le=MAX_EPOCHS)
    """Passes over the data; turned into steps before the first one."""
    seed: Seed = 42
    """Batches, dropout and initial heads are functions of it."""
    log_every_steps: PositiveInt = 10
    """A line in log.txt, metrics.jsonl and TensorBoard."""
    save_every_steps: PositiveInt | None = None
    """A checkpoint; None: by `save_every_minutes` and at the end."""
    save_every_minutes: PositiveFloat | None = 20.0
    """A checkpoint when the last one (or the start) is this old, at the end of a step; None: off."""
    keep_checkpoints: PositiveInt = 3
    """Older complete checkpoints are removed. The one last written and the one continued from always stay."""
    keep_every_steps: PositiveInt | None = None
    """Besides those, keep every checkpoint whose step is a multiple of this; None: no more."""
    evaluate_every_steps: PositiveInt | None = None
    """Five-mode evaluation of `evaluation.folders`; None: only when asked for."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the run's newest complete checkpoint when there is one, on any number of ranks and
    at any ZeRO stage."""
    resume_step: PositiveInt | None = None
    """Go back to this checkpoint; newer ones are renamed and no longer count. None: the newest."""
    timeout_seconds: PositiveFloat = Field(default=1800.0, le=MAX_TIMEOUT_SECONDS)
    """A run that makes no progress for so long ends with a message that names rank, step and phase."""
    resume_with_other_data: bool = False
    """Continue at the checkpoint's step although tokenizer, data or plan changed; False: refuse, and name
    what changed."""
    dead_head_share: float = Field(default=0.001, ge=0, lt=1)
    """Warn when a smaller share of lexical weights than this is above zero."""


class EvaluationConfig(Section):
    """Five-mode evaluation on BEIR-format folders (corpus.jsonl, queries.jsonl, qrels/)."""

    folders: list[str] = []
    """One folder per test set."""
    split: str = "test"
    """qrels/SPLIT.tsv."""
    query_max_tokens: PositiveInt = 512
    """Longer queries are truncated."""
    passage_max_tokens: PositiveInt = 8192
    """Longer passages are truncated."""
    batch_tokens: PositiveInt = 32768
    """Tokens per encoding batch."""
    weights: HeadWeights = HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
    """Weights of the heads in Dense+Sparse and All."""
    rerank_dense: PositiveInt = 200
    """Multi-vec re-ranks this many of Dense's best (arXiv 2402.03216, section 4.1)."""
    rerank_hybrid: PositiveInt = 1000
    """Dense+Sparse and All re-rank this many of Dense's and of Sparse's best."""


class RunConfig(Section):
    """One run: what `megam3 show-config` prints and `recipe.yaml` in the run folder holds."""

    name: str
    """Name of the run folder."""
    output_dir: str = "runs"
    """Where run folders are made."""
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveSection = UnifiedConfig()
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    @property
    def store_dir(self) -> Path:
        """The tokenised store of the training data."""
        return Path(self.data.store_dir) if self.data.store_dir else self.run_dir / "store"
