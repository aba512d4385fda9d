"""A step with an expansion head, whose backward pass reads the tied embedding matrix, under ZeRO 0, 2 and 3
on two ranks against one process without DeepSpeed."""

import pytest
import torch

from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.config.weights import SparsityConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.consolidate import consolidate
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups, split_over_ranks
from tests.engine.test_engine import CPU, OPTIM, ds_config
from tests.factory import make_tiny_model_folder
from tests.ranks import run_ranks

SECTION = UnifiedConfig(
    temperature=1.0,
    sparsity=SparsityConfig(query_weight=0.1, passage_weight=0.1, ramp_steps=1),
    self_distill=False,
)


def _config(folder: str) -> ModelConfig:
    return ModelConfig(path=folder, lexical_kind="expansion", missing_heads="init")


def _under_deepspeed(folder: str, out: str) -> list[float]:
    losses = []
    join(CPU)
    for stage in (0, 2, 3):
        config = ds_config(stage)
        torch.manual_seed(0)
        with model_construction(config):
            module = load_m3(folder, _config(folder))
        engine = Engine(
            module,
            optim=OPTIM,
            is_head_parameter=is_head_parameter,
            ds_config=config,
            device=CPU,
            total_steps=4,
            activations=ActivationMemory(module, False, False),
        )
        batch = split_over_ranks(make_groups(4), comm.rank(), comm.world_size())
        # a chunk smaller than the batch: the passes of the gradient cache, with the filler of a short rank
        with engine.step_scope(), engine.accumulation(0, 1):
            figures = UnifiedObjective(SECTION, 40).run(engine, batch, Progress())
        engine.update(3)
        losses.append(float(comm.all_reduce_sum(figures["loss/total"])) / comm.world_size())
        engine.save(f"{out}/{stage}")
        comm.barrier()
    return losses


class _Plain:
    def __init__(self, model):
        self.model = model

    def forward(self, *args):
        return self.model(*args)

    def backward(self, loss, is_last):
        loss.backward()


@pytest.mark.ranks
def test_losses_and_weights_are_those_of_one_process(tmp_path):
    folder = str(make_tiny_model_folder(tmp_path / "tiny"))
    losses = run_ranks(_under_deepspeed, 2, folder, str(tmp_path))[0]
    torch.manual_seed(0)
    model = load_m3(folder, _config(folder)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    figures = UnifiedObjective(SECTION).run(_Plain(model), batch_of(make_groups(4)), Progress())
    assert losses == pytest.approx([float(figures["loss/total"])] * 3, rel=1e-5)
    for stage in (0, 2, 3):
        saved = consolidate(f"{tmp_path}/{stage}")
        for name, parameter in model.named_parameters():
            if parameter.grad is None or "expansion_head" not in name and "word_embeddings" not in name:
                continue
            # AdamW's first step is the sign of the gradient: entries near zero say nothing
            clear = parameter.grad.abs() > 1e-4
            moved = torch.sign(before[name] - saved[name])[clear]
            assert torch.equal(moved, torch.sign(parameter.grad)[clear]), f"stage {stage}: {name}"
            assert clear.any(), name
