"""A cluster's nodes: their resources, the choice of a node for a worker, and moves between them."""

import collections
import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._ray_cluster import ray_module

_LOG = logging.getLogger(__name__)

# Default CPUs of a worker, in Ray's count, and the largest share of the free CPUs that a pool takes
# by default, so that others find room.
_CPUS, _FREE = 0.5, 0.8
# Share of a GPU's memory that its workers take together: the rest is XLA's and the driver's.
_MEMORY = 0.9
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that is alive: Ray's id, its address, and its resources in all."""

    id: str
    address: str
    resources: Mapping[str, float]

    def room(self, demand: Mapping[str, float]) -> float:
        """Return how many workers it can hold; infinitely many where they take nothing."""
        # Ray counts in ten-thousandths.
        return min(
            (
                math.floor(self.resources.get(name, 0.0) / amount + 1e-3) + 0.0
                for name, amount in demand.items()
            ),
            default=math.inf,
        )


def live_nodes() -> list[Node]:
    """Return the cluster's nodes that are alive, in Ray's order."""
    return [
        Node(each["NodeID"], each["NodeManagerAddress"], dict(each["Resources"]))
        for each in ray_module().nodes()
        if each["Alive"]
    ]


def worker_options(options: Mapping[str, Any], num_workers: int) -> dict[str, Any]:
    """Return an actor's options, with defaults for CPUs and GPUs.

    Where the cluster has GPUs, each worker gets one, or an equal part of one and of its memory.
    """
    ray = ray_module()
    found = dict(options)
    if "num_cpus" not in found:
        free = _FREE * ray.available_resources().get("CPU", 0.0) / num_workers
        found["num_cpus"] = min(_CPUS, math.floor(100 * free) / 100)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus and "num_gpus" not in found:
        sharing = math.ceil(num_workers / gpus)
        found["num_gpus"] = math.floor(1e4 / sharing) / 1e4 if sharing > 1 else 1
    if 0 < found.get("num_gpus", 0) < 1:
        environment = dict(found.get("runtime_env") or {})
        variables = {_FRACTION: f"{_MEMORY * found['num_gpus']:.3f}"}
        environment["env_vars"] = variables | dict(environment.get("env_vars") or {})
        found["runtime_env"] = environment
    return found


def demand_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources that a worker takes, by Ray's names."""
    named = {"CPU": options.get("num_cpus", 0.0), "GPU": options.get("num_gpus", 0.0)}
    named["memory"] = options.get("memory") or 0.0
    named |= dict(options.get("resources") or {})
    return {name: float(amount) for name, amount in named.items() if amount}


def choose_node(
    nodes: Iterable[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> Node | None:
    """Return the node with the fewest workers among those with room for one more, if any."""
    roomy = [node for node in nodes if node.room(demand) > held.get(node.id, 0)]
    return min(roomy, key=lambda node: held.get(node.id, 0), default=None)


def node_to_leave(
    nodes: Sequence[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> str | None:
    """Return the node that should give a worker to another, which has at least two fewer.

    None where workers lie as evenly as the nodes' room allows.
    """
    target = choose_node(nodes, demand, held)
    if target is None or not held:
        return None
    fullest = max(held, key=lambda node: held[node])
    return fullest if held[fullest] >= held.get(target.id, 0) + 2 else None


def crowding(held: Mapping[str, int], bound: int | None) -> str | None:
    """Return a warning if one node holds more than `bound` workers, which may die together."""
    most = max(held.values(), default=0)
    if bound is None or most <= bound:
        return None
    needed = math.ceil(sum(held.values()) / max(bound, 1))
    return (
        f"one of {len(held)} node(s) holds {most} of {sum(held.values())} workers, but the code "
        f"can do without {bound}: should that node die, queries wait until others replace its "
        f"workers. {needed} nodes with room for {bound} workers each would do"
    )


def missing_resources(
    demand: Mapping[str, float], waiting: int, nodes: Sequence[Node]
) -> str | None:
    """Return the resources that workers without a process are waiting for; None if none.

    While there is enough of everything for one more, nothing is missing.
    """
    free = ray_module().available_resources()
    each = ", ".join(f"{name} {amount:g}" for name, amount in demand.items()) or "no resource"
    short = [
        f"{name}: {waiting * amount:g} needed, {free.get(name, 0.0):g} free"
        for name, amount in demand.items()
        if amount > free.get(name, 0.0) + 1e-6
    ]
    if not any(node.room(demand) for node in nodes):
        return f"none of {len(nodes)} nodes has what a worker takes ({each})"
    if short:
        return f"{waiting} take {each} each; on {len(nodes)} nodes together {'; '.join(short)}"
    return None


def by_node(places: Iterable[str | None]) -> collections.Counter[str]:
    return collections.Counter(place for place in places if place is not None)
