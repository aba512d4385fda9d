"""The unified objective on one and two ranks against the formulas written out with torch on padded score
matrices."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.loss import limits, unified
from megam3.loss.tiled import tiled_unified_loss
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective, spread
from tests.batches import batch_of, make_groups
from tests.factory import make_tiny_model_folder
from tests.ranks import run_ranks

CONFIG = UnifiedConfig(temperature=0.1, self_distill_start_step=5, mask_false_negatives=False)


class PlainEngine:
    """What an objective needs, without DeepSpeed; averages gradients over ranks as DeepSpeed does."""

    def __init__(self, folder: str):
        self.model = load_m3(folder, ModelConfig(path=folder)).double()

    def forward(self, *args):
        return self.model(*args)

    def backward(self, loss, is_last):
        loss.backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        named = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {n: comm.all_reduce_sum(g) / comm.world_size() for n, g in named.items()}


def written_out(model, groups, in_batch: bool, distill: bool) -> torch.Tensor:
    """The formulas of arXiv 2402.03216, section 3.3, one query at a time."""
    texts = [t for g in groups for t in g]
    heads = []
    for ids in texts:
        hidden = model.encoder(
            torch.tensor([ids]),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            lengths=(len(ids),),
            max_length=len(ids),
        )
        hidden = hidden.last_hidden_state[0]
        weights = torch.relu(model.lexical_head(hidden)).squeeze(-1)
        lexical = {}
        for token, weight in zip(ids, weights):
            if token not in (0, 1, 2, 3):
                lexical[token] = torch.maximum(lexical[token], weight) if token in lexical else weight
        multi = torch.nn.functional.normalize(model.multi_vector_head(hidden[1:]), dim=-1)
        heads.append((torch.nn.functional.normalize(hidden[0], dim=0), lexical, multi))
    starts = [sum(len(g) for g in groups[:i]) for i in range(len(groups))]
    passages = [(i, starts[i] + j) for i, g in enumerate(groups) for j in range(1, len(g))]
    losses = []
    for i, start in enumerate(starts):
        dense_q, lexical_q, multi_q = heads[start]
        seen = [(group, p) for group, p in passages if in_batch or group == i]
        target = next(c for c, (group, _) in enumerate(seen) if group == i)
        rows = {"dense": [], "lexical": [], "multi": []}
        for _, p in seen:
            dense_p, lexical_p, multi_p = heads[p]
            rows["dense"].append(dense_q @ dense_p)
            rows["lexical"].append(
                sum(
                    (lexical_q[t] * lexical_p[t] for t in lexical_q if t in lexical_p),
                    torch.zeros(()).double(),
                )
            )
            rows["multi"].append((multi_q @ multi_p.T).max(1).values.mean())
        s = {name: torch.stack(values) for name, values in rows.items()}
        s["sum"] = s["dense"] + 0.3 * s["lexical"] + s["multi"]
        log_p = {name: log_softmax(values / 0.1, 0) for name, values in s.items()}
        loss = -(log_p["dense"] + log_p["sum"] + 0.1 * log_p["lexical"] + log_p["multi"])[target] / 4
        if distill:
            t = log_p["sum"].detach().exp()
            taught = -(t * (log_p["dense"] + 0.1 * log_p["lexical"] + log_p["multi"])).sum() / 3
            loss = (loss + taught) / 2
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny"))


def _run(folder: str, in_batch: bool, step: int, chunk_tokens: int | None, tiles: str = "auto") -> dict:
    engine, groups = PlainEngine(folder), make_groups(5, 2)
    # ragged over ranks: 3 queries on the first, 2 on the second
    cut = [0, 5] if comm.world_size() == 1 else [0, 3, 5]
    batch = batch_of(groups[cut[comm.rank()] : cut[comm.rank() + 1]], in_batch_negatives=in_batch)
    figures = UnifiedObjective(CONFIG.model_copy(update={"loss_tiles": tiles}), chunk_tokens).run(
        engine, batch, Progress(step=step)
    )
    total = float(comm.all_reduce_sum(figures["loss/total"])) / comm.world_size()
    return {"total": total, "names": sorted(figures), "gradients": engine.gradients()}


CASES = [
    (True, 0, None),
    (True, 5, 30),
    (False, 0, None),
    (False, 5, None),
    (True, 5, None, "always"),
    (False, 5, 30, "always"),
]


def _every_case(folder: str) -> list[dict]:
    return [_run(folder, *case) for case in CASES]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradients_are_those_of_the_formulas(folder, world_size):
    results = run_ranks(_every_case, world_size, folder)[-1]
    for (in_batch, step, *_), result in zip(CASES, results):
        model = load_m3(folder, ModelConfig(path=folder)).double()
        expected = written_out(
            model, make_groups(5, 2), in_batch, distill=step >= CONFIG.self_distill_start_step
        )
        expected.backward()
        assert result["total"] == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in result["gradients"]:
                torch.testing.assert_close(
                    result["gradients"][name],
                    parameter.grad,
                    rtol=1e-4,
                    atol=1e-7,
                    msg=lambda m, n=name: f"{n}: {m}",
                )


def test_figures_name_every_loss_and_the_vital_signs(folder):
    result = _run(folder, True, 5, None)
    assert result["names"] == [
        *[f"accuracy/{n}" for n in ("dense", "lexical", "multi_vector", "sum")],
        "dense/spread",
        "lexical/mean_weight",
        "lexical/nonzero_share",
        *[
            f"loss/{n}"
            for n in (
                "dense",
                "distill_dense",
                "distill_lexical",
                "distill_multi_vector",
                "lexical",
                "multi_vector",
                "sum",
                "total",
            )
        ],
        "multi_vector/spread",
    ]


def test_spread_is_zero_for_equal_vectors_and_one_for_opposite_ones():
    one = torch.nn.functional.normalize(torch.randn(8), dim=0)
    assert float(spread(one.expand(5, 8))) == pytest.approx(0.0, abs=1e-6)
    assert float(spread(torch.stack([one, -one]))) == pytest.approx(1.0, abs=1e-6)


def test_a_first_token_that_reads_no_text_is_a_dying_dense_head_stuck_at_log_of_the_passages(folder):
    """The last layer norm of the encoder gives every token one and the same state."""
    engine = PlainEngine(folder)
    with torch.no_grad():
        engine.model.encoder.encoder.layer[-1].output.LayerNorm.weight.zero_()
        engine.model.encoder.encoder.layer[-1].output.LayerNorm.bias.copy_(torch.linspace(-1, 1, 32))
    objective = UnifiedObjective(CONFIG)
    groups = make_groups(5, 2)
    figures = objective.run(engine, batch_of(groups), Progress())
    values = {name: float(value) for name, value in figures.items()}
    assert values["loss/dense"] == pytest.approx(math.log(10), rel=1e-6), "5 queries with 2 passages each"
    said = list(objective.warnings(values, 0.001))
    assert [text.split(" is dying")[0] for text in said] == ["the dense head", "the multi_vector head"]
    assert "dense/spread = " in said[0]
    assert "lower optim.lr or optim.head_lr, or lengthen optim.warmup_ratio" in said[0]


@pytest.mark.parametrize(("limit", "tiled"), [("MATRIX_SCORES", True), ("WINNERS", True), (None, False)])
def test_tiles_are_taken_where_scores_or_winners_would_be_too_many(folder, monkeypatch, limit, tiled):
    taken = []

    def spy(*arguments, **options):
        taken.append(True)
        return tiled_unified_loss(*arguments, **options)

    monkeypatch.setattr(unified, "tiled_unified_loss", spy)
    whole = _run(folder, True, 5, None)["total"]
    assert not taken
    if limit:
        monkeypatch.setattr(limits, limit, 1)
    assert _run(folder, True, 5, None)["total"] == pytest.approx(whole, rel=1e-5)
    assert bool(taken) == tiled
