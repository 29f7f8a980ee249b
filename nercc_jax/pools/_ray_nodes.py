"""A cluster's nodes, what workers take of them, and which gets the next."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._ray_cluster import ray_module

# A worker's CPUs unless told: of Ray's budget, which only counts. Never more than this share of
# what is free, so that others find room.
_CPUS, _FREE = 0.5, 0.8
# Of a GPU's memory, what its workers take together: the rest is XLA's and the driver's.
_MEMORY = 0.9
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that is alive, by Ray's id, with all that it has."""

    id: str
    address: str
    resources: Mapping[str, float]

    def room(self, demand: Mapping[str, float]) -> float:
        """How many workers it can hold; infinitely many where they take nothing."""
        # Ray counts in ten-thousandths.
        return min(
            (
                math.floor(self.resources.get(name, 0.0) / amount + 1e-3) + 0.0
                for name, amount in demand.items()
            ),
            default=math.inf,
        )


def live_nodes() -> list[Node]:
    """The cluster's nodes, in the order in which Ray tells them."""
    return [
        Node(each["NodeID"], each["NodeManagerAddress"], dict(each["Resources"]))
        for each in ray_module().nodes()
        if each["Alive"]
    ]


def worker_options(options: Mapping[str, Any], num_workers: int) -> dict[str, Any]:
    """An actor's options, with what a worker takes of the cluster's CPUs and GPUs unless told.

    Where the cluster has GPUs each worker gets one, or an equal part, and of its memory as much.
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
    """What a worker takes, by the names of Ray's resources."""
    named = {"CPU": options.get("num_cpus", 0.0), "GPU": options.get("num_gpus", 0.0)}
    named["memory"] = options.get("memory") or 0.0
    named |= dict(options.get("resources") or {})
    return {name: float(amount) for name, amount in named.items() if amount}


def choose_node(
    nodes: Iterable[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> Node | None:
    """The node that holds the fewest workers of those with room for one more; None if none has."""
    roomy = [node for node in nodes if node.room(demand) > held.get(node.id, 0)]
    return min(roomy, key=lambda node: held.get(node.id, 0), default=None)


def node_to_leave(
    nodes: Sequence[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> str | None:
    """The node that should give a worker to another: it holds at least two more than that would.

    None where workers lie as evenly as nodes' room allows.
    """
    target = choose_node(nodes, demand, held)
    if target is None or not held:
        return None
    fullest = max(held, key=lambda node: held[node])
    return fullest if held[fullest] >= held.get(target.id, 0) + 2 else None


def crowding(held: Mapping[str, int], bound: int | None) -> str | None:
    """Why the workers are not independent of each other, if so."""
    most = max(held.values(), default=0)
    if bound is None or most <= bound:
        return None
    needed = math.ceil(sum(held.values()) / max(bound, 1))
    return (
        f"one of {len(held)} node(s) holds {most} of {sum(held.values())} workers, but the code "
        f"can do without {bound}: should that node die, queries wait until others replace its "
        f"workers. {needed} nodes with room for {bound} workers each would do"
    )


def lacking(demand: Mapping[str, float], waiting: int, nodes: Sequence[Node]) -> str | None:
    """What so many workers that have no process yet are waiting for; None if for nothing.

    While there is enough of everything for one more, nobody waits for that.
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
    """How many workers are at each node."""
    return collections.Counter(place for place in places if place is not None)
