"""Masked-language-model head with tied embeddings, and its cross-entropy in chunks of rows: no tensor
[tokens, vocabulary].

The gradients of a chunk are formed while its logits are there, in the forward pass, and only scaled in the
backward pass. The vocabulary's logits are thus computed once, and under ZeRO-3 the embedding matrix is not
needed again in the backward pass. The price is one fp32 gradient of the embedding matrix between the two
passes (1 GB at 250 002 x 1024).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from megam3.errors import CheckpointError

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1024
"""Rows whose logits exist at a time: 1 GB in fp32 at XLM-R's vocabulary."""


class MaskedLMHead(nn.Module):
    """RoBERTa's head under its published names: dense, gelu, layer norm; the projection is the embedding
    matrix and `bias`."""

    def __init__(self, hidden_size: int, vocab_size: int, layer_norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to multiply by the embedding matrix, and the bias of the products."""
        return self.layer_norm(gelu(self.dense(hidden_MD))), self.bias


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_M: Tensor,
        scale_M: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(rows_MD.dtype, torch.float32)
        losses_M = torch.zeros(rows_MD.shape[0], dtype=wide, device=rows_MD.device)
        grad_MD = torch.zeros_like(rows_MD)
        grad_VD = torch.zeros_like(weight_VD, dtype=wide)
        grad_V = torch.zeros_like(bias_V, dtype=wide)
        for start in range(0, rows_MD.shape[0], chunk):
            part = slice(start, start + chunk)
            rows, targets = rows_MD[part], targets_M[part].unsqueeze(1)
            log_p = torch.log_softmax((rows @ weight_VD.T + bias_V).to(wide), 1)
            losses_M[part] = -log_p.gather(1, targets).squeeze(1)
            # d(loss)/d(logits) = softmax - one-hot, in the place of the logits
            grad = log_p.exp_()
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
            grad *= scale_M[part].to(wide).unsqueeze(1)
            grad_V += grad.sum(0)
            grad = grad.to(rows.dtype)
            grad_MD[part] = grad @ weight_VD
            grad_VD += grad.T @ rows
            # else they would live on beside the next chunk's logits: a third tensor of 1 GB
            del log_p, grad
        ctx.save_for_backward(grad_MD, grad_VD, grad_V)
        ctx.dtypes = weight_VD.dtype, bias_V.dtype
        ctx.mark_non_differentiable(losses_M)
        return (losses_M * scale_M.to(wide)).sum(), losses_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_MD, grad_VD, grad_V = ctx.saved_tensors
        weight, bias = ctx.dtypes
        scaled = (grad_MD * grad.to(grad_MD.dtype), (grad_VD * grad).to(weight), (grad_V * grad).to(bias))
        return *scaled, None, None, None


def tied_cross_entropy(
    rows_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    scale_M: Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Σ scale · cross-entropy(rows · weightᵀ + bias, targets), and each row's unscaled cross-entropy without
    a graph."""
    return _TiedCrossEntropy.apply(rows_MD, weight_VD, bias_V, targets_M, scale_M, chunk_rows)


def fill_lm_head(head: MaskedLMHead, folder: Path, *, required: bool = False) -> None:
    """Copy the published `lm_head` of a model folder into `head`; a warning where there is none, or an error
    where it is `required`.

    Raises:
        CheckpointError: an unreadable weight file, a head of other sizes, or a required one that is missing.
    """
    found = _read_lm_head(folder)
    if not found and required:
        rule = "holds no masked-LM head (lm_head.*), from which the expansion head starts"
        remedy = "name a masked-language model's folder, or set model.missing_heads: init to start at random"
        raise CheckpointError("model.path", str(folder), rule, remedy)
    if not found:
        logger.warning(
            "model.path = %s: holds no lm_head, so the masked-LM head starts at random and its loss near"
            " ln(vocabulary)",
            folder,
        )
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        rule = f"its lm_head is {shapes}, the model needs {wanted}"
        raise CheckpointError("model.path", str(folder), rule, "take the head out, or give the encoder's own")
    head.load_state_dict(found)


def _read_lm_head(folder: Path) -> dict[str, Tensor]:
    """dense, layer_norm and bias of the published head; empty when the folder has none of them.

    As transformers does, `pytorch_model*.bin` counts only where there are no safetensors.
    """
    found: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = {key: name for key in opened.keys() if (name := _name_in_head(key))}  # noqa: SIM118
            found |= {name: opened.get_tensor(key) for key, name in names.items()}
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises another class for each way in which a file can be damaged
            rule = f"cannot be read ({str(error).splitlines()[0]})"
            raise CheckpointError("model.path", str(file), rule, "save it again, as safetensors") from error
        found |= {name: tensor for key, tensor in weights.items() if (name := _name_in_head(key))}
    return found


def _name_in_head(key: str) -> str | None:
    """Name inside MaskedLMHead of a tensor of the folder, if it is one of the head's.

    `lm_head.decoder.*` repeats the embedding matrix and the bias.
    """
    prefix, found, name = key.rpartition("lm_head.")
    is_ours = found and prefix in ("", "roberta.") and name.startswith(("dense.", "layer_norm.", "bias"))
    return name if is_ours else None
