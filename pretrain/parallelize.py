"""Where a model meets the mesh: built on meta, sharded, allocated, then filled from addresses.

The order is the content: no rank ever holds the whole model, and every layout starts from the same.
"""

import torch
from torch import nn

from parallel import fsdp
from parallel.mesh import Mesh
from parallel.precision import Precision
from pretrain.models.build import ModelConfig, build
from pretrain.models.init import initialise


def parallelize(
    cfg: ModelConfig,
    mesh: Mesh,
    precision: Precision,
    *,
    seed: int,
    device: torch.device,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """The model of `cfg`, sharded over the data ranks of `mesh` and initialised from `seed`."""
    with torch.device("meta"):
        model = build(cfg)
    fsdp.shard(model, model.units(), model.routers(), mesh, precision, reshard_after_forward)
    fsdp.materialise(model, device)
    initialise(model, seed, cfg.zero_init_std)
    return model.train()
