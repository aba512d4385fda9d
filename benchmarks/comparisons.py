"""Every comparison by name: which sides, on which texts, and the budget each ratio is held against."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.environments import python_of
from benchmarks.measure import RESULTS, Measured, Ratio, Side, ratio, run_interleaved
from benchmarks.models import ModelSize, make_model_folder
from benchmarks.texts import Texts, equal_lengths, lognormal_lengths, long_tailed_lengths, xquad_like_lengths

SMALL_VOCABULARY, XLMR_VOCABULARY = 16_000, 250_002


@dataclass(frozen=True)
class Budget:
    """A ratio's bound: at least (`>=`) or at most (`<=`) `bound`."""

    sign: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether the value keeps it."""
        return value >= self.bound if self.sign == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.sign == '>=' else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Finding:
    """One line of the summary."""

    what: str
    value: float
    text: str
    budget: Budget | None = None


@dataclass(frozen=True)
class Setting:
    """One run of several sides, and what it showed."""

    name: str
    num_tokens: int
    """Real tokens a step; 0 where tokens mean nothing."""
    measured: list[Measured]
    findings: list[Finding] = field(default_factory=list)
    note: str = ""


def passages_to_512(count: int) -> tuple[int, ...]:
    """Web passages cut at 512 tokens: median 150, one in sixteen at the limit."""
    return lognormal_lengths(count, 150, 0.8, 16, 512)


def questions(count: int) -> tuple[int, ...]:
    """About 16 tokens each."""
    return xquad_like_lengths(count, 0)[0]


def spec_of(size: ModelSize, texts: Texts, **options) -> dict:
    """What most sides need: weights, texts, options."""
    return {
        "model_folder": str(make_model_folder(RESULTS / "models", size)),
        "texts": texts.as_json(),
        **options,
    }


def ours(name: str, module: str, spec: dict) -> Side:
    """A side in megam3's own environment."""
    return Side(name, module, spec, sys.executable)


def seconds_of(measured: Measured, clock: str = "seconds") -> list[float]:
    """Of every kept step: wall seconds, or `cpu_seconds`, which a busy machine disturbs less."""
    return [sample[clock] for sample in measured.samples]


def speed_finding(what: str, slow: Measured, fast: Measured, budget: Budget | None) -> list[Finding]:
    """How many times faster `fast` is; nothing when a side died."""
    if slow.death or fast.death:
        return [
            Finding(f"{what}: {m.side.name} died ({m.death})", float("nan"), "–", budget)
            for m in (slow, fast)
            if m.death
        ]
    quotient: Ratio = ratio(seconds_of(slow), seconds_of(fast))
    in_cpu_time = ratio(seconds_of(slow, "cpu_seconds"), seconds_of(fast, "cpu_seconds"))
    return [Finding(what, quotient.median, f"{quotient}; in CPU time {in_cpu_time.median:.2f}×", budget)]


def memory_findings(what: str, ours_: Measured, theirs: Measured, budget: Budget | None) -> list[Finding]:
    """Our peak over theirs: of the whole process, and of what a step needs beyond the loaded model."""
    if ours_.death or theirs.death:
        return []
    whole, step = (
        ours_.peak_rss_bytes / theirs.peak_rss_bytes,
        ours_.step_memory_bytes / max(1, theirs.step_memory_bytes),
    )
    return [
        Finding(f"{what}: peak memory of the process, ours / theirs", whole, f"{whole:.2f}", budget),
        Finding(f"{what}: the same without libraries and loaded weights", step, f"{step:.2f}", None),
    ]


def loss_finding(what: str, first: Measured, second: Measured) -> list[Finding]:
    """Largest relative difference of the losses, step by step from equal weights, where they must agree."""
    if first.death or second.death:
        return []
    pairs = zip((s["loss"] for s in first.samples), (s["loss"] for s in second.samples))
    worst = max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)
    return [
        Finding(
            f"{what}: largest relative difference of the losses", worst, f"{worst:.1e}", Budget("<=", 1e-4)
        )
    ]


def flagembedding(repeats: int) -> list[Setting]:
    """(a) the unified step against FlagEmbedding 1.4.2."""
    python = python_of("flagembedding")
    at_16k, at_250k, small, larger = Budget(">=", 8), Budget(">=", 30), (2, 128), (4, 256)
    equal = Texts(equal_lengths(4, 64), equal_lengths(16, 512), 0)
    mixed = Texts(questions(8), passages_to_512(32), 0)
    mixed_half = Texts(questions(4), passages_to_512(16), 0)
    tailed = Texts(questions(2), long_tailed_lengths(4), 0)
    cases = [
        ("mixed lengths to 512", SMALL_VOCABULARY, small, mixed, at_16k, 512),
        ("mixed lengths to 512", SMALL_VOCABULARY, larger, mixed, at_16k, 512),
        ("equal lengths 512", SMALL_VOCABULARY, larger, equal, at_16k, 512),
        ("long tail to 8192", SMALL_VOCABULARY, small, tailed, None, 8192),
        ("mixed lengths to 512", XLMR_VOCABULARY, small, mixed_half, at_250k, 512),
        ("mixed lengths to 512", XLMR_VOCABULARY, larger, mixed_half, at_250k, 512),
        ("equal lengths 512", XLMR_VOCABULARY, larger, equal, at_250k, 512),
    ]
    settings = []
    for lengths, vocab_size, (layers, hidden), shape, budget, max_tokens in cases:
        size = ModelSize(vocab_size, layers, hidden, max_tokens)
        texts = Texts(shape.query_lengths, shape.passage_lengths, vocab_size)
        spec = spec_of(size, texts)
        sides = [
            ours("megam3", "megam3_step", spec),
            Side("FlagEmbedding", "flagembedding_step", spec, python),
        ]
        name = f"{lengths}, {size.label}"
        few = repeats if vocab_size == SMALL_VOCABULARY and max_tokens == 512 else min(3, repeats)
        if vocab_size == SMALL_VOCABULARY and max_tokens == 512:
            # where the encoder's activations are most of it, memory is the gradient cache's business
            sides.append(ours("megam3, chunks", "megam3_step", {**spec, "chunk_tokens": 1024}))
        megam3, peer, *cached = measured = run_interleaved(
            f"flagembedding-{size.name}-{lengths.split()[0]}", sides, few
        )
        findings = speed_finding(f"unified step vs FlagEmbedding: {name}", peer, megam3, budget)
        findings += memory_findings(f"FlagEmbedding: {name}", megam3, peer, Budget("<=", 0.2))
        for side in cached:
            findings += speed_finding(f"the same in chunks of 1024 tokens: {name}", peer, side, None)
            findings += memory_findings(
                f"FlagEmbedding, ours in chunks of 1024 tokens: {name}", side, peer, Budget("<=", 0.2)
            )
        if lengths.startswith("equal"):
            findings += loss_finding(f"FlagEmbedding: {name}", megam3, peer)
        settings.append(Setting(name, _tokens(texts), measured, findings))
    return settings


def sentence_transformers(repeats: int) -> list[Setting]:
    """(b) the unified step (three heads) against sentence-transformers 6.2 training one head, both with a
    gradient cache of 2048 tokens."""
    python = python_of("sentence-transformers")
    size = ModelSize(SMALL_VOCABULARY, 4, 256)
    texts = Texts(*xquad_like_lengths(16, 32), size.vocab_size)
    spec = spec_of(size, texts, mini_batch_tokens=2048)
    heads = ("dense", "multi_vector", "sparse")
    sides = [ours("megam3", "megam3_step", {**spec, "chunk_tokens": 2048})]
    sides += [
        Side(f"ST-{head}", "sentence_transformers_step", {**spec, "head": head}, python) for head in heads
    ]
    megam3, *peers = measured = run_interleaved("sentence-transformers", sides, repeats)
    budget = Budget(">=", 1.5)
    findings = [
        f
        for peer in peers
        for f in speed_finding(f"three heads vs {peer.side.name} alone, XQuAD-like", peer, megam3, budget)
    ]
    return [Setting(f"XQuAD-like lengths, {size.label}", _tokens(texts), measured, findings)]


def packed(repeats: int) -> list[Setting]:
    """(c) the packed encoder against the same encoder padded."""
    xquad, tailed = xquad_like_lengths(32, 32), long_tailed_lengths(6)
    cases = [
        ("XQuAD-like lengths", ModelSize(SMALL_VOCABULARY, 4, 256, 1024), *xquad, Budget(">=", 1.8)),
        ("long tail to 8192", ModelSize(SMALL_VOCABULARY, 2, 128, 8192), (), tailed, Budget(">=", 2.5)),
        (
            "equal lengths 512",
            ModelSize(SMALL_VOCABULARY, 4, 256),
            (),
            equal_lengths(8, 512),
            Budget(">=", 0.97),
        ),
    ]
    settings = []
    for lengths, size, query_lengths, passage_lengths, budget in cases:
        texts = Texts(query_lengths, passage_lengths, size.vocab_size)
        sides = [
            ours(layout, "encoder", spec_of(size, texts, layout=layout)) for layout in ("packed", "padded")
        ]
        few = min(3, repeats) if size.max_tokens == 8192 else repeats
        ours_, theirs = measured = run_interleaved(f"packed-{lengths.split()[0]}", sides, few)
        findings = speed_finding(f"packed vs padded encoder: {lengths}", theirs, ours_, budget)
        findings += loss_finding(f"packed vs padded encoder: {lengths}", ours_, theirs)
        settings.append(Setting(f"{lengths}, {size.label}", _tokens(texts), measured, findings))
    return settings


def loss_share(repeats: int) -> list[Setting]:
    """(d) three heads and all losses, as a share of the encoder's forward and backward pass."""
    size = ModelSize(SMALL_VOCABULARY, 4, 256)
    texts = Texts(equal_lengths(4, 64), equal_lengths(16, 512), size.vocab_size)
    (measured,) = run_interleaved(
        "loss-share", [ours("objective", "loss_share", spec_of(size, texts))], repeats
    )
    share = ratio([s["seconds"] for s in measured.samples], [s["encoder_seconds"] for s in measured.samples])
    text = f"{share.median - 1:.1%} ({share.lowest - 1:.1%}–{share.highest - 1:.1%})"
    finding = Finding(
        "heads and losses / encoder, 16 passages of 512", share.median - 1, text, Budget("<=", 0.15)
    )
    return [Setting(f"equal lengths 512, {size.label}", _tokens(texts), [measured], [finding])]


def maxsim(repeats: int) -> list[Setting]:
    """(e) MaxSim forward and backward against one plain product of the same rows."""
    settings = []
    for width in (256, 1024):
        sizes = {"num_queries": 16, "query_rows": 32, "num_passages": 64, "passage_rows": 512, "width": width}
        sides = [ours(work, "maxsim", {**sizes, "work": work}) for work in ("maxsim", "matmul")]
        ours_, yardstick = measured = run_interleaved(f"maxsim-{width}", sides, 3 * repeats, warmups=2)
        findings = speed_finding(
            f"MaxSim forward+backward / one matmul, width {width}", ours_, yardstick, Budget("<=", 2.5)
        )
        settings.append(
            Setting(f"16 × 32 query rows, 64 × 512 passage rows, width {width}", 0, measured, findings)
        )
    return settings


def gradient_cache(repeats: int) -> list[Setting]:
    """(f) the same step with and without the gradient cache."""
    size = ModelSize(SMALL_VOCABULARY, 4, 256)
    texts = Texts(equal_lengths(4, 64), equal_lengths(32, 512), size.vocab_size)
    spec = spec_of(size, texts)
    sides = [
        ours("cached", "megam3_step", {**spec, "chunk_tokens": 2048}),
        ours("uncached", "megam3_step", spec),
    ]
    cached, uncached = measured = run_interleaved("gradient-cache", sides, repeats)
    findings = speed_finding(
        "gradient cache (chunks of 2048 tokens) / one pass: time", cached, uncached, Budget("<=", 1.4)
    )
    findings += memory_findings("gradient cache / one pass", cached, uncached, None)
    findings += loss_finding("gradient cache / one pass", cached, uncached)
    return [Setting(f"equal lengths 512, {size.label}", _tokens(texts), measured, findings)]


def ranks(repeats: int) -> list[Setting]:
    """(g) two ranks against one, the same work and one core a rank; beside them two runs of one rank, which
    share the machine alone."""
    size = ModelSize(SMALL_VOCABULARY, 4, 256)
    texts = Texts(equal_lengths(4, 64), equal_lengths(8, 512), size.vocab_size)
    settings = []
    for stage in (0, 1):
        spec = spec_of(size, texts, threads=1, stage=stage)
        cases = [("one-rank", 1, True), ("two-ranks", 2, True), ("two-runs", 2, False)]
        sides = [
            ours(name, "megam3_step", {**spec, "num_processes": count, "talk": talk})
            for name, count, talk in cases
        ]
        one, two, apart = measured = run_interleaved(f"ranks-zero{stage}", sides, repeats)
        findings = speed_finding(f"two ranks, share of linear, ZeRO {stage}", one, two, Budget(">=", 0.85))
        findings += speed_finding("two runs of one rank at once, share of linear", one, apart, None)
        findings += speed_finding("two ranks / two runs of one rank at once", apart, two, None)
        settings.append(
            Setting(f"equal lengths 512, {size.label}, ZeRO {stage}", _tokens(texts), measured, findings)
        )
    return settings


def peak_share(repeats: int) -> list[Setting]:
    """(h) share of the matmul peak, measured before and after each pass, that the packed encoder and
    transformers' own reach."""
    settings = []
    for hidden, layers, count, bound in ((1024, 2, 4, 0.90), (384, 4, 8, 0.75)):
        size = ModelSize(SMALL_VOCABULARY, layers, hidden)
        texts = Texts((), equal_lengths(count, 512), size.vocab_size)
        for threads in (1, None):
            spec = spec_of(size, texts, peak=True, threads=threads)
            sides = [ours(layout, "encoder", {**spec, "layout": layout}) for layout in ("packed", "padded")]
            measured = run_interleaved(f"peak-{hidden}-{threads or 'all'}", sides, repeats)
            on = f"hidden {hidden}, {'one thread' if threads else 'all threads'}"
            findings = [_peak_finding(f"share of the matmul peak, {on}", measured[0], Budget(">=", bound))]
            findings += [_peak_finding(f"the same, {on}, transformers' own padded model", measured[1], None)]
            settings.append(
                Setting(f"equal lengths 512, {size.label}, {on}", _tokens(texts), measured, findings)
            )
    return settings


def _peak_finding(what: str, measured: Measured, budget: Budget | None) -> Finding:
    shares = sorted(sample["peak_share"] for sample in measured.samples)
    # the fastest pass over the fastest product: what is left when the machine's bad moments are taken out of
    # both
    best = min(s["peak_share"] * s["seconds"] for s in measured.samples) / min(
        s["seconds"] for s in measured.samples
    )
    median = measured.median("peak_share")
    return Finding(
        what,
        median,
        f"{median:.0%} ({shares[0]:.0%}–{shares[-1]:.0%}); best pass over best product {best:.0%}",
        budget,
    )


def long_step(repeats: int) -> list[Setting]:
    """One step of 1 query × 8 passages of 8192 tokens, XLM-R's vocabulary, hidden 1024: ours, then
    FlagEmbedding's attempt."""
    size = ModelSize(XLMR_VOCABULARY, 2, 1024, 8192)
    texts = Texts((512,), equal_lengths(8, 8192), size.vocab_size)
    spec = spec_of(size, texts)
    limit = {"address_space_bytes": 20 << 30}
    sides = [
        ours("megam3", "megam3_step", {**spec, **limit, "chunk_tokens": 8192, "checkpointing": True}),
        Side(
            "FlagEmbedding",
            "flagembedding_step",
            {**spec, **limit, "checkpointing": True},
            python_of("flagembedding"),
        ),
    ]
    megam3, _ = measured = run_interleaved("long-step", sides, 1, warmups=0, one_at_a_time=True)
    peak = megam3.peak_rss_bytes / 2**30
    finding = Finding(
        "8192-token step: peak memory of our process in GiB", peak, f"{peak:.1f}", Budget("<=", 12)
    )
    note = (
        "Both processes may map 20 GiB and checkpoint layers; ours has the gradient cache on,"
        " one passage a chunk."
    )
    return [Setting(f"1 query × 8 passages of 8192, {size.label}", _tokens(texts), measured, [finding], note)]


def _tokens(texts: Texts) -> int:
    return sum(texts.query_lengths) + sum(texts.passage_lengths)


COMPARISONS: dict[str, Callable[[int], Sequence[Setting]]] = {
    "flagembedding": flagembedding,
    "sentence_transformers": sentence_transformers,
    "packed": packed,
    "loss_share": loss_share,
    "maxsim": maxsim,
    "gradient_cache": gradient_cache,
    "ranks": ranks,
    "peak_share": peak_share,
    "long_step": long_step,
}
"""By name; `long_step` takes minutes and 12 GB and runs only when it is named."""
DEFAULT = tuple(name for name in COMPARISONS if name != "long_step")
