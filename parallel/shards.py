"""A sharded tensor and the part of it that this rank holds.

Arithmetic on shards is done on plain tensors: a DTensor operation costs tens of microseconds of
placement arithmetic, and an optimizer does thousands of them a step.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def like(part: Tensor, whole: Tensor) -> Tensor:
    """The sharded tensor whose local part is `part`, laid out as `whole`; shares memory."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
