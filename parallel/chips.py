"""What devices can do: a table from vendors' data sheets, and a product measured where there is
none.

FLOP/s are dense, without sparsity, of one device; bandwidths of links are one way, of one device.
"""

import statistics
import time
from dataclasses import dataclass

import torch

_SIDE = {"cuda": 8192, "cpu": 768}  # of the square matrices that are multiplied
_ROUNDS = 5


@dataclass(frozen=True)
class Chip:
    name: str
    bf16: float  # FLOP/s
    fp8: float | None  # FLOP/s; None: the chip has none
    memory: int  # bytes
    memory_rate: float  # bytes/s
    nvlink: float  # bytes/s to the other devices of a node
    nic: float  # bytes/s to other nodes, of the network card that such nodes have for each device


# Sources: NVIDIA's data sheets of A100, H100, H200 and HGX B200. Network: ConnectX-6 200 Gb/s in a
# DGX A100, ConnectX-7 400 Gb/s in DGX H100, H200 and B200.
CHIPS: dict[str, Chip] = {
    "a100": Chip("A100", 312e12, None, 80 << 30, 2.039e12, 300e9, 25e9),
    "a100-40gb": Chip("A100 40 GB", 312e12, None, 40 << 30, 1.555e12, 300e9, 25e9),
    "h100": Chip("H100", 989e12, 1979e12, 80 << 30, 3.35e12, 450e9, 50e9),
    "h100-pcie": Chip("H100 PCIe", 756e12, 1513e12, 80 << 30, 2.0e12, 300e9, 50e9),
    "h200": Chip("H200", 989e12, 1979e12, 141 * 10**9, 4.8e12, 450e9, 50e9),
    "b200": Chip("B200", 2250e12, 4500e12, 180 * 10**9, 7.7e12, 900e9, 50e9),
}


def chip_of(name: str) -> Chip | None:
    """The chip that a driver calls so, as "NVIDIA H100 80GB HBM3"; None: not in the table."""
    words = name.upper()
    if "A100" in words:
        return CHIPS["a100-40gb" if "40GB" in words else "a100"]
    if "H100" in words:
        return CHIPS["h100-pcie" if "PCIE" in words else "h100"]
    return next((CHIPS[key] for key in ("h200", "b200") if key.upper() in words), None)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that a share is taken of, and where the figure comes from.

    Of a chip in the table its data sheet's bf16 figure, as published MFU is; of any other device
    what a large product in `dtype` reaches on it now.
    """
    if device.type == "cuda":
        chip = chip_of(torch.cuda.get_device_name(device))
        if chip is not None:
            return chip.bf16, f"data sheet of {chip.name}, bf16"
    rate = measured_matmul(device, dtype)
    return rate, f"a {_SIDE[device.type]}×{_SIDE[device.type]} product in {dtype}, measured"


def measured_matmul(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large square product on this device alone, median of a few; takes well under a
    second. It talks to nobody.
    """
    side = _SIDE[device.type]
    # why: a product of equal numbers needs less power than one of training, and runs faster.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for turn in range(1 + _ROUNDS):
        _settle(device)
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        _settle(device)
        if turn:  # the first one warms up
            times.append(time.perf_counter() - begin)
    return 2 * side**3 / statistics.median(times)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: what is timed begins and ends here
