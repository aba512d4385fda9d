"""The one file that touches DeepSpeed's engine: forward, backward, step, save and load of a model under any
ZeRO stage.

A step is a sequence of backward calls whose last one is announced beforehand, because ZeRO reduces gradients
at that boundary:

    with engine.step_scope():
        for index, batch in enumerate(batches):
            with engine.accumulation(index, len(batches)):
                objective.run(engine, batch, progress)      # calls engine.forward and engine.backward
        result = engine.update(step)

Gradients are averaged over ranks by DeepSpeed; `dist/gather.py` derives the convention that makes this the
global gradient.
"""

import contextlib
import importlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from megam3.config.schema import OptimConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.adamw import Kind, build_adamw, settle_steps
from megam3.engine.consolidate import NAMES, TAG, SavedStates, list_files, weights_only_loads
from megam3.engine.elastic import restore
from megam3.engine.optim import parameter_groups
from megam3.engine.reduction import SingleReduction
from megam3.engine.schedule import learning_rate_factor
from megam3.engine.swapped import keeps_states_in_files, states_in_sight
from megam3.errors import CheckpointError, ConfigError

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, once per call and rank
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which its engine does in every start, without compiling it.

    Nobody here trains with Muon, and its decorators load torch's compiler: 1.0 of the 5.2 seconds of
    processor time to the first step (docs/experiments.md).
    """

    def compile_nothing(*arguments: Any, **named: Any) -> Callable[[Callable], Callable]:
        return lambda function: function

    with mock.patch.object(deepspeed.runtime.compiler, "compile", compile_nothing):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


_import_muon_uncompiled()

FileWriter = Callable[[Any, str, Callable[[Any, str], Any]], Any]
"""(contents, path, DeepSpeed's own writer of them)."""


@dataclass(frozen=True)
class UpdateResult:
    """What an optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the encoder."""
    skipped: bool
    """True: the gradient was not finite (or the caller asked for it) and no weight moved."""
    loss_scale: float | None = None
    """What the loss was multiplied by in this step (fp16); None: nothing."""
    overflowed: bool = False
    """Skipped because the scaled gradient overflowed fp16, and the scale is lower now: part of loss scaling,
    no sign of ill health."""


def join(device: torch.device) -> None:
    """Let DeepSpeed use the process group of `comm.start`; a world of one, which has none, gets one that
    needs no network.

    On CPUs DeepSpeed would first compile a shared-memory all-reduce, and every rank would die where there is
    no compiler. Only its inference calls use that op, training's collectives go through gloo either way: it
    is declared unavailable, and nothing is lost.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    deepspeed.init_distributed(auto_mpi_discovery=False)


def check_precision(ds_config: dict) -> None:
    """Refuse a precision that the device does not compute in, before any weight is read.

    Raises:
        ConfigError: such as fp16 on a CPU without instructions for it, where DeepSpeed's engine would stop.
    """
    device = get_accelerator()
    for name, is_supported in (("fp16", device.is_fp16_supported), ("bf16", device.is_bf16_supported)):
        if ds_config.get(name, {}).get("enabled") and not is_supported():
            rule = f"this machine's {device.device_name()} does not compute in it"
            remedy = f"use {'bf16' if name == 'fp16' else 'fp16'} or fp32"
            raise ConfigError("engine.precision", name, rule, remedy)


@contextlib.contextmanager
def model_construction(ds_config: dict) -> Iterator[None]:
    """Build or load a model inside, after `join`; under ZeRO-3 each weight is partitioned as it arrives, so
    no rank holds all of them."""
    alive = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    yield
    del alive


class Engine:
    """A model under DeepSpeed. Collective: every rank makes the same calls in the same order."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimConfig,
        is_head_parameter: Callable[[str], bool],
        ds_config: dict,
        device: torch.device,
        total_steps: int,
        activations: ActivationMemory,
        reduces_once: bool = False,
        adamw: Kind = "fused",
    ):
        """Wrap `module` (moved to `device` by DeepSpeed).

        Args:
            is_head_parameter: by name, which parameters train at optim.head_lr.
            ds_config: the final dictionary (`megam3.config.deepspeed`).
            total_steps: shapes the learning rate.
            reduces_once: ZeRO 2 and 3 reduce gradients at the end of a step instead of after every backward
                pass (`megam3.engine.reduction`); the other stages do so anyway.
            adamw: from `choose_adamw`.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device, self.stage = device, ds_config["zero_optimization"]["stage"]
        self._optim, self._total_steps, self._activations = optim, total_steps, activations
        self._scale, self._is_last_batch, self._drop_update, self._skipped = 1.0, True, False, False
        self._norm, self._is_ready = math.nan, False
        groups = parameter_groups(module.named_parameters(), optim, is_head_parameter)
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        self._names = [name_of[id(parameter)] for group in groups for parameter in group["params"]]
        self._peak_lrs = [group.pop("peak_lr") for group in groups]
        self._torch_optimizer = build_adamw(groups, optim, adamw)
        self._group_settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self._torch_optimizer.param_groups
        ]
        self._torch_optimizer.register_step_pre_hook(self._guard_update)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._torch_optimizer, config=ds_config, dist_init_required=False
        )
        if self.stage == 0 and comm.world_size() == 1:
            # nobody to reduce with: DeepSpeed would copy all gradients into a flat buffer and back, a fifth
            # of a step at XLM-R's vocabulary
            self._engine.enable_backward_allreduce = False
        self._reduction = SingleReduction(self._engine) if reduces_once and self.stage >= 2 else None
        self._scales_loss = bool(ds_config.get("fp16", {}).get("enabled"))
        if self._scaler is not None:
            # at the lowest scale an overflow is a gradient that is not finite: engine.on_nonfinite decides
            self._scaler.raise_error_at_min_scale = False
        self._is_ready = True

    @property
    def module(self) -> nn.Module:
        """The wrapped model; under ZeRO-3 its parameters are partitioned."""
        return self._engine.module

    @property
    def activations(self) -> ActivationMemory:
        """Checkpointing and offload of this model."""
        return self._activations

    @property
    def _scaler(self) -> Any:
        """fp16's; not kept, since DeepSpeed puts another one in its place when it loads a checkpoint."""
        return self._engine.optimizer.loss_scaler if self._scales_loss else None

    def forward(self, *args: Any) -> Any:
        """Call the model. Under ZeRO-3 its parameters are gathered by this call: the module alone cannot be
        called."""
        return self._engine(*args)

    @contextlib.contextmanager
    def step_scope(self) -> Iterator[None]:
        """Spans all forward and backward passes of one optimizer step."""
        self._engine.train()
        reduction = contextlib.nullcontext() if self._reduction is None else self._reduction.step()
        with self._activations.step(), reduction:
            yield

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation: no dropout, no graph; the training mode comes back at the end."""
        was_training = self._engine.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(was_training)

    @contextlib.contextmanager
    def accumulation(self, index: int, count: int) -> Iterator[None]:
        """Batch `index` of the `count` whose mean gradient makes one step."""
        self._scale, self._is_last_batch = 1.0 / count, index == count - 1
        try:
            yield
        finally:
            self._scale, self._is_last_batch = 1.0, True

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of `loss`; `is_last` is the batch's last call on this rank, the same on
        every rank."""
        self._engine.set_gradient_accumulation_boundary(self._is_last_batch and is_last)
        self._engine.backward(loss * self._scale, scale_wrt_gas=False)
        self._activations.check_released()

    def update(self, step: int, drop: bool = False) -> UpdateResult:
        """Clip and apply the accumulated gradient at 0-based optimizer step `step`.

        A non-finite gradient, or `drop`, leaves weights and moments untouched and is reported as skipped.
        """
        factor = learning_rate_factor(step, self._total_steps, self._optim.warmup_ratio, self._optim.schedule)
        for group, peak in zip(self._torch_optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor
        self._drop_update, self._skipped = drop, False
        self._norm = self._plain_norm() if self.stage == 0 else math.nan
        scaler = self._scaler
        scale = None if scaler is None else float(scaler.cur_scale)
        self._engine.step()
        overflowed = scale is not None and bool(self._engine.optimizer.overflow)
        is_lowest = scaler is not None and scale == float(scaler.min_scale)
        # a ZeRO optimizer that met a non-finite norm by itself has not called AdamW at all
        self._norm = self._zero_norm() if self.stage > 0 else self._norm
        return UpdateResult(
            self._norm,
            self._optim.lr * factor,
            self._skipped or overflowed or not math.isfinite(self._norm),
            scale,
            overflowed and not drop and not is_lowest,
        )

    def save(self, folder: str, write: FileWriter | None = None) -> list[str]:
        """Write this rank's part of weights and optimizer state under folder/engine; returns its files,
        relative to folder.

        `write` is called in place of DeepSpeed's own writer, once a file, and may put the writing off: the
        contents are live tensors, which the next step changes. (DeepSpeed's DecoupledCheckpointEngine also
        writes beside the training, but hands live tensors to a second process and holds the next optimizer
        step until that has written them; it needs libaio and keeps no copy.)
        """
        written: list[str] = []
        writer = self._engine.checkpoint_engine
        save = writer.save

        def save_and_note(state_dict: Any, path: str) -> Any:
            written.append(os.path.relpath(path, folder))
            return save(state_dict, path) if write is None else write(state_dict, path, save)

        copies_files = self._engine.zero_nvme_offload_optimizer
        writer.save = save_and_note
        # states on a disk are saved like any others, not as copies of DeepSpeed's files
        self._engine.zero_nvme_offload_optimizer = lambda: False
        try:
            with states_in_sight(self._engine.optimizer):
                self._engine.save_checkpoint(
                    folder, tag=TAG, save_latest=False, client_state={NAMES: self._names}
                )
        finally:
            writer.save = save
            self._engine.zero_nvme_offload_optimizer = copies_files
        return written

    def load(self, folder: str) -> None:
        """Read what `save` wrote at the same world size and ZeRO stage; nothing is unpickled but tensors and
        DeepSpeed's bookkeeping."""
        if keeps_states_in_files(self._engine.optimizer):
            self.load_elastic(folder)
            return
        with weights_only_loads():
            path, _ = self._engine.load_checkpoint(folder, tag=TAG, load_lr_scheduler_states=False)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}/{TAG}"
        # the recipe decides, not the checkpoint: DeepSpeed brings back betas, eps, decay and what else the
        # AdamW of that run had to say of its groups with the moments
        for group, settings in zip(self._torch_optimizer.param_groups, self._group_settings, strict=True):
            group.update(settings)
        settle_steps(self._torch_optimizer)

    def load_elastic(self, folder: str) -> None:
        """Read what an engine of any world size and ZeRO stage wrote: weights, moments and AdamW's step
        count, by parameter name, and where fp16's scaler was; collective.

        Rank 0 lists the files for all: listed by W ranks, a folder of W files is W² questions to a shared
        file system, and each rank might see another answer.

        Raises:
            CheckpointError: this rank does not see a file that rank 0 lists.
        """
        files = comm.gather_objects_json(list_files(folder) if comm.is_main() else [])[0]
        try:
            saved = SavedStates(folder, files)
        except FileNotFoundError as error:
            who = f"rank {comm.rank()} on {socket.gethostname()}"
            rule = f"{who} does not see {error.filename}, which rank 0 lists"
            remedy = "give output_dir on a file system that all nodes share"
            raise CheckpointError("checkpoint", folder, rule, remedy) from None
        if self._scaler is not None and saved.scaler:
            vars(self._scaler).update(saved.scaler)
        restore(
            saved,
            self._engine.module,
            self._engine.optimizer,
            self._torch_optimizer,
            self._names,
        )

    def _plain_norm(self) -> float:
        # without ZeRO, DeepSpeed clips in place and keeps no norm: read it from the reduced gradients before
        # the step
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else math.nan

    def _zero_norm(self) -> float:
        return float(self._engine.optimizer._global_grad_norm)

    def _guard_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs right before torch's AdamW moves weights: ZeRO knows the global norm by now, the same on every
        rank.

        Parameters without a gradient are left alone by AdamW, moments and step count included, so dropping
        the gradients skips the step.
        """
        if not self._is_ready:
            return  # DeepSpeed steps on zero gradients once while it allocates the moments
        if self.stage > 0:
            self._norm = self._zero_norm()
        if self._drop_update or not math.isfinite(self._norm):
            self._skipped = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
