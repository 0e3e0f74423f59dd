"""Train the three stages, one after the other, with one loop:

    python train.py --stage pretrain      a flow-matching teacher
    python train.py --stage flowmap       the teacher becomes a flow map: any t to any r < t
    python train.py --stage distill       the flow map learns on its own samples (DMD)
    torchrun --nproc_per_node=8 train.py --stage distill

With --causal, in the last two, the clip is made of chunks of frames, one after the other; a
bidirectional clip is one chunk. `update` is an update of each stage; settings stand in config.py,
losses in updates.py. Everything random is a pure function of (seed, stage, step, sample), so a
killed run resumes bit for bit and a global batch is the same however it is split.
"""
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import cli
from config import Config, chunks_of, command, learning_rate, micro_steps, parse_config

if __name__ == "__main__":
    cli.run(parse_config)    # answers --help and wrong flags, before what takes seconds to import

import torch
from tqdm import tqdm

import checkpoint
import distributed
import dmd
import lora
import meanflow
import networks
import runs
import updates
import wan
from flowmap import time_weight

ROLES = ("err_flow", "err_consistency", "err_free")       # r = t, r = 0, another r < t
LOGGED = {"pretrain": ("loss",), "flowmap": ("loss", *ROLES, "err_whole"),
          "distill": ("loss", *ROLES, "dmd", "dmd_gradient", "fake")}


def update(c: Config, nets: dict, parts: dict, batches, step: int, world, log) -> dict:
    """One update of a stage. nets: networks by role: student, teacher, fake; parts: those that
    train, each with its optimiser (checkpoint.Trainable); batches: the micro-batches of this rank;
    log: distributed.Sums. Returns the gradient norms."""
    student = nets["student"]
    rolled_out = []                                  # (batch, z_0) for the fake score
    flow_errors = distributed.RunningMean(world)
    for micro_step, drawn in enumerate(batches):
        batch = drawn.to(world.device)
        # Gradients are reduced over ranks in the last backward pass of the last micro-batch.
        last = micro_step + 1 == micro_steps(c, world.size)
        if c.stage == "pretrain":
            err = updates.flow_matching_error(student, batch)
            log.add("loss", err)
            backward(err, student, last, c, world)
        # The forward loss comes first, as it reaches every weight. FSDP sums gradients over passes
        # in fp32, but one of the last pass alone is bf16, and torch 2.11 cannot reduce both.
        if c.stage == "flowmap" or (c.stage == "distill" and c.cotrain):
            err = updates.flow_map_error(student, batch, c, nets.get("teacher"))
            loss = balanced(err, batch, flow_errors, c, log)
            if c.stage == "distill":
                loss = c.cotrain * loss
            final_pass = c.stage == "flowmap" and batch.whole_t is None
            backward(loss, student, last and final_pass, c, world)
        if batch.whole_t is not None:
            err = updates.whole_clip_error(student, batch, c)
            log.add("err_whole", err)
            backward(err, student, last, c, world)
        if c.stage == "distill":
            chunks = list(updates.roll_out(student, batch, batch.rollout, c, graph="last"))
            z_0 = torch.cat([chunk.detach() for chunk in chunks], 1)
            gradient = updates.score_gradient(z_0, nets["teacher"], nets["fake"], batch, c)
            log.add("dmd", dmd.dmd_loss(z_0, gradient))
            log.add("dmd_gradient", gradient.flatten(1).norm(dim=1))
            backward_chunks(chunks[-1], z_0, gradient, batch, student, last, c, world)
            rolled_out.append((replace(drawn, rollout=None), z_0))   # without noise, which is large

    norms = {"grad_norm": optimizer_step(parts["student"], learning_rate(c, step, c.lr), c.clip)}
    if math.isfinite(norms["grad_norm"]):
        parts["student"].update_ema(c.ema_decay if step >= c.ema_start else 0.0)

    if c.stage == "distill":
        for micro_step, (drawn, z_0) in enumerate(rolled_out):
            batch = drawn.to(world.device)
            last = micro_step + 1 == len(rolled_out)
            if c.fake_rollout == "fresh":
                z_0 = torch.cat(list(updates.roll_out(student, batch, batch.fake_rollout, c)), 1)
            err = updates.fake_score_error(nets["fake"], batch, z_0)
            log.add("fake", err)
            backward(err, nets["fake"], last, c, world)
        fake_lr = learning_rate(c, step, c.fake_lr)
        norms["fake_grad_norm"] = optimizer_step(parts["fake"], fake_lr, c.clip)
    return norms


def backward_chunks(last_chunk, z_0, gradient, batch, student, last: bool, c: Config, world):
    """Send DMD's gradient (B, F, C, H, W) back into the student, a chunk at a time. The cache has
    no gradient, so chunks have separate graphs. The last chunk's is there; the others are made
    again, one by one, from the same noise and past (updates.roll_out)."""
    frames = z_0.shape[1]
    *earlier, last_part = gradient.split(chunks_of(c, frames), 1)

    def chunk_loss(chunk, part) -> torch.Tensor:     # they add up to dmd_loss of the clip
        return dmd.dmd_loss(chunk, part) * (chunk.shape[1] / frames)
    backward(chunk_loss(last_chunk, last_part), student, last and not earlier, c, world)
    again = updates.roll_out(student, batch, batch.rollout, c, graph="all", made=z_0)
    for part, chunk in zip(earlier, again):
        backward(chunk_loss(chunk, part), student, last and part is earlier[-1], c, world)


def balanced(err, batch, flow_errors, c: Config, log) -> torch.Tensor:
    """The forward loss (B,): err, balanced and weighted. flow_errors: the mean r = t error so far,
    over micro-batches and ranks. These rows come first in the global batch (flow_map_times), so the
    mean is complete when the first r < t row needs it."""
    weight = time_weight(batch.t, c.time_weight, c.shift, c.either_share)
    # The released order weighs first: w(t) then cancels where r < t.
    weighted = err * weight if c.weight_before_balance else err
    # A global batch of 1 may have no r = t row: then 1, the variance of noise, sets the scale.
    mu = flow_errors.add(weighted.detach()[:batch.roles[0]], default=1.0)
    loss = meanflow.balanced_loss(weighted, batch.t, batch.r, mu, c.balance)
    loss = loss if c.weight_before_balance else loss * weight
    log.add("loss", loss)
    for name, rows in zip(ROLES, err.split(batch.roles)):
        log.add(name, rows)
    return loss


def backward(loss, network, last: bool, c: Config, world) -> None:
    """Add a micro-batch's gradient; the last one of an update is reduced over ranks. FSDP averages
    over ranks, and losses (B,) are summed and divided by the global batch."""
    distributed.sync_gradients(network, last)
    (loss.sum() * (world.size / c.batch_size)).backward()


def optimizer_step(part: checkpoint.Trainable, lr: float, clip: float) -> float:
    """Clip and step; returns the gradient norm. A non-finite gradient changes nothing."""
    norm = torch.nn.utils.clip_grad_norm_(part.network.parameters(), clip)
    norm = checkpoint.gathered(norm).item()
    if math.isfinite(norm):
        part.optimizer.param_groups[0]["lr"] = lr
        part.optimizer.step()
    part.optimizer.zero_grad(set_to_none=True)
    return norm


def train(c: Config) -> Path:
    """Train (or go on with) one stage; returns its folder. Raises ValueError with what to do when
    it cannot, OSError for what cannot be read or written, SystemExit for gradients that are no
    finite numbers time and again."""
    world = distributed.start(c.device, c.deterministic)
    fresh, built_on = runs.check_start(c, world)
    source = runs.open_source(c, fresh)              # decodes videos: a signal ends it at once
    stopping = distributed.StopSignal()
    try:
        if not fresh:
            runs.check_set(c, source)
        chunks_of(c, source.latent_shape[0])         # raises, before anything is loaded
        weights = networks.find_weights(c)
        if c.lora_rank:                              # now: it may change before the stage ends
            weights.base_sha256 = distributed.on_main(
                lambda: wan.fingerprint(weights.student[1]), world)
        runs.fit_to(source, weights.config, weights.student[1], c)
        nets = networks.build(c, weights.config, world, weights.below)
        networks.fill(nets, weights, c, world)
        parts = networks.trainables(c, nets)
        updates.draw_batch(c, source, world, 0, 0)   # raises, before anything is deleted
        with runs.prepared(c, source, fresh, world):
            return train_until(stopping, c, source, nets, parts, weights, built_on, world)
    finally:
        stopping.restore()


def train_until(stopping: distributed.StopSignal, c: Config, source, nets: dict, parts: dict,
                weights: networks.Weights, built_on: dict, world) -> Path:
    """The updates of a stage whose folder is prepared, until the last one or a signal."""
    stage = runs.stage_folder(c)
    say = tqdm.write if world.is_main else lambda text: None
    counters = checkpoint.load_checkpoint(stage, parts, world, say)
    first, skipped = counters.get("step", 0), counters.get("skipped", 0)
    if first >= c.steps and distributed.on_main(lambda: checkpoint.has_model(stage), world):
        say(f"stage {c.stage} is finished in {stage} ({first} updates); --steps {2 * first} would "
            "go on, --fresh train it anew")
        return stage
    if world.is_main:
        runs.record(c, source, first, built_on)
        origins = ", ".join(f"{role} from {place}" for role, place in runs.origins(c).items())
        say(f"stage {c.stage}: resumed from update {first} of {c.steps} in {stage}" if first else
            f"stage {c.stage} in {stage}: {origins or 'fresh weights'}; recipe of {c.preset};"
            f" clips of {c.data}: latents {' x '.join(map(str, source.latent_shape))}")
        size = sum(x.nbytes for x in checkpoint.training_state(parts).values())
        say(f"weights that train, moments and average: {size / 1e6:.0f} MB over all processes; "
            "gradients and activations come on top. How long it takes, the bar says")

    log, in_a_row, started = distributed.Sums(LOGGED[c.stage]), 0, time.time()
    bar = tqdm(total=c.steps, initial=first, desc=f"{c.stage:8}", disable=not world.is_main,
               mininterval=1.0, dynamic_ncols=True)
    for step in range(first, c.steps):
        batches = (updates.draw_batch(c, source, world, step, micro_step)
                   for micro_step in range(micro_steps(c, world.size)))
        norms = update(c, nets, parts, batches, step, world, log)

        bad = not all(map(math.isfinite, norms.values()))
        skipped += bad
        in_a_row = in_a_row + 1 if bad else 0
        if in_a_row >= c.max_skips:
            saved = checkpoint.checkpoints(stage)
            kept = f"{saved[-1]} is kept" if saved else "No checkpoint was saved before"
            raise SystemExit(f"stopped at update {step}: {in_a_row} non-finite gradients in a row "
                             f"({norms}). {kept}; run the same command again with a lower --lr "
                             "(of the fake score, --fake-lr)")
        stop = stopping.on_any_rank(world)
        save = (step + 1) % c.save_every == 0 or step + 1 == c.steps or stop
        if (step + 1) % c.log_every == 0 or save:    # a resume starts with empty sums
            row = {"step": step + 1, **log.means(world), **norms,
                   "lr": learning_rate(c, step, c.lr), "skipped": skipped,
                   "seconds": round(time.time() - started, 2)}
            if world.is_main:
                with open(stage / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                shown = {n: f"{row[n]:.3f}" for n in ("loss", "dmd", "fake") if n in row}
                bar.set_postfix(shown, refresh=False)
        bar.update()
        if save:
            checkpoint.save_checkpoint(stage, step + 1, parts, {"skipped": skipped}, world)
        if stop and step + 1 < c.steps:
            bar.close()
            say(f"stopped by a signal after update {step + 1} of {c.steps}, which is saved. To go "
                "on (under torchrun with as many processes, or others that divide the batch):\n"
                f"    {command(c.stage, c.causal, c.run_dir)}")
            return stage
    bar.close()
    if 2 * skipped > c.steps:
        raise SystemExit(f"stage {c.stage} has failed: {skipped} of its {c.steps} updates were "
                         f"skipped for a non-finite gradient, see {stage / 'log.jsonl'}. Train it "
                         "anew with --fresh and a lower --lr, or other --data")
    save_stage(c, stage, parts["student"].ema, weights, world)
    say(f"stage {c.stage}: finished, {stage / 'model.safetensors'}")
    return stage


def save_stage(c: Config, stage: Path, ema: dict, weights: networks.Weights, world) -> None:
    """model.safetensors of a finished stage: the moving average of the student, or of its adapter
    with the path of what it adapts, relative where that lies in the run."""
    adapter, base = None, Path(os.path.abspath(weights.student[1]))
    if c.lora_rank:
        inside = base.is_relative_to(os.path.abspath(c.run_dir))
        adapter = {"rank": c.lora_rank, "alpha": c.lora_alpha,
                   "base": os.path.relpath(base, stage) if inside else str(base),
                   "base_sha256": weights.base_sha256,
                   "targets": [*lora.TARGETS, *lora.REPLACED]}
    checkpoint.save_model(stage, ema, weights.config, world.is_main, adapter)
    distributed.barrier(world)


def main(argv=None) -> None:
    train(parse_config(argv))


if __name__ == "__main__":
    cli.run(main)
    distributed.stop()
