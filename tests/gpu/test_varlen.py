"""The varlen path of packed attention, forward and backward, against float64 text by text: `pytest -m gpu`
runs torch's kernel, everywhere else torch's operator runs with a body for the CPU."""

import pytest
import torch

from megam3.model.attention import packed_attention
from tests.gpu import varlen_operator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = (5, 300, 1, 17, 64, 129, 2)
REACH = 20


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is there")
    if request.param == "cpu":
        varlen_operator.install(monkeypatch)
    return torch.device(request.param)


def by_text(
    streams: list[torch.Tensor], dtype: torch.dtype, window: int | None, causal: bool
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ) V of each text, every operator in `dtype`; [T, heads, head_dim]."""
    outputs = []
    group = streams[0].shape[1] // streams[1].shape[1]
    for query, *shared in zip(*(x[0].to(dtype).split(LENGTHS, dim=1) for x in streams)):
        key, value = (x.repeat_interleave(group, 0) for x in shared)
        position = torch.arange(query.shape[1], device=query.device)
        distance = position[:, None] - position[None, :]
        reach = len(position) if window is None else window
        mask = (distance <= reach) & (-distance <= (0 if causal else reach))
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("key_heads", "window", "causal"),
    [(4, None, False), (2, None, False), (4, REACH, False), (4, None, True), (2, REACH, True)],
)
def test_outputs_and_gradients_are_near_float64(device, dtype, head_dim, key_heads, window, causal):
    generator = torch.Generator().manual_seed(0)

    def drawn(heads):
        return torch.randn(1, heads, sum(LENGTHS), head_dim, generator=generator).to(device, dtype)

    streams = [drawn(4), drawn(key_heads), drawn(key_heads)]
    upstream = torch.randn(sum(LENGTHS), 4, head_dim, generator=generator).to(device, dtype)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)

    def run(attend):
        leaves = [x.clone().requires_grad_() for x in streams]
        output = attend(leaves)
        return [output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]

    def ours(leaves):
        return packed_attention(
            torch.nn.Identity(),
            *leaves,
            None,
            lengths=LENGTHS,
            max_length=max(LENGTHS),
            cu_seqlens=offsets,
            kernel="varlen",
            sliding_window=None if window is None else window + 1,
            causal=causal,
        )[0][0]

    exact = run(lambda leaves: by_text(leaves, torch.float64, window, causal))
    plain = run(lambda leaves: by_text(leaves, dtype, window, causal))
    names, factors = ("output", "query", "key", "value"), (2, 3, 3, 3)
    for name, factor, got, right, rounded in zip(names, factors, run(ours), exact, plain):
        assert got.dtype == dtype
        # the measure is an attention that rounds after every operator: twice its error, and three times in
        # gradients, whose kernel reads the rounded output
        error, allowed = ((x.double() - right.double()).abs().max() for x in (got, rounded))
        assert error <= factor * allowed + 1e-4, f"{name}: {error:.2e}, rounding everywhere: {allowed:.2e}"
