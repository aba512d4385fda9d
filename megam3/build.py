"""From a checked recipe to the live objects of a run. The start-up order is the numbered comments of `build`,
and only here."""

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from megam3.batch import Representations
from megam3.checkpoint import RunState
from megam3.config.deepspeed import bf16_sums_warning, build_deepspeed_config, is_half
from megam3.config.load import dump_config
from megam3.config.schema import EvaluationConfig, ModelConfig, RunConfig
from megam3.data.dataset import TrainingData, open_on_every_rank
from megam3.data.notes import data_notes
from megam3.data.tokenizer import Tokenizer, load_tokenizer
from megam3.dist import comm
from megam3.encoders import read_encoder_config
from megam3.engine.activations import ActivationMemory
from megam3.engine.adamw import Kind as AdamWKind
from megam3.engine.adamw import choose_adamw
from megam3.engine.compiled import compile_layers
from megam3.engine.deepspeed import Engine, check_precision, join, model_construction
from megam3.engine.kernels import activate_attention, check_kernels, wished_path
from megam3.engine.swapped import check_disk
from megam3.errors import DataError
from megam3.files import write_json
from megam3.model.attention import report_attention, wish_attention
from megam3.model.device import emulation_warning
from megam3.model.freeze import freeze_parameters
from megam3.model.hub import hub_source
from megam3.objectives.base import Objective, find_objective
from megam3.obs.clock import forget_peak_memory, measure_matmul_peak
from megam3.obs.environment import describe_environment
from megam3.obs.guard import RunGuard
from megam3.obs.log import setup_logging
from megam3.obs.run_folder import MODEL_FOLDER, describe_run_folder
from megam3.packed_texts import pack_texts
from megam3.planning.agreement import agreed_lengths, choose_engine
from megam3.planning.choice import CHOICE_FILE, Choice
from megam3.planning.memory_report import plan_run
from megam3.reading import find_first_problem, resolve_reading, turn_encoder
from megam3.retrieval.beir import BeirDataset, read_beir
from megam3.retrieval.evaluate import evaluate, offered_modes
from megam3.starting_state import find_start, fresh_state, model_signature
from megam3.step import Run, seed_torch

logger = logging.getLogger(__name__)


def build(config: RunConfig, device: torch.device, guard: RunGuard) -> Run:
    """Make the objects of this rank; collective, after `comm.start` and inside `guard`.

    Raises:
        UserError: of the layer that found it; nothing has been trained or overwritten by then.
    """
    # 1. the run folder's log
    run_dir = str(config.run_dir)
    setup_logging(run_dir, comm.is_main(), comm.rank())
    given, on_gpu = config, device.type == "cuda"
    longest = agreed_lengths(config)
    config, choice = choose_engine(config, device, longest)
    ds_config = build_deepspeed_config(config, comm.world_size(), has_gpu=on_gpu)
    check_precision(ds_config)
    dtype = weight_dtype(ds_config)
    check_kernels(config, device, dtype)
    adamw = choose_adamw(config.engine.adamw)
    check_disk(ds_config, config.engine.template)
    # 2. tokenizer, data and test sets: the main rank tokenises what is not in the store yet, the others wait
    tokenizer = load_tokenizer(config.model.path, read_encoder_config(config.model.path).get("vocab_size"))
    check_first_token(config.model, tokenizer)
    test_sets = [read_beir(folder, config.evaluation.split) for folder in config.evaluation.folders]
    data = open_on_every_rank(config.data, tokenizer, config.store_dir, config.train.seed)
    check_data_kind(config, data)
    # chosen above too, because what cannot run must be said before an hour of tokenising
    if longest != (prepared := agreed_lengths(config)):
        config, choice = choose_engine(given, device, prepared)
        ds_config = build_deepspeed_config(config, comm.world_size(), has_gpu=on_gpu)
    total_steps = config.train.steps or data.num_steps(config.train.epochs or 0.0)
    # 3. the model; a fixed seed, so that heads from scratch are equal on every rank
    join(device)
    activate_attention(config.engine.attention, device)
    seed_torch(config.train.seed)
    objective = find_objective(config.objective)(config.objective, config.data.batch.chunk_tokens)
    bytes_before_model = forget_peak_memory(device)
    module = _load_module(config, objective, ds_config, dtype)
    signature = model_signature(module)
    shape = objective.shape(module)
    # 4. the engine
    engine = _make_engine(config, module, objective, ds_config, device, total_steps, adamw)
    # 5. where to start; only then is the run folder described anew
    fresh = fresh_state(config, ds_config, engine.stage, signature, data.fingerprint)
    state = find_start(config, run_dir, engine, data, fresh, total_steps)
    if comm.is_main():
        # a finished run keeps the record of what it trained with
        if state.progress.step < total_steps:
            _record_start(config, ds_config, device, choice)
        _report_start(config, state, total_steps, data)
        _report_arithmetic(config, ds_config, module, device)
    memory_plan = plan_run(config, comm.world_size(), on_gpu=on_gpu, longest=prepared)
    for line in () if memory_plan is None else memory_plan.lines:
        logger.info(line)
    return Run(
        config=config,
        run_dir=run_dir,
        engine=engine,
        objective=objective,
        data=data,
        total_steps=total_steps,
        state=state,
        model_files=os.path.join(run_dir, MODEL_FOLDER),
        encoder_shape=shape,
        matmul_peak=measure_matmul_peak(device, dtype),
        evaluate=evaluation(config, engine, objective, tokenizer, test_sets, run_dir),
        guard=guard,
        memory_plan=memory_plan,
        bytes_before_model=bytes_before_model,
    )


def _load_module(config: RunConfig, objective: Objective, ds_config: dict, dtype: torch.dtype) -> nn.Module:
    """The stage's model as it is trained: parts frozen, attention as the recipe wishes."""
    with model_construction(ds_config):
        module = objective.load_model(config.model, dtype)
    freeze_parameters(module, config.model.freeze)
    wish_attention(module, wished_path(config.engine.attention))
    return module


def _make_engine(
    config: RunConfig,
    module: nn.Module,
    objective: Objective,
    ds_config: dict,
    device: torch.device,
    total_steps: int,
    adamw: AdamWKind,
) -> Engine:
    settings = config.engine
    activations = ActivationMemory(module, settings.activation_checkpointing, settings.activation_offload)
    if settings.compile_layers:
        logger.info("compiled at their first pass: %d encoder layers", compile_layers(module))
    return Engine(
        module,
        optim=config.optim,
        is_head_parameter=objective.is_head_parameter,
        ds_config=ds_config,
        device=device,
        total_steps=total_steps,
        activations=activations,
        reduces_once=settings.gradient_reduction == "once",
        adamw=adamw,
    )


def weight_dtype(ds_config: dict) -> torch.dtype:
    """In which DeepSpeed keeps the weights that passes read."""
    half = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float16
    return half if is_half(ds_config) else torch.float32


def check_first_token(settings: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuse to read the dense vector from a first token that the tokenizer does not put there; said now, not
    after an hour of tokenising.

    Raises:
        ConfigError: see `find_first_problem`.
    """
    reading = resolve_reading(
        settings.path,
        turn_encoder(read_encoder_config(settings.path), settings.attention),
        pooling=settings.pooling,
        cls_every_tokens=settings.cls_every_tokens,
        attention=settings.attention,
    )
    first_id = tokenizer.prefix[0] if tokenizer.prefix else None
    problem = find_first_problem(reading, first_id, settings.path)
    if problem is not None:
        raise problem


def check_data_kind(config: RunConfig, data: TrainingData) -> None:
    """Refuse records that the stage cannot train on.

    Raises:
        DataError: texts where the stage wants pairs, or the reverse (names the dataset); no teacher scores
            anywhere for a stage that reads them.
    """
    wanted = config.objective.data_kind
    records = {"pair": '{"query", "pos"} records', "text": '{"text"} records'}
    for dataset, stored in zip(config.data.train, data.datasets, strict=True):
        kind = "text" if stored.is_text else "pair"
        if kind != wanted:
            rule = (
                f"holds {records[kind]}; objective.kind={config.objective.kind} trains on {records[wanted]}"
            )
            remedy = "name other files in data.train, or another objective"
            raise DataError(f"dataset {dataset.name}", kind, rule, remedy)
    idle = config.objective.needs_scores()
    if idle is not None and not any(stored.manifest.totals.with_scores for stored in data.datasets):
        rule = "reads teacher scores, and no record of data.train holds any (pos_scores, neg_scores)"
        remedy = f"add them with `megam3 add-teacher-scores`, or set objective.{idle}=null"
        raise DataError(f"objective.{idle}", getattr(config.objective, idle), rule, remedy)


def evaluated_as_trained(config: RunConfig) -> EvaluationConfig:
    """The recipe's evaluation, with the instructions that hold for it; says so where the datasets' differ."""
    for side in ("query", "passage"):
        field = f"{side}_instruction"
        trained = sorted({getattr(dataset, field) for dataset in config.data.train})
        if config.evaluation.folders and len(trained) > 1 and getattr(config.evaluation, field) is None:
            logger.warning(
                "data.train puts %s before its texts: evaluation and exports put nothing; say what they shall"
                " put in evaluation.%s",
                " or ".join(map(repr, trained)),
                field,
            )
    own = config.instructions
    return config.evaluation.model_copy(
        update={"query_instruction": own.query, "passage_instruction": own.passage}
    )


def evaluation(
    config: RunConfig,
    engine: Engine,
    objective: Objective,
    tokenizer: Tokenizer,
    test_sets: Sequence[BeirDataset],
    run_dir: str,
) -> Callable[[int], dict[str, float]]:
    """Evaluation of the model in training, in the modes whose heads it trains, on all ranks together; the
    files go to run_dir/eval."""

    def tokenize(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return [ids.tolist() for ids in tokenizer.encode(texts, max_tokens)[0]]

    def encode_ids(token_ids: Sequence[Sequence[int]]) -> Representations:
        return objective.represent(engine.forward, pack_texts(token_ids).to(engine.device))

    modes = offered_modes(config.objective.scored_heads())
    instructed = evaluated_as_trained(config)

    def run(step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        with engine.inference():
            for dataset in test_sets:
                result = evaluate(dataset, tokenize, encode_ids, instructed, modes)
                figures |= result.scalars()
                if comm.is_main():
                    result.write(os.path.join(run_dir, "eval", f"step-{step:06d}-{result.dataset}.json"))
        return figures

    return run


def _record_start(config: RunConfig, ds_config: dict, device: torch.device, choice: Choice | None) -> None:
    """What this start trains with, into the run folder."""
    run_dir = str(config.run_dir)
    describe_run_folder(
        run_dir,
        recipe_text=dump_config(config),
        ds_config=ds_config,
        environment={**describe_environment(device), "model": hub_source(config.model.path)},
        model_path=config.model.path,
    )
    if choice is not None:
        write_json(os.path.join(run_dir, CHOICE_FILE), choice.record)


def _report_arithmetic(config: RunConfig, ds_config: dict, module: nn.Module, device: torch.device) -> None:
    """Precision of gradient sums and the way attention runs, where they cost quality or time."""
    warnings = (
        bf16_sums_warning(config, ds_config),
        emulation_warning(weight_dtype(ds_config), device),
    )
    for line in filter(None, warnings):
        logger.warning(line)
    attention = report_attention(module, device)
    logger.log(logging.WARNING if attention.is_slow else logging.INFO, attention.line)


def _report_start(config: RunConfig, state: RunState, total_steps: int, data: TrainingData) -> None:
    logger.info(
        "%s: %d ranks, ZeRO stage %d, %d steps (%.2f epochs of %d), starting at step %d",
        config.name,
        state.world_size,
        state.zero_stage,
        total_steps,
        total_steps / data.num_steps_per_epoch,
        data.num_steps_per_epoch,
        state.progress.step,
    )
    for stored in data.datasets:
        for note in data_notes(stored.manifest):
            logger.log(logging.WARNING if note.is_warning else logging.INFO, note.text)
        if rejected := stored.manifest.totals.rejected:
            logger.warning(
                "%s: %d bad records are left out; see %s",
                stored.manifest.name,
                rejected,
                stored.folder / "rejected.jsonl",
            )
