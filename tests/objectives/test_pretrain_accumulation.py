"""However the texts of a step are spread over ranks, accumulated batches and chunks, loss and gradient are
those of a naive padded model that reads all of them at once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from megam3.batch import Progress, TextBatch
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig, OptimConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.retromae import RetroMAE
from megam3.objectives.pretrain import PretrainObjective
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.naive_retromae import NaiveText, naive_losses
from tests.ranks import run_ranks

TEXTS = random_token_ids((9, 2, 31, 14, 60, 3, 24), seed=5)
STEP = 3
WHOLE = [[0, 1, 2, 3, 4, 5, 6]]
SECTION = PretrainConfig(decoder_weight=0.7, bag_of_words_weight=0.4)


def batch_of(rows: Sequence[int]) -> TextBatch:
    return TextBatch(
        texts=pack_texts([TEXTS[row] for row in rows]),
        document_offsets_N1=torch.arange(len(rows) + 1),
        rows=torch.tensor(rows, dtype=torch.int64),
    )


def load(folder: str, section: PretrainConfig, dtype: torch.dtype, chunk: int | None = None) -> tuple:
    objective = PretrainObjective(section, chunk)
    torch.manual_seed(0)  # the head and the decoder start at random
    return objective, objective.load_model(ModelConfig(path=folder), dtype)


class Plain:
    """Forward and backward passes without an engine; counts them."""

    def __init__(self, model: RetroMAE, num_batches: int):
        self.model, self.num_batches, self.passes = model, num_batches, 0

    def forward(self, *args: Any) -> Any:
        return self.model(*args)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.passes += 1
        (loss / self.num_batches).backward()


def run_batches(
    objective: PretrainObjective, engine: Any, batches: Sequence[Sequence[int]]
) -> list[dict[str, Tensor]]:
    progress = Progress(step=STEP)
    prepared = objective.prepare([batch_of(rows) for rows in batches], progress)
    return [objective.run(engine, batch, progress) for batch in prepared]


def naive_step(folder: str, section: PretrainConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of the step, in float64; the masks are the objective's own choice."""
    objective, model = load(folder, section, torch.float64)
    (chunk,) = objective.prepare([batch_of(WHOLE[0])], Progress(step=STEP))[0].chunks
    special, lengths = objective._tables.special_V, chunk.texts.lengths
    starts = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)).tolist()
    hidden = chunk.hidden_M.tolist()
    texts = [
        NaiveText(
            ids=TEXTS[n],
            masked=chunk.masked_ids_T[start : start + length].tolist(),
            hidden=[i - start for i in hidden if start <= i < start + length],
            order=[i - start for i in chunk.order_T[start : start + length].tolist()],
            ordinary=[not special[i] for i in TEXTS[n]],
        )
        for n, (start, length) in enumerate(zip(starts, lengths))
    ]
    losses = naive_losses(model, texts, section.decoder_mask_share)
    assert losses.num_encoder == len(hidden)
    total = losses.total(section.decoder_weight if section.decoder else 0.0, section.bag_of_words_weight)
    total.backward()
    figures = {
        "loss/total": float(total.detach()),
        "loss/encoder": float(losses.encoder.detach()) / losses.num_encoder,
        "loss/decoder": float(losses.decoder.detach()) / max(1, losses.num_decoder),
        "loss/bag_of_words": float(losses.bags.detach()) / max(1, losses.num_bags),
    }
    return figures, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model"), heads=False))


SECTIONS = {
    "retromae and bags": SECTION,
    "retromae": PretrainConfig(decoder_mask_share=0.7),
    "masked language model": PretrainConfig(decoder=False),
    "masked language model and bags": PretrainConfig(decoder=False, bag_of_words_weight=2.0),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_one_pass_several_batches_and_chunks_equal_the_padded_model(folder: str, name: str) -> None:
    expected, gradients = naive_step(folder, SECTIONS[name])
    # batches, chunk_tokens, passes
    for batches, chunk, passes in (
        (WHOLE, None, 1),
        ([[0, 1], [2, 3, 4], [5, 6]], None, 3),
        ([[4, 2], [6, 5, 1, 0, 3]], 40, 4),
    ):
        objective, model = load(folder, SECTIONS[name], torch.float64, chunk)
        engine = Plain(model, len(batches))
        figures = run_batches(objective, engine, batches)
        assert engine.passes == passes
        for key in figures[0]:
            mean = sum(float(row[key]) for row in figures) / len(batches)
            assert mean == pytest.approx(expected[key], rel=1e-12), key
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-9, atol=1e-12, msg=key)


def check_stages(folder: str) -> list[dict]:
    """On a rank: one step at each ZeRO stage, with texts shared out unevenly and one empty batch."""
    join(torch.device("cpu"))
    shares = ([[0, 1, 2, 3], [5]], [[4, 6], []])
    results = []
    for stage in (0, 1, 2, 3):
        config = {
            "train_batch_size": comm.world_size(),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
        with model_construction(config):
            objective, model = load(folder, SECTION, torch.float32, 40)
        engine = Engine(
            model,
            optim=OptimConfig(lr=1e-3, clip_norm=None),
            is_head_parameter=objective.is_head_parameter,
            ds_config=config,
            device=torch.device("cpu"),
            total_steps=2,
            activations=ActivationMemory(model, False, False),
        )
        progress = Progress(step=STEP)
        prepared = objective.prepare([batch_of(rows) for rows in shares[comm.rank()]], progress)
        figures = []
        with engine.step_scope():
            for index, batch in enumerate(prepared):
                with engine.accumulation(index, len(prepared)):
                    figures.append(objective.run(engine, batch, progress))
        gradients = {
            name: (p.grad if stage == 0 else safe_get_full_grad(p)).clone()
            for name, p in engine.module.named_parameters()
        }
        mean = {key: torch.stack([row[key] for row in figures]).mean() for key in figures[0]}
        results.append(
            {
                "figures": {k: float(comm.all_reduce_sum(v)) / comm.world_size() for k, v in mean.items()},
                "gradients": gradients,
                "passes": [len(batch.chunks) for batch in prepared],
            }
        )
    return results


@pytest.mark.ranks
def test_two_ranks_with_unequal_counts_equal_the_padded_model_at_every_stage(folder: str) -> None:
    expected, gradients = naive_step(folder, SECTION)
    for stages in run_ranks(check_stages, 2, folder):
        for stage, found in enumerate(stages):
            # texts of 9+2, 31 and 14 tokens; the other rank, with 60 and 3, runs one pass without a loss
            assert found["passes"] == [3, 1]
            for key, value in found["figures"].items():
                assert value == pytest.approx(expected[key], rel=1e-5), (stage, key)
            for key, gradient in gradients.items():
                torch.testing.assert_close(
                    found["gradients"][key].double(), gradient, rtol=1e-3, atol=1e-6, msg=f"{stage} {key}"
                )
