"""The training loop. It knows no stage: objectives compute, the engine steps, this file counts and says when
to log, save, evaluate and stop; `step.py` holds the step itself, `moments.py` what happens between two.
"""

from dataclasses import replace

from megam3.batch import Progress
from megam3.checkpoint import CheckpointWriter, Evaluations, roll_back
from megam3.data.skips import place_of
from megam3.dist import comm
from megam3.errors import TrainingError
from megam3.moments import Moments, checkpoint_writer
from megam3.obs.clock import StepClock
from megam3.obs.nonfinite import RollBack
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED, StopSignal
from megam3.step import Run, StepReport, run_step


def train(run: Run, stop: StopSignal) -> int:
    """Train to the last step, or until asked to stop; returns the process' exit code.

    Raises:
        TrainingError: a loss or gradient was not finite and engine.on_nonfinite says to stop; weights are
            those before that step.
        CheckpointError: a checkpoint could not be written.
    """
    while True:
        evaluations = Evaluations(run.run_dir, run.state.progress.step)
        writer = checkpoint_writer(run, evaluations)
        try:
            return _train_from(run, stop, writer, evaluations)
        except RollBack as request:
            writer.finish()
            run.guard.at(request.step, "start")
            limit = run.config.engine.max_rollbacks
            run = replace(run, state=roll_back(run.run_dir, run.engine, run.state, request, limit))
        except TrainingError:
            # raised on every rank alike: the checkpoint in flight still gets its name
            writer.finish()
            raise


def _train_from(run: Run, stop: StopSignal, writer: CheckpointWriter, evaluations: Evaluations) -> int:
    """The loop, from `run.state` on; returns the process' exit code."""
    progress, code = run.state.progress, 0
    clock = StepClock(run.matmul_peak)
    served = (comm.rank(), comm.world_size(), progress.step, run.total_steps, run.state.skipped)
    waiting = clock.waiting_for(run.data.batches(*served, pin=run.engine.device.type == "cuda"))
    with Moments(run, writer, evaluations, clock) as moments:
        if moments.begin():
            return 0
        run.guard.at(progress.step, "data")
        for batches in waiting:
            run.guard.at(progress.step, "forward")
            report = run_step(run, batches, progress, moments.wishes(stop), clock.last_wait_seconds)
            run.guard.at(progress.step, "update")
            update = run.engine.update(progress.step, drop=bool(report.nonfinite))
            moments.health.check(report, update, progress.step)
            progress = _advance(run, progress, report)
            is_last = progress.step == run.total_steps
            leaves = report.wishes.leave and not is_last
            moments.log(progress, report, update, batches)
            # saved before it is evaluated: a crash in an evaluation must not cost the steps before it; and
            # whoever asks a run to leave does not wait for an evaluation
            is_evaluated = not leaves and moments.evaluates_at(progress.step)
            moments.save(progress, report.wishes, leaves=is_last or leaves, is_evaluated=is_evaluated)
            if is_evaluated and moments.evaluate(progress):
                return 0
            if leaves:
                code = EXIT_STOPPED if report.wishes.stop else EXIT_REQUEUE
                break
            run.guard.at(progress.step, "data")
    moments.say_end(progress.step)
    return code


def _advance(run: Run, progress: Progress, report: StepReport) -> Progress:
    step = progress.step + 1
    return Progress(
        step=step,
        epoch=run.data.epoch_of(place_of(step, run.state.skipped)),
        samples=progress.samples + report.num_samples,
        tokens=progress.tokens + report.num_tokens,
    )
