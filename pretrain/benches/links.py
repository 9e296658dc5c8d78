"""What the links between ranks give: `pretrain bench links --nproc 2`."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from parallel import launch
from parallel import links as measuring
from pretrain.benches.record import record


def links(sizes: Sequence[float], rounds: int) -> dict[str, Any]:
    """What collectives reach between ranks (see parallel.links), and what a rank reaches alone.

    sizes: MiB; none: those for the device.
    """
    place = launch.Place.here()
    measuring.nodes_of(place)
    device = launch.join(place, threads=1, timeout=timedelta(minutes=10))
    each = [int(size * 2**20) for size in sizes or measuring.SIZES[device.type]]
    found = measuring.measure(place, device, each, rounds)
    alone = measuring.compute(device, rounds)
    launch.leave()
    return record("links", place) | {
        "device": device.type,
        "ranks_per_node": place.local_world,
        "rounds": rounds,
        **asdict(alone),
        "links": [asdict(link) for link in found],
    }
