"""What dtype each thing has. Explicit dtypes, no autocast.

Master weights, gradients after reduction, moments and EMA are always fp32. Routers compute in fp32
whatever the precision (a rounded logit changes the choice of expert).
"""

import os
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

Precision = Literal["fp32", "bf16", "fp8"]
# why: fp8 is of products alone (`parallel.fp8`); what lies between them is bf16.
COMPUTE: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}


def policy(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP2's dtypes for a block: gathered in the compute dtype, reduced in fp32.

    Inputs are not cast: a bf16 timestep has 8 bits, of which 999 needs 10.
    """
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE[precision],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def make_deterministic() -> None:
    """Kernels with the same bits in every run; an operator that has none raises. Before any work.

    Source: torch's notes on reproducibility. Sums over ranks are the mesh's business (`ordered`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # why: it would write over every fresh buffer, which nothing here reads before it is filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
