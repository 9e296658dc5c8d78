"""One training step: accumulate, reduce, guard, update. Saves nothing and logs nothing.

The step costs one collective of its own beside FSDP's: loss, gradient norm, the stop flag and
expert counts travel together. What it decides is read one step later from an asynchronous copy.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from parallel import fsdp
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
    lr: float


class TooManySkipsError(RuntimeError):
    """The run does not recover by leaving steps out."""


class Engine:
    """Steps a TrainState. All ranks call `step` with their slots of the same global batch."""

    def __init__(
        self, state: TrainState, objective: Objective, schedule: ScheduleConfig, cfg: StepConfig
    ) -> None:
        self._state = state
        self._objective = objective
        self._schedule = schedule
        self._cfg = cfg
        self._layers = moe_layers(state.model)
        self._device = next(state.model.parameters()).device
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.stop = False  # all ranks have agreed to stop

    def step(self, batch: Batch, *, stop: bool = False) -> Metrics:
        """One update from this rank's slots. stop: this rank was asked to stop."""
        state, cfg = self._state, self._cfg
        loss, load = self._accumulate(batch)
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        squares = sum_of_squares(gradients, self._device)
        flag = torch.tensor(float(stop), dtype=torch.float64, device=self._device)
        local = torch.cat([torch.stack([loss, squares, flag]), load.flatten()])
        total = ordered_sum(local)  # dist: every rank, once a step
        loss, norm = total[0], total[1].sqrt()
        load = total[3:].view_as(load)
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        divisor = torch.ones_like(norm) if cfg.clip is None else (norm / cfg.clip).clamp(min=1.0)
        divisor = torch.where(skip, torch.ones_like(divisor), divisor)
        lr = state.optimizer.step(self._schedule(state.step, cfg.steps), divisor, skip)
        state.optimizer.zero_grad()
        state.ema.update(state.step, skip)
        if cfg.moe is not None and cfg.moe.balance == "bias":
            biases = [layer.router.bias for layer in self._layers]
            balance.update_biases(biases, load.sum(dim=1), cfg.moe.bias_rate, skip)
        self._report(torch.stack([total[2], skip.double()]))
        return Metrics(loss, norm, skip.double(), load, lr)

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

    def _accumulate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of the whole step; returns this rank's loss sum, (), and load, (L, T, E)."""
        cfg = self._cfg
        num_experts = cfg.moe.experts if cfg.moe is not None else 0
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        load = loss.new_zeros(len(self._layers), cfg.time_bins, num_experts)
        for index, micro in enumerate(batch.split(cfg.accum)):
            fsdp.accumulate(self._state.model, last=index == cfg.accum - 1)
            micro_loss, routings, bins = self._forward(micro.to(self._device))
            objective = micro_loss.sum() / cfg.global_batch
            loss += objective.detach().double()
            if routings and cfg.moe is not None:
                load += balance.by_time(routings, bins, cfg.time_bins)
                objective = objective + balance.auxiliary_loss(
                    cfg.moe, routings, global_batch=cfg.global_batch, everywhere=ordered_sum
                )
            objective.backward()
        return loss, load

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Routing], Tensor]:
        """Loss of each sample, (B,); routing of each MoE layer; timestep bin of a sample, (B,)."""
        shape, tables = batch.x.shape[1:], self._cfg.dropout_draws
        drawn = draw(self._state.seed, self._state.step, batch.slots, shape, tables=tables)
        noise = drawn.noise.to(self._device, non_blocking=True)
        t = self._objective.time(drawn.u).to(self._device, non_blocking=True)
        x_t = self._objective.corrupt(batch.x, noise, t)
        cond = self._dropped(batch.labels, drawn)
        pred, routings = self._state.model(x_t, self._objective.embed(t), cond, routing=True)
        bins = (self._objective.fraction(t) * self._cfg.time_bins).long()
        bins = bins.clamp(max=self._cfg.time_bins - 1)
        return self._objective.loss(pred, batch.x, noise, t), routings, bins

    def _dropped(self, labels: Tensor, drawn: Draws) -> Tensor:
        drop = drawn.drop.to(labels.device, non_blocking=True) < self._cfg.label_dropout
        labels = labels if drop.ndim == 1 else labels[:, None]
        return torch.where(drop, self._cfg.null_label, labels)
