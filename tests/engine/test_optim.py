import torch
from torch import nn

from megam3.config.schema import OptimConfig
from megam3.engine.adamw import build_adamw
from megam3.engine.optim import group_layout, parameter_groups
from megam3.model.m3 import is_head_parameter


class _Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.lexical_head = nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_every_trainable_parameter_is_in_exactly_one_group():
    toy = _Toy()
    groups = parameter_groups(toy.named_parameters(), OptimConfig(lr=1e-3, head_lr=1e-2), is_head_parameter)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in toy.parameters() if p.requires_grad)


def test_biases_and_norms_do_not_decay_and_heads_have_their_own_rate():
    toy = _Toy()
    groups = parameter_groups(
        toy.named_parameters(), OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.05), is_head_parameter
    )
    of = {id(p): group for group in groups for p in group["params"]}
    names = {name: of[id(p)] for name, p in toy.named_parameters() if p.requires_grad}
    assert [name for name, group in names.items() if group["weight_decay"]] == [
        "encoder.0.weight",
        "lexical_head.weight",
    ]
    assert {name: group["peak_lr"] for name, group in names.items()} == {
        "encoder.0.weight": 1e-3,
        "encoder.0.bias": 1e-3,
        "encoder.1.weight": 1e-3,
        "encoder.1.bias": 1e-3,
        "lexical_head.weight": 1e-2,
        "lexical_head.bias": 1e-2,
    }


def test_partitioned_parameters_are_judged_by_their_full_shape():
    matrix = nn.Parameter(torch.zeros(0))
    matrix.ds_shape = torch.Size([8, 8])  # what ZeRO-3 leaves behind
    (group,) = parameter_groups(
        [("encoder.weight", matrix)], OptimConfig(lr=1e-3, weight_decay=0.1), is_head_parameter
    )
    assert group["weight_decay"] == 0.1


def test_adamw_takes_the_recipe_moments():
    groups = parameter_groups(
        _Toy().named_parameters(), OptimConfig(lr=1e-3, betas=[0.8, 0.95], eps=1e-6), is_head_parameter
    )
    optimizer = build_adamw(groups, OptimConfig(lr=1e-3, betas=[0.8, 0.95], eps=1e-6))
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def _named(names: list[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(2, 2))) for name in names]


def test_rates_fall_from_the_top_layer_to_the_embeddings():
    rates = {
        "encoder.embeddings.word_embeddings.weight": 1e-3 / 8,
        "encoder.encoder.layer.0.output.dense.weight": 1e-3 / 4,
        "encoder.encoder.layer.1.output.dense.weight": 1e-3 / 2,
        "encoder.encoder.layer.2.output.dense.weight": 1e-3,
        "lexical_head.weight": 5e-3,
        "multi_vector_head.weight": 7e-3,
        "expansion_head.dense.weight": 5e-3,
    }
    named = _named(list(rates))
    named[1][1].requires_grad_(False)
    config = OptimConfig(lr=1e-3, head_lr=7e-3, lexical_lr=5e-3, layer_decay=0.5)
    groups = parameter_groups(named, config, is_head_parameter)
    rate_of = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    # the frozen layer still counts: the ones around it keep their rates
    assert {name: rate_of.get(id(p)) for name, p in named} == {
        **rates,
        "encoder.encoder.layer.0.output.dense.weight": None,
    }
    modern = _named(
        ["encoder.layers.0.mlp.Wi.weight", "encoder.layers.1.mlp.Wi.weight", "encoder.final_norm.x"]
    )
    groups = parameter_groups(modern, OptimConfig(lr=1e-3, layer_decay=0.5), is_head_parameter)
    assert [group["peak_lr"] for group in groups] == [5e-4, 1e-3]
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_the_layout_of_groups_is_told_only_where_rates_make_one():
    assert group_layout(OptimConfig(lr=1e-3, head_lr=1e-2)) == []
    assert group_layout(OptimConfig(lr=1e-3, layer_decay=0.9)) == [1e-3, None, None, None, 0.9]
