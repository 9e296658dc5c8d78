"""Where a model meets the mesh: built on meta, cut, allocated, then filled from addresses.

The order is the content: no rank ever holds the whole model, and every layout starts from the same.
"""

import torch
from torch import nn

from parallel import fsdp, tensor
from parallel.backend import Backend
from parallel.dispatch import Dispatcher, Exact, Static
from parallel.mesh import Mesh, MeshConfig
from parallel.precision import COMPUTE, Precision
from parallel.remat import RematConfig, apply, compile_units
from pretrain.models.build import Model, ModelConfig, build
from pretrain.models.init import initialise
from pretrain.models.moe import MoEConfig, moe_layers


def parallelize(
    cfg: ModelConfig,
    layout: MeshConfig,
    mesh: Mesh,
    remat: RematConfig,
    precision: Precision,
    *,
    compiled: bool = False,
    seed: int,
    device: torch.device,
) -> Backend:
    """The model of `cfg`, cut over `mesh` and initialised from `seed`."""
    model = sharded(cfg, layout, mesh, remat, precision)
    if compiled:
        compile_units(model.units())
    fsdp.materialise(model, device, offload=layout.offload)
    initialise(model, seed, cfg.zero_init_std)
    return fsdp.FSDP(model.train(), mesh, device)


def sharded(
    cfg: ModelConfig, layout: MeshConfig, mesh: Mesh, remat: RematConfig, precision: Precision
) -> nn.Module:
    """The model on meta, cut as FSDP2 holds it; nothing is allocated."""
    with torch.device("meta"):
        model = build(cfg)
    model.dtype = COMPUTE[precision]
    cut(model, mesh, tensor.DTENSOR)
    apply(model.units(), remat)
    parts = fsdp.Parts(model.units(), model.routers(), [e.experts for e in moe_layers(model)])
    return fsdp.shard(
        model,
        parts,
        mesh,
        precision,
        reshard_after_forward=layout.reshard_after_forward,
        offload=layout.offload,
        unit_bytes=layout.unit_mb << 20,
    )


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
