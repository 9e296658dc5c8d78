"""DeepSpeed ZeRO-1, 2 and 3 behind the face of `parallel.backend`.

DeepSpeed reduces, partitions, offloads and publishes; it knows no optimizer. The one it is handed
is a shell whose step runs the caller's update on the fp32 partitions, so clip, guard, schedule,
AdamW and averages are the same code as under FSDP2. DeepSpeed always runs in fp32: activations take
the model's own dtype, weights are cast where they are used. It is imported when a `ZeRO` is built.
"""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.errors import LayoutError
from parallel.mesh import Degrees, Mesh
from parallel.shards import Box, Extent, Piece, box_of

_EXPERTS = "experts"  # DeepSpeed's name for the group that sums gradients of experts
_SUB_GROUP = 1 << 26  # elements of ZeRO-3 whose gradients are laid flat at a time: 256 MB
_BUCKET = 1 << 26  # elements reduced or gathered in one call, at most


class Mpu(Protocol):
    """The groups of a layout by the names that DeepSpeed asks for."""

    def get_model_parallel_group(self) -> dist.ProcessGroup | None: ...
    def get_model_parallel_rank(self) -> int: ...
    def get_model_parallel_world_size(self) -> int: ...
    def get_data_parallel_group(self) -> dist.ProcessGroup: ...
    def get_data_parallel_rank(self) -> int: ...
    def get_data_parallel_world_size(self) -> int: ...


class Groups:
    """`Mpu` straight from our mesh.

    Why given always: without one DeepSpeed makes a second world group, with a timeout of its own.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._tp, self._data = mesh.tp, mesh.shard

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tp.group

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.get_group()

    def get_data_parallel_rank(self) -> int:
        return self._data.get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()


def check(
    stage: int, sizes: Degrees, *, experts: bool = False, deterministic: bool = False
) -> None:
    """Raises LayoutError if ZeRO of this stage cannot run the layout; needs no process group.

    experts: the model has routed experts.
    """
    engine = f"engine=zero{stage}"
    if sizes.dp_replicate > 1:
        raise LayoutError(
            f"{engine} with mesh.dp_replicate={sizes.dp_replicate}: ZeRO shards over all data "
            f"ranks and keeps no replicas; set mesh.dp_replicate=1 mesh.dp_shard={sizes.data}, "
            "or engine=fsdp2"
        )
    if stage == 3 and sizes.ep > 1:
        raise LayoutError(
            f"{engine} with mesh.ep={sizes.ep}: DeepSpeed cannot partition the weights of experts "
            "that differ by rank; set engine=zero2, or mesh.ep=1, or engine=fsdp2"
        )
    if stage == 3 and sizes.tp > 1 and experts:
        raise LayoutError(
            f"{engine} with mesh.tp={sizes.tp} and routed experts: gradients of experts sum over "
            "more ranks than those of dense weights, which DeepSpeed does for stages 1 and 2 only; "
            "set engine=zero2, or mesh.tp=1, or engine=fsdp2"
        )
    if deterministic and sizes.world > 1:
        raise LayoutError(
            f"{engine} with deterministic=true: DeepSpeed adds gradients in the order of its "
            "all-reduce, which depends on the topology; set deterministic=false or engine=fsdp2"
        )


class ZeRO:
    """A model under DeepSpeed.

    model: on meta, cut for tensor and expert parallelism already; taken over and materialised.
    fill: gives one parameter or buffer, as large as its box, its values by name, in place.
    boxes: where parameters lie that are cut (tensor parallel columns and rows, local experts).
    experts: names of the parameters of routed experts; their gradients sum over the expert view.
    persist: ZeRO-3 keeps parameters of up to so many elements gathered.

    A piece of a parameter that is neither cut nor an expert's is held alike by every tensor
    parallel rank and counted on the first. Under stages 1 and 2 the whole model is on every rank,
    as it must be; under stage 3 no more than one whole parameter at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        mesh: Mesh,
        device: torch.device,
        fill: Callable[[str, Tensor], None],
        boxes: Mapping[str, Box] | None = None,
        experts: Collection[str] = (),
        offload: bool = False,
        mpu: Mpu | None = None,
        persist: int = 100_000,
    ) -> None:
        check(stage, mesh.sizes, experts=bool(experts))
        self.model, self.device = model, device
        self._stage, self._mesh, self._mpu = stage, mesh, mpu or Groups(mesh)
        # why: experts are data of the dense view when nothing is cut; then they need no group.
        apart = mesh.sizes.tp > 1 or mesh.sizes.ep > 1
        self._experts = frozenset(experts) if apart else frozenset()
        _prepare(device)
        config = _config(model, stage, device, offload, persist)
        self._materialise(fill, config)
        self._engine, self._shell = self._initialize(config)
        self._zero: Any = self._engine.optimizer
        # why: norm and guard are ours; DeepSpeed would drop an update when its own norm overflows.
        if stage == 3:
            self._zero._get_norm_groups = lambda: [torch.zeros((), device=device)]
        else:
            self._zero.compute_grad_norm = False
        self._slots = dict(self._stage3_slots() if stage == 3 else self._stage12_slots())
        flats = self._flats()
        self.pieces: dict[str, Piece] = {}
        for name, tensor in model.named_parameters():
            group, place, start, stop = self._slots[name]
            box = (boxes or {}).get(name) or _whole(tensor)
            counted = mesh.tp.rank == 0 or name in (boxes or {}) or name in self._experts
            values = flats[group].detach()[place : place + stop - start]
            self.pieces[name] = Piece(values, Extent(box, start, stop), counted)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients of this rank's loss; stages 2 and 3 reduce them at once, 1 at the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        # why: both belong to DeepSpeed's own forward, which wraps the model; ours is called bare.
        self._zero.clear_backward_seen_flag()
        self._engine._backward_prologue()
        # why: stage 3 knows averages only; exact for a power of two, else rounded once more.
        ranks = self._mesh.sizes.dp_shard if self._stage == 3 else 1
        self._engine.backward(loss * ranks, scale_wrt_gas=False)  # dist: data ranks

    def gradients(self) -> dict[str, Tensor]:
        """Reduced gradients, views of what DeepSpeed holds; not to be kept beyond `step`."""
        if self._zero_offloads:
            self._settle_offload()
        parts = [self._reduced(group) for group in range(len(self._flats()))]
        out = {}
        for name, piece in self.pieces.items():
            group, place, start, stop = self._slots[name]
            if start == stop:
                out[name] = piece.values
            else:
                base, part = parts[group].get(place) or (0, parts[group][-1][1])
                out[name] = part[place - base : place - base + stop - start]
        return out

    def step(self, update: Callable[[], None]) -> None:
        self._shell.update = update
        self._engine.step()  # dist: data ranks
        assert self._shell.update is None, "DeepSpeed left the update out"

    @torch.no_grad()
    def publish(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()  # dist: data ranks
            return
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()  # dist: data ranks

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model."""
        self._engine.destroy()
