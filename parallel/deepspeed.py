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
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from parallel.errors import LayoutError
from parallel.mesh import Degrees, Mesh
from parallel.shards import Box, Extent, Piece, box_of

_EXPERTS = "experts"  # DeepSpeed's name for the group that sums gradients of experts
_SUB_GROUP = 1 << 26  # elements of ZeRO-3 whose gradients are laid flat at a time: 256 MB
_BUCKET = 1 << 26  # elements reduced or gathered in one call, at most


def _groups(mesh: Mesh) -> Any:
    """Our mesh by the names that DeepSpeed asks an `mpu` for.

    Why given always: without one DeepSpeed makes a second world group, with a timeout of its own.
    """
    tp, data = mesh.tp, mesh.shard
    return SimpleNamespace(
        get_model_parallel_group=lambda: tp.group,
        get_model_parallel_rank=lambda: tp.rank,
        get_model_parallel_world_size=lambda: tp.size,
        get_data_parallel_group=data.get_group,
        get_data_parallel_rank=data.get_local_rank,
        get_data_parallel_world_size=data.size,
    )


def check(
    stage: int,
    sizes: Degrees,
    *,
    experts: bool = False,
    compiled: bool = False,
    deterministic: bool = False,
) -> None:
    """Raises LayoutError if ZeRO of this stage cannot run the layout; needs no process group.

    experts: the model has routed experts. compiled: its units are.
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
    if stage == 3 and compiled:
        raise LayoutError(
            f"{engine} with compiled units: DeepSpeed gathers each layer's weights inside them, "
            "and every gather compiles anew; do not compile, or set engine=zero2 or engine=fsdp2"
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
    mpu: `parallel.megatron.state` when Megatron's layers are in the model; None: our mesh's groups.
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
        mpu: Any = None,
        persist: int = 100_000,
    ) -> None:
        check(stage, mesh.sizes, experts=bool(experts))
        self.model, self.device = model, device
        self._stage, self._mesh, self._mpu = stage, mesh, mpu or _groups(mesh)
        # why: where nothing is cut, experts are summed over the data ranks like all others.
        apart = mesh.sizes.tp > 1 or mesh.sizes.ep > 1
        self._experts = frozenset(experts) if apart else frozenset()
        cut = dict(boxes or {})
        whole = {name: box_of(tensor) for name, tensor in model.named_parameters()}
        _prepare(device)
        config = _config(model, stage, device, offload, persist)
        self._materialise(fill, config)
        self._initialize(config)
        self._slots = {slot.name: slot for slot in self._partitions()}
        self.pieces: dict[str, Piece] = {}
        for name, box in (whole | cut).items():
            slot = self._slots[name]
            values = self._flats[slot.group].detach()[slot.place : slot.place + slot.size]
            counted = mesh.tp.rank == 0 or name in cut or name in self._experts
            self.pieces[name] = Piece(values, Extent(box, slot.start, slot.stop), counted)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients of this rank's loss; stages 2 and 3 reduce them at once, 1 at the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        # why: both are part of DeepSpeed's forward; the model is called without it.
        self._zero.clear_backward_seen_flag()
        self._engine._backward_prologue()
        # why: stage 3 only averages; undone in the loss, exactly for a power of two.
        ranks = self._mesh.sizes.data if self._stage == 3 else 1
        self._engine.backward(loss * ranks, scale_wrt_gas=False)  # dist: data ranks

    def gradients(self) -> dict[str, Tensor]:
        """Views of what DeepSpeed holds; to be asked for before or inside the update."""
        if self._stage < 3:
            self._zero._wait_for_offload_copies()  # sync: with offload only
        parts = [self._reduced(group) for group in range(len(self._flats))]
        found = {}
        for name, piece in self.pieces.items():
            slot = self._slots[name]
            part = parts[slot.group][slot.place] if slot.size else piece.values
            found[name] = part[: slot.size]
        return found

    def step(self, update: Callable[[], None]) -> None:
        """Runs `update` inside DeepSpeed's step, which then publishes the partitions."""
        self._shell.update = update
        self._engine.step()  # dist: data ranks
        assert self._shell.update is None, "DeepSpeed left the update out"

    def forget(self) -> None:
        self.step(lambda: None)

    @torch.no_grad()
    def publish(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()  # dist: data ranks
            return
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()  # dist: data ranks

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model."""
        self._engine.destroy()

    def _materialise(self, fill: Callable[[str, Tensor], None], config: dict[str, Any]) -> None:
        """Gives parameters and buffers their memory and values; under stage 3 one at a time."""
        import deepspeed

        partition = None
        if self._stage == 3:
            partition = deepspeed.zero.Init(
                data_parallel_group=self._mpu.get_data_parallel_group(),
                config_dict_or_path=config,
                dtype=torch.float32,
                mpu=self._mpu,
            )
        for path, module in self.model.named_modules():
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    value = torch.empty_like(tensor, device=self.device)
                    fill(f"{path}.{name}".lstrip("."), value)
                    module._buffers[name] = value
            for name, tensor in module._parameters.items():
                if tensor is None:
                    continue
                full = f"{path}.{name}".lstrip(".")
                value = torch.empty_like(tensor, device=self.device, requires_grad=False)
                fill(full, value)
                parameter: Any = nn.Parameter(value)
                # why: values are a function of their address already, and DeepSpeed would give
                # every rank those of the first; its broadcast also fails for a scalar.
                parameter.ds_optim_param = True
                if full in self._experts:
                    parameter.allreduce, parameter.group_name = False, _EXPERTS
                module._parameters[name] = parameter
                if partition is not None:
                    partition._convert_to_deepspeed_param(parameter)
                    parameter.partition()

    def _initialize(self, config: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.utils import groups, logger

        model: nn.Module = self.model
        named = list(model.named_parameters())
        sets: list[dict[str, Any]] = [
            {"params": [p for name, p in named if name not in self._experts]}
        ]
        if self._experts:
            own = [p for name, p in named if name in self._experts]
            sets.append({"params": own, "moe": True, "name": _EXPERTS})
            groups._EXPERT_PARALLEL_GROUP[_EXPERTS] = self._mesh.ep.group
            groups._EXPERT_DATA_PARALLEL_GROUP[_EXPERTS] = self._mesh.experts.get_group()
            model = nn.ModuleList([model, _sign_of_experts()])
        self._shell = _Shell(sets)
        # why: it would warn of an optimizer it does not know, and say so on stdout.
        logger.setLevel(logging.ERROR)
        engines: Any = deepspeed.initialize(  # dist: every rank
            model=model,
            optimizer=self._shell,
            config=config,
            mpu=self._mpu,
            dist_init_required=False,
        )
        logger.setLevel(logging.WARNING)
        self._engine = engines[0]
        self._zero = self._engine.optimizer
        # why: the norm is ours, over all axes; DeepSpeed would leave out a step by its own.
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [torch.zeros((), device=self.device)]
            _hide_gathers(self._zero.parameter_offload)
        else:
            self._zero.compute_grad_norm = False

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's fp32 partition of each group of parameters."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _partitions(self) -> Iterator["_Slot"]:
        """Where this rank's part of each parameter lies in the partitions.

        ZeRO-1 and 2 lay a group's parameters end to end and cut the whole evenly; ZeRO-3 cuts each
        parameter and lays the parts end to end. Both pad at the end.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        zero = self._zero
        if self._stage == 3:
            for group, parameters in enumerate(zero.fp16_groups):
                place, rank = 0, self._mpu.get_data_parallel_rank()
                for parameter in parameters:
                    size = parameter.partition_numel()
                    start, stop = (min(size * r, parameter.ds_numel) for r in (rank, rank + 1))
                    yield _Slot(names[id(parameter)], group, place, start, stop)
                    place += size
            return
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[group])
            first = size * dist.get_rank(zero.real_dp_process_group[group])
            offsets = zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(parameters, offsets, strict=True):
                ends = (first - offset, first - offset + size)
                start, stop = (min(max(end, 0), parameter.numel()) for end in ends)
                place = offset + start - first
                yield _Slot(names[id(parameter)], group, place if stop > start else 0, start, stop)

    def _reduced(self, group: int) -> Mapping[int, Tensor]:
        """Reduced gradients of a group by their place in its partition."""
        flat = self._flats[group].grad
        if flat is not None:  # with offload, or the update of this group has begun
            return {s.place: flat[s.place :] for s in self._slots.values() if s.group == group}
        parts, place = {}, 0
        for part in self._zero.averaged_gradients[group]:
            parts[place] = part.reshape(-1)
            place += part.numel()
        return parts


@dataclass(frozen=True)
class _Slot:
    """This rank's part of a parameter, and where it lies in the partition of its group."""

    name: str
    group: int
    place: int
    start: int  # in the parameter
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Shell(torch.optim.Optimizer):
    """The optimizer DeepSpeed calls once a group: the first call runs the update of all groups.

    Why at the first: all gradients are reduced by then, and no partition has been published.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.update: Callable[[], None] | None = None

    def step(self, closure: Any = None) -> Any:
        update, self.update = self.update, None
        if update is not None:
            update()


def _prepare(device: torch.device) -> None:
    """Imports DeepSpeed for this device, quietly."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists; srun sets none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed.ops
    # why: DeepSpeed calls collectives by names that the newest torch calls old.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # why: it would probe for operators with a compiler, then compile one for inference on CPU, in
    # every rank at once; training uses none of them.
    vars(deepspeed.ops)["__compatible_ops__"] = {}


def _config(
    model: nn.Module, stage: int, device: torch.device, offload: bool, persist: int
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    largest = max(tensor.numel() for tensor in model.parameters())
    total = sum(tensor.numel() for tensor in model.parameters())
    bucket = max(2, min(total + total % 2, max(_BUCKET, largest + largest % 2)))
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "sub_group_size": _SUB_GROUP,
        "stage3_param_persistence_threshold": persist,
        "memory_efficient_linear": False,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,  # read by nobody; it must be there
        "gradient_accumulation_steps": 1,  # `backward` is told which micro-batch is the last
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _hide_gathers(offload: Any) -> None:
    """Gathering and freeing weights becomes invisible to dispatch modes.

    Why: a recomputed region counts its operators, and DeepSpeed gathers other weights ahead in
    backward than it did in forward.
    """
    for way in ("forward", "backward"):
        for end in ("pre", "post"):
            name = f"{end}_sub_module_{way}_function"
            setattr(offload, name, _disable_current_modes()(getattr(offload, name)))


def _sign_of_experts() -> nn.Module:
    """An `MoE` in the tree, never called: without one DeepSpeed knows no parameter as an expert."""
    from deepspeed.moe.layer import MoE

    class Sign(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Nothing: the groups are our mesh's."""

    return Sign()
