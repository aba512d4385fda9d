"""Frozen parts, adapters, heads and the vocabulary's products in the memory plan: what is trained against the
model, peaks against the tensors that were alive."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from megam3.batch import Progress, Representations, RetrievalBatch, TextBatch
from megam3.config.objective import PretrainConfig, UnifiedConfig
from megam3.config.schema import LoraConfig, ModelConfig
from megam3.engine.activations import ActivationMemory
from megam3.model.freeze import freeze_parameters
from megam3.model.lora import add_lora
from megam3.model.m3 import M3Model
from megam3.objectives.pretrain import PretrainObjective
from megam3.objectives.unified import UnifiedObjective
from megam3.packed_texts import pack_texts
from megam3.planning.memory import activation_bytes, state_bytes
from megam3.planning.parameters import num_parameters, num_trained
from megam3.planning.scores import loss_bytes
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.planning import kernel
from tests.planning.families import build, shape, small
from tests.planning.live_bytes import LivePeak
from tests.planning.memory_probe import shape_of
from tests.planning.test_families import DTYPES, LENGTHS, live_peak, strategy_for

FREEZE = {
    "encoder": ["encoder"],
    "embeddings": ["embeddings"],
    "below": ["embeddings", "layers 0..1"],
    "inside": ["layers 1..2"],
    "from the bottom": ["layers 0..1"],
}
LORA = {
    "all": None,
    "xlm-roberta": ["query", "value", "dense"],
    "modernbert": ["Wqkv"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "v_proj", "down_proj"],
}
FAMILIES = ("xlm-roberta", "modernbert", "qwen3", "gemma3_text")


@pytest.fixture(params=DTYPES)
def dtype(request, monkeypatch) -> torch.dtype:
    if request.param == "bf16":
        kernel.install(monkeypatch)
    return DTYPES[request.param]


def check(tmp_path, family, dtype, checkpointing, prepare, overrides, bounds):
    """Weights, trained weights and the peak of a pass, planned against the model."""
    config = small(family, 4)
    model = M3Model(build(tmp_path, config, dtype), [0, 1, 2])
    prepare(model)
    model = model.to(dtype).train()
    if checkpointing:
        ActivationMemory(model, True, False)
    planned = shape(tmp_path, config, *overrides)
    assert num_parameters(planned) == sum(p.numel() for p in model.parameters())
    assert num_trained(planned) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    strategy = strategy_for(dtype, checkpointing=checkpointing)
    peak = activation_bytes(planned, strategy, sum(LENGTHS), 100, mixed_lengths=False)
    assert bounds[0] <= peak / live_peak(model, LENGTHS) <= bounds[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", FREEZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_have_no_gradient_and_keep_less(tmp_path, family, parts, dtype, checkpointing):
    check(
        tmp_path,
        family,
        dtype,
        checkpointing,
        lambda model: freeze_parameters(model, FREEZE[parts]),
        [f"model.freeze={json.dumps(FREEZE[parts])}"],
        # without a graph what counts are a forward pass's temporaries, which are counted roughly
        (0.88, 1.12) if parts == "encoder" else (0.94, 1.06),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_trained_in_the_encoders_place(tmp_path, family, which, dtype, checkpointing):
    targets = LORA["all" if which == "all" else family]
    overrides = ["model.lora.rank=8", f"model.lora.target_modules={json.dumps(targets)}"]
    check(
        tmp_path,
        family,
        dtype,
        checkpointing,
        lambda model: add_lora(model.encoder, LoraConfig(rank=8, target_modules=targets)),
        overrides,
        (0.94, 1.09),
    )


def test_the_position_table_alone_can_be_frozen(tmp_path):
    overrides = ['model.freeze=["positions"]']
    check(
        tmp_path,
        "xlm-roberta",
        torch.float32,
        False,
        lambda model: freeze_parameters(model, ["positions"]),
        overrides,
        (0.97, 1.03),
    )


def test_a_frozen_weight_has_no_gradient_and_no_optimizer_state(tmp_path):
    config = small("xlm-roberta", 4)
    whole, heads_only = shape(tmp_path, config), shape(tmp_path, config, 'model.freeze=["encoder"]')
    strategy = Strategy(zero_stage=0)
    before, after = state_bytes(whole, strategy), state_bytes(heads_only, strategy)
    assert after["weights"] == before["weights"]
    heads = 64 + 1 + 64 * 65
    assert (after["gradients"], after["optimizer"]) == (2 * heads, 16 * heads)


def test_checkpointing_does_not_walk_through_what_is_frozen(tmp_path):
    model = M3Model(build(tmp_path, small("xlm-roberta", 4)), [0, 1, 2])
    freeze_parameters(model, ["embeddings", "layers 0..1"])
    ActivationMemory(model, True, False)
    seen = []
    for layer in model.encoder.encoder.layer:
        layer.register_forward_hook(lambda module, given, output: seen.append(output.requires_grad))
    live_peak(model.train(), LENGTHS)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize(
    ("heads", "vocabulary", "length"),
    [
        (["dense"], 300, 100),
        (["dense", "lexical"], 300, 100),
        (["dense", "lexical", "multi_vector"], 20_000, 100),
    ],
)
def test_heads_that_do_not_exist_hold_nothing(tmp_path, dtype, heads, vocabulary, length):
    config = small("xlm-roberta", 2, vocab_size=vocabulary)
    model = M3Model(build(tmp_path, config, dtype), [0, 1, 2], heads=heads).to(dtype).train()
    planned = shape(tmp_path, config, f"objective.heads={json.dumps(heads)}")
    peak = activation_bytes(planned, strategy_for(dtype), 4 * length, length, mixed_lengths=False)
    assert 0.97 <= peak / live_peak(model, [length] * 4) <= 1.04


@pytest.mark.parametrize(("vocabulary", "length"), [(300, 100), (20_000, 100), (20_000, 500)])
def test_an_expansion_head_holds_blocks_of_the_vocabulary(tmp_path, dtype, vocabulary, length):
    """The last case has two blocks."""
    config = small("xlm-roberta", 1, vocab_size=vocabulary)
    model = M3Model(build(tmp_path, config, dtype), [0, 1, 2], heads=["lexical"], expands=True)
    assert model.expansion_head is not None
    torch.nn.init.constant_(model.expansion_head.bias, -20.0)  # few pairs, as once the head is sparse
    with torch.no_grad():
        model.expansion_head.bias[5:10] = 20.0
    planned = shape(tmp_path, config, 'objective.heads=["lexical"]', "model.lexical_kind=expansion")
    assert num_parameters(planned) == sum(p.numel() for p in model.parameters())
    peak = activation_bytes(planned, strategy_for(dtype), 4 * length, length, mixed_lengths=False)
    assert 0.95 <= peak / live_peak(model.to(dtype).train(), [length] * 4) <= 1.06


class _Passes:
    """The engine as an objective sees it."""

    def __init__(self, module):
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss, is_last):
        loss.backward()


MASKED = {
    "decoder, narrow vocabulary": ({}, 600, 8, 256),
    "decoder, three chunks of logits": ({}, 16_000, 8, 256),
    "decoder, one chunk": ({}, 16_000, 3, 256),
    "decoder, few tokens: the embeddings' gradient": ({}, 16_000, 1, 16),
    "masked LM": ({"decoder": False}, 600, 8, 256),
    "bag of words": ({"bag_of_words_weight": 1.0}, 600, 8, 256),
    "bag of words, one block": ({"bag_of_words_weight": 1.0}, 16_000, 8, 64),
    "bag of words, two blocks": ({"bag_of_words_weight": 1.0}, 12_000, 12, 256),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_language_models_hold_what_is_counted(tmp_path, dtype, name):
    fields, vocabulary, num_texts, tokens = MASKED[name]
    section = PretrainConfig(**fields)
    make_tiny_model_folder(tmp_path, hidden_size=64, num_layers=1, heads=False)
    objective = PretrainObjective(section)
    model = objective.load_model(ModelConfig(path=str(tmp_path)), torch.float32)
    model.encoder.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary))
    model = model.to(dtype).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = random_token_ids([tokens] * num_texts)
    rows = torch.arange(num_texts)
    batch = TextBatch(texts=pack_texts(ids), document_offsets_N1=torch.arange(num_texts + 1), rows=rows)
    (prepared,) = objective.prepare([batch], Progress(step=0))
    with LivePeak() as live:
        objective.run(_Passes(model), prepared, Progress(step=0))
    planned = shape_of(
        model,
        heads=(),
        predictions_per_token=section.predictions_per_token(),
        has_decoder=section.has_decoder(),
        has_bag_of_words=section.has_bag_of_words(),
    )
    assert num_parameters(planned) == sum(p.numel() for p in model.parameters())
    peak = activation_bytes(planned, strategy_for(dtype), tokens * num_texts, tokens, mixed_lengths=False)
    assert 0.94 <= peak / live.peak_bytes <= 1.03


LOSSES = {
    "three heads": ({}, (256, 4, 3, 3, 16)),
    "two positives": ({}, (256, 4, 3, 3, 16)),
    "a teacher, added": ({"teacher": "kl_div"}, (256, 4, 3, 3, 16)),
    "a teacher, instead": ({"teacher": "m3_kd_loss"}, (256, 4, 3, 3, 16)),
    "dense alone": ({"heads": ["dense"], "preset": "joint"}, (256, 4, 3, 3, 16)),
    "both directions": (
        {"heads": ["dense"], "preset": "joint", "both_directions": True},
        (256, 4, 3, 3, 16),
    ),
    "four dimensions": (
        {"heads": ["dense"], "preset": "joint", "matryoshka_dims": [2, 4, 8, 12]},
        (256, 4, 3, 3, 16),
    ),
    "dense and lexical": ({"heads": ["dense", "lexical"]}, (256, 4, 3, 3, 16)),
    "MaxSim's backward pass": ({}, (64, 4, 32, 32, 32)),
    "score matrices": ({}, (512, 2, 2, 9, 16)),
    "long passages": ({}, (16, 8, 64, 128, 64)),
}
"""Fields of the objective; queries, passages a query, tokens of a query and of a passage, width."""


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_over_all_texts_holds_what_is_counted(name):
    fields, (num_queries, group, query_tokens, passage_tokens, width) = LOSSES[name]
    section, positives = UnifiedConfig(**fields), 2 if name == "two positives" else 1
    group += positives - 1
    lengths = [query_tokens] * num_queries + [passage_tokens] * (num_queries * group)
    batch = RetrievalBatch(
        texts=pack_texts(random_token_ids(lengths)),
        group_offsets_Q1=torch.arange(0, num_queries * group + 1, group),
        rows_Q=torch.arange(num_queries),
        passage_hashes_P=torch.arange(num_queries * group),
        teacher_scores_P=torch.randn(num_queries * group) if section.teacher else None,
        positive_counts=(positives,) * num_queries if positives > 1 else (),
    )
    leaves = _leaves(lengths, section.scored_heads(), width)
    with LivePeak() as live:
        UnifiedObjective(section)._loss(leaves, batch, 0).total.backward()
    # the leaves' gradients are counted with the representations
    held = live.peak_bytes - sum(x.grad.nbytes for x in leaves.floats() if x.grad is not None)
    model = ModelShape(
        num_layers=1,
        hidden_size=width,
        intermediate_size=width,
        num_attention_heads=1,
        vocab_size=300,
        num_positions=512,
        heads=section.scored_heads(),
        num_dimensions=section.num_dimensions(),
    )
    step = StepShape(
        num_queries=num_queries,
        num_passages=num_queries * group,
        query_tokens=query_tokens - 1,  # the first token has no multi-vector row
        passage_tokens=passage_tokens,
    )
    planned = sum(loss_bytes(model, Strategy(precision_bytes=4, on_gpu=False), step).values())
    assert 1.0 <= planned / held <= 1.35


def _leaves(lengths: list[int], heads: tuple[str, ...], width: int) -> Representations:
    """Representations at random, with gradients, of texts of these lengths."""
    offsets = torch.tensor([0, *(length - 1 for length in lengths)]).cumsum(0)
    none = torch.zeros_like(offsets)
    has_lexical, has_rows = "lexical" in heads, "multi_vector" in heads
    num_pairs, num_rows = int(offsets[-1]) * has_lexical, int(offsets[-1]) * has_rows
    return Representations(
        dense_ND=normalize(torch.randn(len(lengths), width), dim=1).requires_grad_(),
        lexical_weights_Z=torch.rand(num_pairs).requires_grad_(),
        # distinct and ascending within a text
        lexical_ids_Z=torch.cat([torch.arange(4, 3 + length) for length in lengths])[:num_pairs],
        lexical_offsets_N1=offsets if has_lexical else none,
        multi_KC=normalize(torch.randn(num_rows, width), dim=1).requires_grad_(),
        multi_offsets_N1=offsets if has_rows else none,
    )
