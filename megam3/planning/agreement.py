"""The choice of `engine.template: auto` on all ranks of a run, from the smallest of their GPUs and the store
that they share."""

import logging
from dataclasses import asdict

import torch

from megam3.config.schema import RunConfig
from megam3.data.lengths import LongestTexts
from megam3.dist import comm
from megam3.planning.choice import Choice, apply, chosen, is_auto
from megam3.planning.recipe import stored_lengths

logger = logging.getLogger(__name__)


def agreed_lengths(config: RunConfig) -> LongestTexts | None:
    """What the main rank sees of the recipe's store; collective, because a file system may show a new file to
    one rank before another."""
    own = stored_lengths(config)
    found = comm.gather_objects_json(None if own is None else asdict(own))[0]
    return None if found is None else LongestTexts(**found)


def choose_engine(
    config: RunConfig, device: torch.device, longest: LongestTexts | None = None
) -> tuple[RunConfig, Choice | None]:
    """The recipe with `engine.template: auto` written out, the same on every rank; collective.

    Raises:
        ConfigError: nothing fits the smallest GPU of all ranks.
    """
    if not is_auto(config):
        return config, None
    on_gpu, memory_bytes = device.type == "cuda", None
    if on_gpu:
        own = torch.cuda.get_device_properties(device).total_memory
        memory_bytes = min(row[0] for row in comm.all_gather_ints([own]))
    choice = chosen(config, comm.world_size(), memory_bytes, on_gpu=on_gpu, longest=longest)
    assert choice is not None
    for line in choice.lines:
        logger.info(line)
    # equal arithmetic on equal numbers; but a rank with another release of megam3 must not differ in silence
    fields = comm.gather_objects_json(choice.record["fields"])[0]
    return apply(config, fields), choice
