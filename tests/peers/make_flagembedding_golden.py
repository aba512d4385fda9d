"""Loss and gradients of FlagEmbedding's own unified model where its known faults cannot bite: equal lengths,
one rank, sorted teacher.

    python tests/peers/make_flagembedding_golden.py OUT.safetensors
    (FlagEmbedding 1.4.2, transformers 4.57, safetensors)

The encoder is a stand-in that returns given hidden states, so that gradients end exactly where the heads
begin; heads, scores, losses and distillation are `EncoderOnlyEmbedderM3Model`'s, in float64.
"""

import sys
from types import SimpleNamespace

import torch
from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
from safetensors.torch import save_file

NUM_QUERIES, GROUP, QUERY_LENGTH, PASSAGE_LENGTH, HIDDEN, MULTI, VOCABULARY = 3, 3, 5, 7, 4, 3, 12
VARIANTS = {
    "plain": {"use_self_distill": False},
    "distill": {"use_self_distill": True},
    "kl_div": {"use_self_distill": False, "kd_loss_type": "kl_div"},
    "m3_kd_loss": {"use_self_distill": True, "kd_loss_type": "m3_kd_loss"},
}


class GivenHidden(torch.nn.Module):
    """Returns the hidden states of whichever input it is shown."""

    config = SimpleNamespace(vocab_size=VOCABULARY)

    def __init__(self, hidden_by_length):
        super().__init__()
        self.hidden_by_length = hidden_by_length

    def forward(self, input_ids, attention_mask, return_dict):
        return SimpleNamespace(last_hidden_state=self.hidden_by_length[input_ids.shape[1]])


def make_texts(num: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`<s>` ids `</s>`; ids repeat within texts and across them, and some are `<unk>` (3)."""
    inner = torch.randint(3, VOCABULARY, (num, length - 2), generator=generator)
    return torch.cat([torch.zeros(num, 1, dtype=torch.long), inner, torch.full((num, 1), 2)], 1)


def main(out: str) -> None:
    torch.set_default_dtype(torch.float64)  # the model makes its teacher targets in the default type
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    record = {
        "query_ids": make_texts(NUM_QUERIES, QUERY_LENGTH, generator),
        "passage_ids": make_texts(NUM_QUERIES * GROUP, PASSAGE_LENGTH, generator),
        "query_hidden": torch.randn(NUM_QUERIES, QUERY_LENGTH, HIDDEN, **double),
        "passage_hidden": torch.randn(NUM_QUERIES * GROUP, PASSAGE_LENGTH, HIDDEN, **double),
        "multi_vector.weight": torch.randn(MULTI, HIDDEN, **double),
        "multi_vector.bias": torch.randn(MULTI, **double),
        "lexical.weight": torch.randn(1, HIDDEN, **double) / 8,
        "lexical.bias": torch.full((1,), 0.1, dtype=torch.float64),
        "teacher_scores": torch.randn(NUM_QUERIES, GROUP, **double).sort(dim=1, descending=True).values,
    }
    tokenizer = SimpleNamespace(
        cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3, padding_side="right"
    )
    for variant, options in VARIANTS.items():
        hidden = [record[name].clone().requires_grad_() for name in ("query_hidden", "passage_hidden")]
        multi, lexical = torch.nn.Linear(HIDDEN, MULTI).double(), torch.nn.Linear(HIDDEN, 1).double()
        multi.load_state_dict({"weight": record["multi_vector.weight"], "bias": record["multi_vector.bias"]})
        lexical.load_state_dict({"weight": record["lexical.weight"], "bias": record["lexical.bias"]})
        base = {
            "model": GivenHidden({QUERY_LENGTH: hidden[0], PASSAGE_LENGTH: hidden[1]}),
            "colbert_linear": multi,
            "sparse_linear": lexical,
        }
        model = EncoderOnlyEmbedderM3Model(
            base,
            tokenizer,
            temperature=0.02,
            sub_batch_size=-1,
            normalize_embeddings=True,
            unified_finetuning=True,
            **options,
        )
        model.train()
        sides = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for ids in (record["query_ids"], record["passage_ids"])
        ]
        teacher = record["teacher_scores"].flatten().tolist() if "kd_loss_type" in options else None
        loss = model(sides[0], sides[1], teacher_scores=teacher).loss
        loss.backward()
        record[f"{variant}.loss"] = loss.detach().double()
        record[f"{variant}.query_grad"], record[f"{variant}.passage_grad"] = hidden[0].grad, hidden[1].grad
        record[f"{variant}.multi_vector_grad"], record[f"{variant}.lexical_grad"] = (
            multi.weight.grad,
            lexical.weight.grad,
        )
    save_file({name: tensor.contiguous() for name, tensor in record.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
