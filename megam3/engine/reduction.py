"""One reduction of gradients a step at ZeRO 2 and 3, which reduce after every backward pass by themselves.

With the gradient cache a step has G backward passes. DeepSpeed's `coalesce_grad_reduction` leaves the
gradients of all of them on the parameters and reduces when its block ends:

    stage 2     (G + 1)Ψ sent a step → 2Ψ      held until then: the whole gradient instead of a share

Left on the parameters, gradients would be summed in the model's precision. In bf16 a sum of equal terms stops
growing at the 256th, so at stage 2 each pass's gradient is moved into an fp32 sum (`grad_accum`, what
DeepSpeed's stage 1 does when its gradients are to be summed in another precision than they are computed in).
That is stage 1's memory and communication with fp32 sums, in the checkpoint format of stage 2: the stage 1
that DeepSpeed builds for bf16 with fp32 sums is another optimizer with files of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class SingleReduction:
    """Holds the gradients of a step back until its last backward pass; collective."""

    def __init__(self, engine: Any):
        """`engine`: DeepSpeed's, at stage 2 or 3 (there in fp32 only)."""
        self._engine = engine
        zero = engine.optimizer
        needs_wide_sums = zero.dtype != torch.float32
        assert not (needs_wide_sums and zero.partition_gradients is False), "stage 1 reduces once by itself"
        if needs_wide_sums:
            assert engine.zero_optimization_stage() == 2, "the configuration refuses stage 3 in bf16"
            assert zero.gradient_accumulation_dtype == torch.float32
            zero.use_grad_accum_attribute = True

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Spans all backward passes of one optimizer step, and reduces at its end.

        A step that fails reduces nothing: the other ranks may never come to that collective call, and the
        error's message must get out.
        """
        block = self._engine.coalesce_grad_reduction()
        block.__enter__()
        try:
            yield
        except BaseException:
            for name in ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3"):
                setattr(self._engine, name, lambda optimizer: None)
            block.__exit__(None, None, None)
            raise
        block.__exit__(None, None, None)
