"""One training step: accumulate, reduce, guard, update. Saves nothing; says what it left out.

The step costs one collective of its own beside the backend's: loss, gradient norm, the stop flag
and expert counts travel together. What it decides is read one step later from an asynchronous copy.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch, sent
from data_pipeline.cursor import Stretch
from parallel.clock import spending
from parallel.mesh import Mesh
from parallel.reduce import ordered_sum, ordered_sum_and_max, sum_of_squares
from pretrain import balance
from pretrain.guard import reasons
from pretrain.models.moe import MoEConfig, Routing, moe_layers
from pretrain.noise import Draws, draw
from pretrain.objectives import Objective
from pretrain.schedules import ScheduleConfig
from pretrain.state import TrainState


@dataclass(frozen=True)
class StepConfig:
    """What the engine needs to know, gathered from the parts."""

    global_batch: int
    steps: int  # length of the run
    accum: int
    max_skips: int  # skipped steps in a row that the run goes back for
    clip: float | None  # largest gradient norm
    label_dropout: float  # share of labels replaced by the null label
    dropout_draws: int  # 1, or one a label table (published U-DiT)
    null_label: int
    moe: MoEConfig | None
    time_bins: int  # timestep bins in which expert load is counted


@dataclass(frozen=True)
class Metrics:
    """Of one step, over all ranks; tensors stay on the device until somebody looks."""

    loss: Tensor  # ()
    grad_norm: Tensor  # (), before clipping
    skipped: Tensor  # (), 1.0 if the update was left out
    load: Tensor  # (L, T, E) expert picks per layer and timestep bin; L = 0 without experts
    dropped: Tensor  # (), picks lost to full buffers of the static dispatcher since the start
    lr: float


@dataclass(frozen=True)
class _Pending:
    """A step whose outcome is on its way to the host."""

    step: int  # as in metrics.jsonl
    data: Stretch  # what made it
    values: Tensor  # (6,): stop, skip, loss, gradient norm, and the limits of these two
    arrived: torch.cuda.Event | None  # None: it is there


class Engine:
    """Steps a TrainState. All ranks call `step` with their slots of the same global batch."""

    def __init__(
        self,
        state: TrainState,
        objective: Objective,
        schedule: ScheduleConfig,
        cfg: StepConfig,
        mesh: Mesh,
        say: Callable[[str], None],
    ) -> None:
        """say: hears once of every step that was left out, and why."""
        self._state = state
        self._mesh = mesh
        self._objective = objective
        self._schedule = schedule
        self._cfg = cfg
        self._layers = moe_layers(state.model)
        self._device = state.backend.device
        self._dropped = torch.zeros((), dtype=torch.float64, device=self._device)
        self._say = say
        self._pending: deque[_Pending] = deque()
        self.stop = False  # all ranks have agreed to stop
        self.lost: Stretch | None = None  # data whose steps were skipped `max_skips` times in a row

    def step(self, batch: Batch, *, stop: bool = False) -> Metrics:
        """One update from this rank's slots. stop: this rank was asked to stop."""
        loss, load, dropped = self._accumulate(batch)
        flag = torch.tensor(float(stop), dtype=torch.float64, device=self._device)
        # why: ranks of one tp group saw the same samples, which count once.
        seen = torch.cat([torch.stack([loss, dropped]), load.flatten()])
        seen = seen * float(self._mesh.tp.rank == 0)
        done: list[Metrics] = []
        with spending("optimizer"):
            self._state.backend.step(lambda: done.append(self._update(flag, seen, load.shape)))
        return done[0]

    def _update(self, flag: Tensor, seen: Tensor, shape: torch.Size) -> Metrics:
        """Agrees with all ranks on loss and norm, and moves the pieces, or leaves them as they are.

        seen: this rank's loss, dropped picks and load, flat; shape: of the load.
        """
        state, cfg = self._state, self._cfg
        gradients, pieces = state.backend.gradients(), state.backend.pieces
        squares = sum_of_squares(((pieces[n], g) for n, g in gradients.items()), self._device)
        local = torch.cat([torch.stack([squares, flag]), seen])
        total, maxima = ordered_sum_and_max(local, state.fp8.maxima())  # dist: every rank, once
        norm, stop, loss, dropped = total[0].sqrt(), total[1], total[2], total[3]
        load = total[4:].view(shape)
        judged = torch.stack([loss, norm])
        skip, limits = state.guard.judge(judged)
        divisor = torch.ones_like(norm) if cfg.clip is None else (norm / cfg.clip).clamp(min=1.0)
        divisor = torch.where(skip, torch.ones_like(divisor), divisor)
        factor = self._schedule(state.step, cfg.steps)
        lr = state.optimizer.step(gradients, factor, divisor, skip)
        state.ema.update(state.step, state.optimizer.updates, skip)
        state.fp8.advance(maxima, skip)
        if cfg.moe is not None and cfg.moe.balance == "bias":
            biases = [layer.router.bias for layer in self._layers]
            balance.update_biases(biases, load.sum(dim=1), cfg.moe.bias_rate, skip)
        self._report(torch.cat([torch.stack([stop, skip.double()]), judged, limits]))
        self._dropped = self._dropped + dropped
        return Metrics(loss, norm, skip.double(), load, self._dropped, lr)

    def warm_up(self, shape: tuple[int, ...]) -> None:
        """Forward and backward of one micro-batch of zeros, from which nothing is kept.

        shape: of a latent, (C, H, W). What compiles at first use does so here, before step 0.
        """
        size = self._cfg.global_batch // (self._mesh.sizes.data * self._cfg.accum)
        slots = np.arange(size)
        labels = torch.zeros(size, dtype=torch.int64)
        loss, _, _ = self._forward(Batch(torch.zeros(size, *shape), labels, slots, slots))
        self._state.backend.backward(loss.sum(), last=True)
        self._state.backend.forget()
        self._state.fp8.loaded()  # what was seen of the zeros is forgotten too

    @property
    def position(self) -> int:
        """Of the batch that the next `state.advance` puts behind us."""
        return self._state.cursor.clear(self._cfg.global_batch).position

    def settle(self, *, everything: bool = False) -> bool:
        """Takes note of what past steps decided; whether any of them agreed to stop.

        The newest step is left in flight unless `everything`, as a checkpoint needs, or a stop.
        After `max_skips` skipped steps in a row `lost` is set, on all ranks alike, until `forget`.
        """
        while self.lost is None and len(self._pending) > (0 if everything or self.stop else 1):
            past = self._pending.popleft()
            if past.arrived is not None:
                past.arrived.synchronize()  # sync: a copy started a step ago
            stop, skip, loss, norm, *limits = past.values.tolist()
            self.stop = self.stop or stop > 0
            if skip:
                self._say(reasons(past.step, (loss, norm), (limits[0], limits[1])))
            self._count(past.data, skipped=skip > 0)
        return self.stop

    def forget(self) -> None:
        """Drops what steps have decided that a roll-back undid."""
        self._pending.clear()
        self.lost = None

    def _count(self, data: Stretch, *, skipped: bool) -> None:
        state = self._state
        if not skipped:
            state.skipped_in_a_row = state.skipped_from = 0
            return
        if state.skipped_in_a_row == 0:
            state.skipped_from = data[0]
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= self._cfg.max_skips:
            self.lost = (state.skipped_from, data[1])

    def _report(self, values: Tensor) -> None:
        arrived = None
        if values.is_cuda:
            host = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        data = (self.position, self.position + self._cfg.global_batch)
        self._pending.append(_Pending(self._state.step + 1, data, values, arrived))

    def _accumulate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a step; this rank's loss sum (), load (L, T, E) and dropped picks ()."""
        cfg = self._cfg
        num_experts = cfg.moe.experts if cfg.moe is not None else 0
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        dropped = torch.zeros_like(loss)
        load = loss.new_zeros(len(self._layers), cfg.time_bins, num_experts)
        for index, micro in enumerate(batch.split(cfg.accum)):
            with spending("forward"):
                micro_loss, routings, bins = self._forward(micro)
                objective = micro_loss.sum() / cfg.global_batch
                loss += objective.detach().double()
                if routings and cfg.moe is not None:
                    load += balance.by_time(routings, bins, cfg.time_bins)
                    dropped += torch.stack([routing.dropped for routing in routings]).sum()
                    objective = objective + balance.auxiliary_loss(
                        cfg.moe,
                        routings,
                        global_batch=cfg.global_batch,
                        everywhere=partial(ordered_sum, axis=self._mesh.data),
                    )
            with spending("backward"):
                self._state.backend.backward(objective, last=index == cfg.accum - 1)
        return loss, load, dropped

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> Tensor:
        """Mean loss, (), of a step's first micro-batch over all ranks; nothing is changed."""
        losses, _, _ = self._forward(batch.split(self._cfg.accum)[0])
        local = torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        total = ordered_sum(local, self._mesh.data)  # dist: the data ranks
        return total[0] / total[1]

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Routing], Tensor]:
        """Loss of each sample, (B,); routing of each MoE layer; timestep bin of a sample, (B,)."""
        shape, tables = batch.x.shape[1:], self._cfg.dropout_draws
        drawn = draw(self._state.seed, self._state.step, batch.slots, shape, tables=tables)
        batch, noise = batch.to(self._device), sent(drawn.noise, self._device)
        t = sent(self._objective.time(drawn.u), self._device)
        x_t = self._objective.corrupt(batch.x, noise, t)
        cond = self._some_null(batch.labels, drawn)
        pred, routings = self._state.model(x_t, self._objective.embed(t), cond, routing=True)
        bins = (self._objective.fraction(t) * self._cfg.time_bins).long()
        bins = bins.clamp(max=self._cfg.time_bins - 1)
        return self._objective.loss(pred, batch.x, noise, t), routings, bins

    def _some_null(self, labels: Tensor, drawn: Draws) -> Tensor:
        drop = sent(drawn.drop, labels.device) < self._cfg.label_dropout
        labels = labels if drop.ndim == 1 else labels[:, None]
        return torch.where(drop, self._cfg.null_label, labels)
