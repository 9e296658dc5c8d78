"""Where a model meets the mesh: built on meta, cut, allocated, then filled from addresses.

The order is the content: no rank ever holds the whole model (but ZeRO-1 and 2, as they must), and
every layout starts from the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from parallel import fsdp, tensor
from parallel.backend import Backend
from parallel.dispatch import Dispatcher, Exact, Static
from parallel.fp8.backends import backend_for, capability
from parallel.fp8.recipes import FP8Config
from parallel.fp8.scaling import attach
from parallel.mesh import Mesh, MeshConfig
from parallel.precision import COMPUTE, Precision
from parallel.remat import RematConfig, apply, compile_units
from pretrain.models.build import Model, ModelConfig, build
from pretrain.models.init import Filler, initialise
from pretrain.models.moe import MoEConfig, moe_layers

EngineName = Literal["fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Compute:
    """How blocks compute: what holds them, in which dtype, what backward recomputes."""

    engine: EngineName = "fsdp2"
    precision: Precision = "fp32"
    remat: RematConfig = RematConfig()
    compiled: bool = False
    fp8: FP8Config = FP8Config()


def parallelize(
    cfg: ModelConfig,
    layout: MeshConfig,
    mesh: Mesh,
    how: Compute,
    *,
    seed: int,
    device: torch.device,
) -> Backend:
    """The model of `cfg`, cut over `mesh` and initialised from `seed`."""
    fsdp2 = how.engine == "fsdp2"
    model = sharded(cfg, layout, mesh, how) if fsdp2 else _cut_plainly(cfg, mesh, how)
    if how.precision == "fp8":
        attach(model.units(), how.fp8, backend_for(how.fp8, capability(device)), mesh.tp, device)
    if how.compiled:
        compile_units(model.units())
    if not fsdp2:
        return _zero(model, int(how.engine[-1]), layout, mesh, cfg.zero_init_std, seed, device)
    fsdp.materialise(model, device, offload=layout.offload)
    initialise(model, seed, cfg.zero_init_std)
    return fsdp.FSDP(model.train(), mesh, device)


def sharded(cfg: ModelConfig, layout: MeshConfig, mesh: Mesh, how: Compute) -> Model:
    """The model on meta, cut as FSDP2 holds it; nothing is allocated."""
    model = _on_meta(cfg, how.precision)
    cut(model, mesh, tensor.DTENSOR)
    apply(model.units(), how.remat)
    parts = fsdp.Parts(model.units(), model.routers(), [e.experts for e in moe_layers(model)])
    fsdp.shard(
        model,
        parts,
        mesh,
        how.precision,
        reshard_after_forward=layout.reshard_after_forward,
        offload=layout.offload,
        unit_bytes=layout.unit_mb << 20,
    )
    return model


def _cut_plainly(cfg: ModelConfig, mesh: Mesh, how: Compute) -> Model:
    """The model on meta as DeepSpeed takes it: plain local tensors, Megatron's linears."""
    hold = tensor.Hold(as_dtensor=False)
    if mesh.tp.size > 1:
        from parallel import megatron

        hold = tensor.Hold(False, megatron.column, megatron.row, megatron.gathered)
    model = _on_meta(cfg, how.precision)
    cut(model, mesh, hold)
    apply(model.units(), how.remat)
    return model.train()


def _zero(
    model: Model,
    stage: int,
    layout: MeshConfig,
    mesh: Mesh,
    zero_init_std: float,
    seed: int,
    device: torch.device,
) -> Backend:
    from parallel import deepspeed

    mpu = None
    if mesh.tp.size > 1:
        from parallel import megatron

        mpu = megatron.state(mesh)
    fill = Filler(model, seed, zero_init_std)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    experts = [layer.experts for layer in moe_layers(model)]
    return deepspeed.ZeRO(
        model,
        stage=stage,
        mesh=mesh,
        device=device,
        fill=fill,
        boxes={name: box for name, box in fill.boxes.items() if box.sizes != box.shape},
        experts=[names[id(p)] for module in experts for p in module.parameters()],
        offload=layout.offload,
        mpu=mpu,
    )


def _on_meta(cfg: ModelConfig, precision: Precision) -> Model:
    with torch.device("meta"):
        model = build(cfg)
    model.dtype = COMPUTE[precision]
    return model


def cut(model: Model, mesh: Mesh, hold: tensor.Hold) -> None:
    """Cuts a model on meta over the tensor and the expert axis, in place."""
    tensor.apply(model, mesh.tp, hold)
    for layer in moe_layers(model):
        layer.dispatcher = _dispatcher(layer.cfg, mesh)
        if mesh.ep.size > 1:
            for name, whole in list(layer.experts.named_parameters(recurse=False)):
                tensor.give_cut(layer.experts, name, whole, 0, mesh.ep, hold)


def _dispatcher(cfg: MoEConfig, mesh: Mesh) -> Dispatcher:
    if cfg.dispatcher == "static":
        return Static(cfg.experts, cfg.capacity, mesh.ep, mesh.tp)
    return Exact(cfg.experts, mesh.ep, mesh.tp)
