"""`megam3 add-teacher-scores INPUT OUTPUT --model FOLDER`: a teacher's score for every passage of training
records.

    megam3 add-teacher-scores mined.jsonl scored.jsonl --model bge-reranker-v2-m3
    megam3 add-teacher-scores mined.jsonl scored.jsonl --model runs/one/export --head sum

The teacher is any Hugging Face cross-encoder with one or two labels, a megam3 folder (--head says by which
score), or a sentence-transformers folder (its dense vectors). Training uses the scores when its recipe asks
for a teacher. Killed and started again, it continues; with several ranks each scores its share.

Coming from FlagEmbedding's add_reranker_score: input_file = INPUT, output_file = OUTPUT,
reranker_name_or_path = --model, reranker_max_length = --max-tokens, normalize = --normalize.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megam3.commands.instruction_options import add_instruction_options, given_instructions
from megam3.commands.mine import progress_lines
from megam3.dist import comm
from megam3.dist.session import device_of_rank, worker_ranks
from megam3.model.device import DTYPES
from megam3.model.folder import model_folder
from megam3.retrieval.teachers.base import Teacher, kind_of
from megam3.retrieval.teachers.bi_encoder import HEADS, DenseTeacher, M3Teacher
from megam3.retrieval.teachers.cross_encoder import CrossEncoder
from megam3.retrieval.teachers.run import TeacherOptions, add_teacher_scores

# docs/experiments.md, "Mined negatives and teachers": Sparse fell from 0.84 to 0.03 at the default of 1
CLOSE_SCORES = (
    "these scores lie close together: at objective.teacher_temperature 1 all passages of a query get nearly "
    "the same share; set it and teacher_student_temperature to 0.1 or so (docs/options.md, Teachers)"
)


def main(argv: Sequence[str]) -> int:
    """Score, and say how much.

    Raises:
        UserError: see `megam3.retrieval.teachers.run.add_teacher_scores`.
    """
    given = _parser().parse_args(argv)
    with worker_ranks() as ranks:
        folder = model_folder(given.model)
        kind = kind_of(folder)
        instructions = given_instructions(given, folder)
        options = TeacherOptions(
            inputs=(given.input,),
            output=Path(given.output),
            work=Path(given.work or f"{given.output}.work"),
            model=folder,
            settings={
                "kind": kind,
                "head": given.head,
                "max_tokens": given.max_tokens,
                "precision": given.precision,
            },
            normalize=given.normalize,
            query_instruction=instructions.query,
            passage_instruction=instructions.passage,
        )
        teacher = _load(kind, folder, given, device_of_rank(given.device, ranks))
        say = progress_lines(comm.is_main())
        counts = add_teacher_scores(teacher, options, lambda done, total: say("scoring", done, total))
        if comm.is_main():
            print(f"{given.output}: {counts['pairs']:,} scores in {counts['records']:,} records by a {kind}")
            if kind != "cross-encoder" or given.normalize:
                print(CLOSE_SCORES)
    return 0


def _load(kind: str, folder: str, given: argparse.Namespace, device: str | None) -> Teacher:
    limits = {"device": device, "max_tokens": given.max_tokens, "batch_tokens": given.batch_tokens}
    if kind == "cross-encoder":
        return CrossEncoder(folder, precision=given.precision, **limits)
    if kind == "megam3":
        return M3Teacher(folder, given.head, **limits)
    return DenseTeacher(folder, **limits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megam3 add-teacher-scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", help="training records: a file, a folder or a glob")
    add("output", help="JSONL to write")
    add("--model", required=True, help="folder (or hub id) of the teacher")
    add("--head", choices=HEADS, default="sum", help="of a megam3 folder (default: %(default)s)")
    add("--max-tokens", type=int, default=None, help="of a pair, or of each text for bi-encoders")
    add("--batch-tokens", type=int, default=16384, help="scored at a time (default: %(default)s)")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="of a cross-encoder")
    add("--normalize", action="store_true", help="put scores through a sigmoid")
    add_instruction_options(parser, " without a prompt of its own")
    add("--work", default=None, help="folder of unfinished parts (default: OUTPUT.work)")
    add("--device", default=None, help="default: CUDA when there is one")
    return parser
