"""Join the per-rank files of a DeepSpeed checkpoint into one fp32 state dict, without ranks or devices."""

import os

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from megam3.engine.deepspeed import TAG, weights_only_loads


def consolidate(folder: str) -> dict[str, Tensor]:
    """fp32 weights by parameter name from the checkpoint folder `folder` (any ZeRO stage and world size), on the CPU."""
    single = os.path.join(folder, TAG, "mp_rank_00_model_states.pt")
    has_shards = any(name.endswith("_optim_states.pt") for name in os.listdir(os.path.join(folder, TAG)))
    with weights_only_loads():
        if has_shards:
            state = get_fp32_state_dict_from_zero_checkpoint(folder, tag=TAG)
        else:
            # stage 0 keeps the whole model in one file
            state = torch.load(single, map_location="cpu", weights_only=True)["module"]
    return {name: tensor.detach().clone().float() for name, tensor in state.items()}
