"""Forward and backward pass of the encoder alone, packed by megam3 or padded by transformers (sdpa); class
and weights are the same.

Spec: model_folder, texts, layout (packed or padded); optional threads, peak (also measure this moment's
matmul peak beside each pass). A padded pipeline pads queries to the longest query and passages to the longest
passage, so padding is charged as little as peers manage.
"""

import time

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.worker import Step, serve
from megam3.encoders import EncoderShape
from megam3.model.backbone import encode_packed, load_backbone
from megam3.obs.clock import measure_matmul_peak
from megam3.packed_texts import pack_texts


def _packed(folder: str, columns: list[list[list[int]]]) -> tuple[torch.nn.Module, Step]:
    encoder = load_backbone(folder)
    texts = pack_texts([ids for column in columns for ids in column])
    return encoder, lambda: [
        encode_packed(encoder, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    ]


def _padded(folder: str, columns: list[list[list[int]]]) -> tuple[torch.nn.Module, Step]:
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = [tokenizer.pad({"input_ids": column}, return_tensors="pt") for column in columns if column]
    return encoder, lambda: [
        encoder(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches
    ]


def build(spec: dict) -> Step:
    """Both layouts get the same weights on their outputs' sum, so that their losses can be compared."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model_folder"])
    columns = [
        tokenizer(column)["input_ids"] if column else []
        for column in (spec["texts"]["queries"], spec["texts"]["passages"])
    ]
    encoder, encode = {"packed": _packed, "padded": _padded}[spec["layout"]](spec["model_folder"], columns)
    encoder.train()
    config = encoder.config
    weights_D = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(0))
    shape = EncoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )
    flops = shape.training_flops([len(ids) for column in columns for ids in column])

    def step() -> dict:
        encoder.zero_grad(set_to_none=True)
        peak = measure_matmul_peak() if spec.get("peak") else None
        started = time.perf_counter()
        hidden: list[Tensor] = encode()
        loss = sum((part @ weights_D).square().sum() for part in hidden)
        loss.backward()
        seconds = time.perf_counter() - started
        figures = {"seconds": seconds, "loss": float(loss.detach())}
        return (
            {**figures, "peak_share": flops / seconds / max(peak, measure_matmul_peak())} if peak else figures
        )

    return step


if __name__ == "__main__":
    serve(build)
