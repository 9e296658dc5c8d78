"""One training step: accumulate, reduce, guard, update. Saves nothing and logs nothing.

The step costs one collective of its own beside the backend's: loss, gradient norm, the stop flag
and expert counts travel together. What it decides is read one step later from an asynchronous copy.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from parallel.mesh import Mesh
from parallel.reduce import ordered_sum, sum_of_squares
from pretrain import balance
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
    max_skips: int  # skipped steps in a row that end the run
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


class TooManySkipsError(RuntimeError):
    """The run does not recover by leaving steps out."""


class Engine:
    """Steps a TrainState. All ranks call `step` with their slots of the same global batch."""

    def __init__(
        self,
        state: TrainState,
        objective: Objective,
        schedule: ScheduleConfig,
        cfg: StepConfig,
        mesh: Mesh,
    ) -> None:
        self._state = state
        self._mesh = mesh
        self._objective = objective
        self._schedule = schedule
        self._cfg = cfg
        self._layers = moe_layers(state.model)
        self._device = state.backend.device
        self._dropped = torch.zeros((), dtype=torch.float64, device=self._device)
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.stop = False  # all ranks have agreed to stop

    def step(self, batch: Batch, *, stop: bool = False) -> Metrics:
        """One update from this rank's slots. stop: this rank was asked to stop."""
        loss, load, dropped = self._accumulate(batch)
        flag = torch.tensor(float(stop), dtype=torch.float64, device=self._device)
        # why: ranks of one tp group saw the same samples, which count once.
        seen = torch.cat([torch.stack([loss, dropped]), load.flatten()])
        seen = seen * float(self._mesh.tp.rank == 0)
        done: list[Metrics] = []
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
        total = ordered_sum(local)  # dist: every rank, once a step
        norm, stop, loss, dropped = total[0].sqrt(), total[1], total[2], total[3]
        load = total[4:].view(shape)
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        divisor = torch.ones_like(norm) if cfg.clip is None else (norm / cfg.clip).clamp(min=1.0)
        divisor = torch.where(skip, torch.ones_like(divisor), divisor)
        factor = self._schedule(state.step, cfg.steps)
        lr = state.optimizer.step(gradients, factor, divisor, skip)
        state.ema.update(state.step, skip)
        if cfg.moe is not None and cfg.moe.balance == "bias":
            biases = [layer.router.bias for layer in self._layers]
            balance.update_biases(biases, load.sum(dim=1), cfg.moe.bias_rate, skip)
        self._report(torch.stack([stop, skip.double()]))
        self._dropped = self._dropped + dropped
        return Metrics(loss, norm, skip.double(), load, self._dropped, lr)

    def settle(self, *, everything: bool = False) -> bool:
        """Takes note of what past steps decided; whether any of them agreed to stop.

        The newest step is left in flight unless `everything`, as a checkpoint needs. Raises
        TooManySkipsError after `max_skips` skipped steps in a row, on all ranks alike.
        """
        while len(self._pending) > (0 if everything else 1):
            values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()  # sync: a copy started a step ago
            self.stop = self.stop or bool(values[0] > 0)
            self._count(skipped=bool(values[1] > 0))
        return self.stop

    def _count(self, *, skipped: bool) -> None:
        state = self._state
        state.skipped += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        if state.skipped_in_a_row >= self._cfg.max_skips:
            raise TooManySkipsError(
                f"{state.skipped_in_a_row} steps in a row up to about step {state.step} had a loss "
                "or gradient that is not finite and were skipped "
                f"(max_skips={self._cfg.max_skips}); "
                "lower optim.lr, lengthen schedule.warmup, or look at the data"
            )

    def _report(self, values: Tensor) -> None:
        if values.is_cuda:
            host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((host, event))
        else:
            self._pending.append((values, None))

    def _accumulate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a step; this rank's loss sum (), load (L, T, E) and dropped picks ()."""
        cfg = self._cfg
        num_experts = cfg.moe.experts if cfg.moe is not None else 0
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        dropped = torch.zeros_like(loss)
        load = loss.new_zeros(len(self._layers), cfg.time_bins, num_experts)
        for index, micro in enumerate(batch.split(cfg.accum)):
            micro_loss, routings, bins = self._forward(micro.to(self._device))
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
            self._state.backend.backward(objective, last=index == cfg.accum - 1)
        return loss, load, dropped

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Routing], Tensor]:
        """Loss of each sample, (B,); routing of each MoE layer; timestep bin of a sample, (B,)."""
        shape, tables = batch.x.shape[1:], self._cfg.dropout_draws
        drawn = draw(self._state.seed, self._state.step, batch.slots, shape, tables=tables)
        noise = drawn.noise.to(self._device, non_blocking=True)
        t = self._objective.time(drawn.u).to(self._device, non_blocking=True)
        x_t = self._objective.corrupt(batch.x, noise, t)
        cond = self._some_null(batch.labels, drawn)
        pred, routings = self._state.model(x_t, self._objective.embed(t), cond, routing=True)
        bins = (self._objective.fraction(t) * self._cfg.time_bins).long()
        bins = bins.clamp(max=self._cfg.time_bins - 1)
        return self._objective.loss(pred, batch.x, noise, t), routings, bins

    def _some_null(self, labels: Tensor, drawn: Draws) -> Tensor:
        drop = drawn.drop.to(labels.device, non_blocking=True) < self._cfg.label_dropout
        labels = labels if drop.ndim == 1 else labels[:, None]
        return torch.where(drop, self._cfg.null_label, labels)
