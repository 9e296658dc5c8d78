"""The page: assemble, restore, loop. Everything the program does in training is named here.

    pretrain train configs/demo.yaml --nproc 2

One process is one rank; the same page runs alone, under torchrun and under srun. The same command
resumes. Nouns first, then verbs in the order time flows; what survives a restart is `state`.
"""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from data_pipeline.loader import Loader
from parallel import clock, launch
from parallel.chips import peak
from parallel.mesh import Mesh, degrees
from parallel.precision import COMPUTE, make_deterministic
from parallel.reduce import any_rank
from pretrain import config
from pretrain.checkpoint import Checkpoint
from pretrain.config import Config
from pretrain.engine import Engine, StepConfig
from pretrain.foretold import Foretold
from pretrain.fp8_guard import FP8Guard
from pretrain.meter import Meter
from pretrain.metrics import Log
from pretrain.parallelize import parallelize
from pretrain.planning.planned import executed
from pretrain.preflight import facts
from pretrain.preview import Preview
from pretrain.profiling import Profile
from pretrain.run import Run
from pretrain.schedules import every
from pretrain.seen import Seen
from pretrain.state import TrainState
from pretrain.timeline import Timeline


def step_config(cfg: Config) -> StepConfig:
    return StepConfig(
        global_batch=cfg.data.global_batch,
        steps=cfg.steps,
        accum=cfg.accum,
        max_skips=cfg.guard.max_skips,
        clip=cfg.clip,
        label_dropout=cfg.model.label_dropout,
        dropout_draws=cfg.model.dropout_draws,
        null_label=cfg.model.num_classes,
        moe=getattr(cfg.model, "moe", None),
        time_bins=cfg.log.time_bins,
    )


def go_back(state: TrainState, engine: Engine, checkpoint: Checkpoint, run: Run) -> None:
    """Restores the last checkpoint, to go on without the data that the guard refused.

    Raises NoWayBackError if there is none, or if that was tried from the same one before.
    """
    lost, reached = engine.lost, state.step
    assert lost is not None, "there is nothing to go back for"
    checkpoint.roll_back(state)
    state.pass_over(lost)
    engine.forget()
    run.say(
        f"rolled back from step {reached} to step {state.step}: every step made from positions "
        f"{lost[0]} to {lost[1]} of the data was left out; they are passed over"
    )


def train(cfg: Config) -> None:
    # Assemble: one line a noun. Each takes its own config and what it stands on.
    place = launch.Place.here()
    threads = cfg.threads or launch.default_threads(place)
    if cfg.deterministic:
        make_deterministic()
    folder, timeout = Path(cfg.run_dir), timedelta(seconds=cfg.timeout)
    device = launch.join(place, threads=threads, timeout=timeout, stacks=folder / "stacks")
    foretold = Foretold(cfg, place.world, device)
    sizes = degrees(cfg.mesh, place.world)
    mesh = Mesh(sizes, device.type, ordered=cfg.deterministic)
    run = Run(folder, place.rank)
    loader = Loader(cfg.data, mesh.data.rank, mesh.data.size, seed=cfg.seed)
    backend = parallelize(cfg.model, cfg.mesh, mesh, cfg.compute, seed=cfg.seed, device=device)
    state = TrainState.new(backend, cfg.optim, cfg.ema, cfg.guard, seed=cfg.seed)
    engine = Engine(state, cfg.objective, cfg.schedule, step_config(cfg), mesh, run.say)
    watch = FP8Guard(cfg.fp8, state, engine.loss_of, run.say)
    launch.limit(timeout)  # of every group, those of libraries too
    manifest, settings = loader.info, cfg.model_dump(mode="json")
    nodes = place.world // place.local_world
    checkpoint = Checkpoint(cfg.checkpoint, folder, facts(cfg, manifest), run.say, nodes)
    preview = Preview(cfg.sample, cfg.objective, manifest, mesh, null=cfg.model.num_classes)

    if cfg.compile:
        engine.warm_up(manifest.latent_shape)

    # Restore: the same command resumes. Nothing to load is a fresh run.
    checkpoint.restore(state)
    layout = {"threads": threads, "world": place.world, "mesh": asdict(sizes)}
    run.describe(config.to_yaml(cfg), cfg.steps, layout)
    log = Log(
        cfg.log, folder, rank=place.rank, steps=cfg.steps, start=state.step, settings=settings
    )
    seen = Seen(
        folder,
        mesh.data.rank,
        of=mesh.data.size,
        start=state.step,
        enabled=cfg.log.sample_ids,
        idle=mesh.tp.rank > 0,
    )
    flops, best = executed(cfg, sizes), peak(device, COMPUTE[cfg.precision])[0] * place.world
    meter = Meter(cfg.data.global_batch, flops, best, clock.start(device))
    profile = Profile(cfg.profile, folder, place.rank)

    # Loop: one line a verb, in the order time flows.
    stop = any_rank(run.asked_to_stop())  # dist: once; a request made before the start counts
    timeline = Timeline(folder, place, state.step, meter.spent)
    batches = meter.waiting(loader.start(state.cursor))
    while not stop and state.step < cfg.steps:
        profile.reach(state.step)
        batch, cursor = next(batches)
        watch.check(batch)
        metrics = engine.step(batch, stop=timeline.asked(state.step, run.asked_to_stop()))
        seen.append(state.step + 1, engine.position, batch)
        state.advance(cursor)
        saves = checkpoint.due(state.step)
        stop = engine.settle(everything=saves or state.step >= cfg.steps)
        if engine.lost is not None:
            go_back(state, engine, checkpoint, run)
            log.rewind(state.step)
            seen.rewind(state.step)
            timeline.passed(state.step, line=True)
            batches = meter.waiting(loader.start(state.cursor))
            continue
        log.tick(state.step)
        logs = every(cfg.log.every, state.step)
        values = meter.record(state, metrics) if logs else {}  # sync: the only one in a plain step
        foretold.compare(values, run.say)
        with meter.spending("other"):
            if logs:
                log.train(state.step, values)
            if every(cfg.sample.every, state.step):
                picture = folder / "samples" / f"step_{state.step:08d}.png"
                preview.save(state, picture)
                log.picture(state.step, "samples", picture)
        if saves and not state.skipped_in_a_row:  # a row may have to be undone
            with meter.spending("save"):
                checkpoint.save(state)
        timeline.passed(state.step, line=saves or logs, stop=stop)
    profile.close(state.step)
    with meter.spending("save"):
        checkpoint.save(state)  # saving a saved step is a no-op
        checkpoint.wait()
    run.end(state.step, cfg.steps)
    timeline.end(state.step)
    log.close()
    seen.close()
    loader.close()
    launch.leave()
