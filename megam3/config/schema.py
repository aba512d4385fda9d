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

from megam3.config.objective import HeadName, ObjectiveSection, UnifiedConfig
from megam3.config.section import Section, Seed
from megam3.config.weights import HeadWeights
from megam3.encoders import Direction
from megam3.instructions import Instructions, instructions_of
from megam3.reading import Pooling
from megam3.token_layers import Activation

MAX_STEPS = 10**9
"""Longest run: thirty years of one step a second. Whoever writes more has mistyped it."""
MAX_EPOCHS = 1e6
MAX_TIMEOUT_SECONDS = 1e7
"""Four months; waits of the operating system overflow at about 9e9 seconds."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) in the encoder, whose own weights are kept; heads train whole."""

    rank: PositiveInt = 16
    """Width of an adapter: two matrices of so many rows and columns beside each adapted one."""
    alpha: PositiveFloat | None = None
    """An adapter's product is multiplied by alpha / rank; None: the rank, so by 1 (arXiv 2106.09685, section
    4.1, fixes alpha at the first rank that is tried)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what an adapter reads."""
    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Last parts of the names of the linear layers to adapt (`query`, `value` in the BERT families, `Wqkv` in
    ModernBERT); None: all linear layers of the encoder, whatever its family calls them: what it took to reach
    full finetuning in arXiv 2305.14314, section 4."""

    @property
    def scaled_alpha(self) -> float:
        """alpha, or what stands for it."""
        return float(self.rank) if self.alpha is None else self.alpha


class ModelConfig(Section):
    """The encoder and its heads."""

    path: str
    """Hugging Face folder of the encoder; heads are read from `colbert_linear.pt` and `sparse_linear.pt`
    beside it when they are there."""
    missing_heads: Literal["error", "init"] = "error"
    """What to do when the folder has no head weights: refuse, or start heads from scratch."""
    multi_vector_dim: PositiveInt | None = None
    """Width C of the multi-vector head; None: what the folder says, else the encoder's hidden size. 128 or
    less keeps an index small: PyLate's default, and mLateOn's (arXiv 2607.27178)."""
    multi_vector_hidden: PositiveInt | None = None
    """Width H of a residual block D → H → D before the multi-vector projection, as in mLateOn (arXiv
    2607.27178: 768 → 1536 → 768 → 128); None: what the folder says, else none. Export such a head as `pylate`
    or `multi-vector`: the published layout has one matrix."""
    multi_vector_activation: Activation | None = None
    """Between the two matrices of that block, each with a skip beside it: `identity` (mLateOn's), `gelu`,
    `silu` or `tanh`; None: gelu."""
    lexical_init_bias: float = 0.3
    """Bias of a lexical head started from scratch (its weight starts at 0): every token starts alive with
    this weight."""
    freeze: list[str] = []
    """Parts of the encoder that keep their weights: `encoder`, `embeddings` (all tables), `positions` (the
    position table), `layers 0..5` (encoder layers, both ends included, from the bottom). Heads are trained
    or left out by objective.heads."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the encoder in the place of its weights (needs the package peft); they are
    merged at export. None: off."""
    lexical_kind: Literal["tokens", "expansion"] | None = None
    """What the lexical head weighs: a text's own tokens (arXiv 2402.03216), or the whole vocabulary by the
    maximum of log(1 + relu(masked-LM logits)) (SPLADE-max, arXiv 2109.10086); None: what the folder's
    megam3_config.json says, else tokens. Expansion costs the products of a masked-LM stage, and wants
    `objective.sparsity`."""
    expansion_top_k: PositiveInt | None = None
    """Entries a text keeps of an expansion head's weights in evaluation and inference; None: what the
    folder's megam3_config.json says, else all above zero."""
    pooling: Pooling | None = None
    """Tokens that the dense vector is made of: `cls` the first, `mean` all, `mcls` one `<s>` every 256 tokens
    (MCLS of arXiv 2402.03216), `last` the last; None: what the folder says, else cls, and last where the
    encoder reads left to right."""
    cls_every_tokens: PositiveInt | None = Field(default=None, ge=2)
    """Under `mcls`: tokens from one `<s>` to the next; None: what the folder says, else 256."""
    attention: Direction | None = None
    """Direction of a model made left to right (Qwen 3, Llama, ...): `bidirectional` or `causal`; None: as its
    config.json says. Encoders take `bidirectional` alone."""
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
    verify_store: bool = True
    """Compare the checksums of all files of the store once a node at every start; False: only those of the
    rows, when they are read (for stores of many TB)."""
    query_max_tokens: PositiveInt = 512
    """Longer queries are truncated, special tokens included, and counted."""
    passage_max_tokens: PositiveInt = 8192
    """Longer passages are truncated, special tokens included, and counted."""
    passages_per_query: PositiveInt = 8
    """Passages of a group: one positive and this many minus one negatives; a record with fewer negatives
    gives a smaller group."""
    positives_per_query: PositiveInt = 1
    """Positives drawn of a record that has so many; each is a column of its own beside passages_per_query - 1
    negatives. InfoNCE: the mean over a query's drawn positives, each told from the negatives alone (L_out of
    arXiv 2004.11362, equation 2, without other positives in the denominator)."""
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
    lexical_lr: PositiveFloat | None = None
    """Peak learning rate of the lexical (or expansion) head alone; None: `head_lr`."""
    multi_vector_lr: PositiveFloat | None = None
    """Peak learning rate of the multi-vector head alone; None: `head_lr`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """The top encoder layer trains at `lr`, each one below at this times the rate of the one above it, the
    embeddings below the lowest (arXiv 1801.06146, section 3.2, with 1/2.6 there); None: all at `lr`."""
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
    stage that sums the gradients of several backward passes in fp32 under bf16. `auto`: the fastest strategy
    that fits the device, with checkpointing, offload, gradient_reduction and, where the recipe gives none,
    data.batch.chunk_tokens."""
    gpu_memory_gib: PositiveFloat | None = None
    """For `template: auto` where no GPU is visible (a login node): memory of one GPU; None: ask the
    device."""
    gradient_reduction: Literal["auto", "every_pass", "once"] = "auto"
    """Under ZeRO 2 (and 3 in fp32): reduce gradients after every backward pass, or once a step, which sends
    less and holds the whole gradient on every rank. auto: as `template: auto` chooses, else every_pass."""
    gradient_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision in which ranks send gradients to each other. auto: the template's communication_data_type,
    else the model's precision. Sums over W ranks are rounded in it, up to log2(W) times on their way; fp32
    sends twice the bytes."""
    attention: Literal["auto", "varlen", "sdpa", "fa2", "fa3", "fa4"] = "auto"
    """auto: torch's varlen kernel where it runs, else scaled_dot_product_attention over runs of texts of
    equal length. varlen: the kernel, or no start; sdpa: the runs. fa2, fa3, fa4: FlashAttention release
    behind the kernel; auto and varlen take 3 on H100, 4 on B200, where installed, else 2, which is part of
    torch."""
    compile_layers: bool = False
    """Compile each encoder layer with torch.compile (Inductor), once for batches of every shape. Needs the
    varlen kernel and ZeRO 0, 1 or 2. Off until it is measured on a GPU."""
    adamw: Literal["auto", "fused", "plain", "deepspeed_cpu"] = "auto"
    """Who moves the weights. auto, fused: torch's AdamW in one kernel; plain: torch's, an operator at a time;
    deepspeed_cpu: DeepSpeed's for optimizer states in host memory, built by g++ at the first start."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one; the CPU only where neither Slurm nor the machine has a GPU to
    offer."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs. fp16 is for cards without bf16 (V100, T4): the loss is scaled, and
    the scale halves at each step that overflows; such steps are skipped, counted and logged."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass."""
    activation_offload: bool = False
    """Keep the checkpointed layer inputs in host memory; needs activation_checkpointing."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A non-finite loss or gradient stops the run, skips the step, or takes the run back to its newest
    checkpoint and round the data since then; it never reaches the weights."""
    max_skipped_steps: PositiveInt = 10
    """With `skip`: stop all the same after this many skipped steps in a row."""
    max_rollbacks: PositiveInt = 3
    """With `rollback`: stop all the same when the run (all its starts together) would go back once more."""


Mode = Literal["Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All"]
MODE_HEADS: dict[str, tuple[HeadName, ...]] = {
    "Dense": ("dense",),
    "Sparse": ("lexical",),
    "Multi-vec": ("dense", "multi_vector"),
    "Dense+Sparse": ("dense", "lexical"),
    "All": ("dense", "lexical", "multi_vector"),
}
"""The five modes of arXiv 2402.03216, section 4.1, and the heads that each needs."""


class MetricConfig(Section):
    """A figure of the evaluation: its mean over all of evaluation.folders. Higher is better."""

    mode: Mode = "All"
    """Retrieval mode."""
    metric: Literal["ndcg@10", "recall@100", "mrr@10"] = "ndcg@10"
    """What is measured of it."""


class EarlyStoppingConfig(MetricConfig):
    """End a run that no longer gets better."""

    patience: PositiveInt = 3
    """Evaluations in a row without gain."""
    min_gain: NonNegativeFloat = 0.0
    """A value must be above the best one before by more than this."""


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
    checkpoint_writing: Literal["async", "plain"] = "async"
    """async: steps go on while a checkpoint is written from a copy in host memory (the bytes that a rank
    writes; where they do not fit, that file is written at once). plain: training waits for the disk."""
    keep_checkpoints: PositiveInt = 3
    """Older complete checkpoints are removed. The one last written and the one continued from always stay."""
    keep_every_steps: PositiveInt | None = None
    """Besides those, keep every checkpoint whose step is a multiple of this; None: no more."""
    keep_best: MetricConfig | None = None
    """Besides those, keep the checkpoint with the best figure; each evaluation then has its checkpoint. None:
    off."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run when an evaluation figure no longer gets better; None: off."""
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
    query_instruction: str | None = None
    """Put before every query here, and carried by exports; None: what all of data.train put there, nothing
    where they differ."""
    passage_instruction: str | None = None
    """The same before every passage."""
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
    def instructions(self) -> Instructions:
        """What queries and passages get outside training: in evaluation and in exports."""
        return instructions_of(self.model_dump(include={"data": {"train"}, "evaluation": True}))

    @property
    def store_dir(self) -> Path:
        """The tokenised store of the training data."""
        return Path(self.data.store_dir) if self.data.store_dir else self.run_dir / "store"
