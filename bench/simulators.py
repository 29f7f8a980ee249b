"""Functions that are smooth in their inputs, and real: what functions.py is about.

Each is a plain function of a batch. Simulators draw their inputs; networks have rows of data, of
which one part is for choosing and another for judging.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from nercc_models import load_data, load_model, load_student

Function = Callable[[Array], Array]
Drawing = Callable[[np.random.Generator, int], np.ndarray]

SIMULATORS = ("Lotka-Volterra", "epidemic", "Burgers", "Fisher", "elliptic")
EXPENSIVE = ("Lotka-Volterra", "epidemic", "Fisher", "elliptic")  # for runs row by row
EMBEDDINGS = ("digits", "CIFAR-10")
NAMES = (*SIMULATORS, "diabetes", *EMBEDDINGS)
STEPS = 60  # that the diabetes network is trained for


@dataclasses.dataclass(frozen=True)
class SlowRows:
    """A law of which rows are slow: a share `rate` of all, by a score (cost, norm, margin).

    A share `leaning` of them comes from the `hardest` share of rows, those with the largest scores;
    the others come from all rows alike.
    """

    rate: float
    leaning: float = 0.0
    hardest: float = 1.0

    def straggles(self, key: Array, scores: Array) -> Array:
        """Draw which rows are slow; the hardest are those among these rows."""
        rank = jnp.argsort(jnp.argsort(-scores))
        others = self.rate * (1 - self.leaning)
        hard = min(others + self.rate * self.leaning / self.hardest, 1.0)
        few = jnp.round(self.hardest * len(scores))
        return jax.random.uniform(key, scores.shape) < jnp.where(rank < few, hard, others)


@dataclasses.dataclass(frozen=True)
class CheapModel:
    """A cheap model of a function: a coarse solver of the same, or a network's student.

    - `features`: what a learner may go by, and which width each of them has.
    - `prior`: its word on the function's outputs; None where it tells something else.
    """

    features: Function
    widths: tuple[int, ...]
    prior: Function | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, and the source of its inputs.

    - `pools`: the rows for choosing and for judging, or how to draw inputs where there is no end.
    - `features`: what a learner goes by, None for the inputs.
    - `cheap`: a cheap model, which a learner may know besides; None where there is none.
    """

    name: str
    about: str
    function: Function
    pools: tuple[np.ndarray, np.ndarray] | Drawing
    features: Function | None = None
    cheap: CheapModel | None = None

    @property
    def least(self) -> float:
        """Return the least number of rows for choosing and for judging."""
        return np.inf if callable(self.pools) else min(map(len, self.pools))

    def inputs(self, judging: bool, seed: int, count: int) -> np.ndarray:
        """So many inputs, the same for a seed; those for judging are none of those for choosing."""
        random = np.random.default_rng((seed, judging))
        if callable(self.pools):
            return self.pools(random, count).astype(np.float32)
        pool = self.pools[judging]
        return pool[random.permutation(len(pool))[:count]]


def load(name: str, data_dir: Path | None = None) -> Case:
    """Return a case by name, its network trained or loaded."""
    makers: dict[str, Callable[[], Case]] = {
        "Lotka-Volterra": _lotka_volterra,
        "epidemic": _epidemic,
        "Burgers": _burgers,
        "Fisher": _fisher,
        "elliptic": _elliptic,
        "digits": _digits,
        "CIFAR-10": lambda: _cifar10(data_dir),
        "diabetes": _diabetes,
    }
    return makers[name]()


def rows_of(name: str, seed: int, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a draw of a function's inputs, its outputs as vectors, and their spread."""
    case = _loaded(name)
    x = case.inputs(True, seed, rows)
    y = np.asarray(case.function(jnp.asarray(x)), np.float64).reshape(rows, -1)
    return x, y, float(np.sqrt(np.mean(np.var(y, axis=0))))


@functools.cache
def _loaded(name: str) -> Case:
    return load(name)


def within(*ranges: tuple[float, float]) -> Drawing:
    """Return a sampler of parameters, uniform in these ranges."""
    low, high = np.asarray(ranges).T
    return lambda random, count: random.uniform(low, high, (count, len(ranges)))


def runge_kutta(slope: Callable[[Array], Array], start: Array, step: float, steps: int) -> Array:
    """Return the states after each step, (steps, *start.shape)."""

    def advance(y: Array, _: None) -> tuple[Array, Array]:
        a = slope(y)
        b = slope(y + step / 2 * a)
        c = slope(y + step / 2 * b)
        d = slope(y + step * c)
        y = y + step / 6 * (a + 2 * b + 2 * c + d)
        return y, y

    return jax.lax.scan(advance, start, None, length=steps)[1]


def lotka_volterra(p: Float[Array, "batch 4"]) -> Float[Array, "batch 40"]:
    """Prey and predators at 20 times up to 8, by growth, capture, gain and death."""
    growth, capture, gain, death = p.T

    def slope(y: Array) -> Array:
        prey, predators = y
        met = prey * predators
        return jnp.stack([growth * prey - capture * met, gain * met - death * predators])

    start = jnp.stack([jnp.ones_like(growth), jnp.full_like(growth, 0.8)])
    states = runge_kutta(slope, start, 0.02, 400)[19::20]
    return states.transpose(2, 0, 1).reshape(len(p), -1)


def _lotka_volterra() -> Case:
    ranges = within((0.8, 1.6), (0.4, 1.2), (0.3, 0.9), (0.6, 1.4))
    about = "an ordinary differential equation; 4 parameters, 40 outputs"
    return Case("Lotka-Volterra", about, lotka_volterra, ranges)


def epidemic(p: Float[Array, "batch 5"]) -> Float[Array, "batch 40"]:
    """Return the exposed and infectious shares on 20 days (SEIR with waning immunity)."""
    contacts, incubation, recovery, waning, seed = p.T

    def slope(y: Array) -> Array:
        exposed, infectious, immune = y
        susceptible = 1 - exposed - infectious - immune
        caught = contacts * susceptible * infectious
        return jnp.stack(
            [
                caught - exposed / incubation,
                exposed / incubation - infectious / recovery,
                infectious / recovery - waning * immune,
            ]
        )

    start = jnp.stack([seed, seed / 2, jnp.zeros_like(seed)])
    states = runge_kutta(slope, start, 0.5, 240)[11::12, :2]
    return states.transpose(2, 0, 1).reshape(len(p), -1)


def _epidemic() -> Case:
    ranges = within((0.3, 0.8), (2.0, 6.0), (4.0, 10.0), (0.0, 0.02), (0.002, 0.02))
    about = "SEIR, an ordinary differential equation; 5 parameters, 40 outputs"
    return Case("epidemic", about, epidemic, ranges)


VISCOSITY = 0.03


def three_waves(c: Float[Array, "batch 6"], places: int) -> Float[Array, "batch places"]:
    """Return the velocity that Burgers' equation starts from, on places of a circle."""
    x = jnp.arange(places) * 2 * jnp.pi / places
    parts = [
        c[:, 2 * k, None] * jnp.sin((k + 1) * x) + c[:, 2 * k + 1, None] * jnp.cos((k + 1) * x)
        for k in range(3)
    ]
    return sum((part / (k + 1) for k, part in enumerate(parts)), jnp.zeros(()))


def burgers(c: Float[Array, "batch 6"]) -> Float[Array, "batch 32"]:
    """Return the velocity at time 1 on 32 places of a circle, viscosity 0.03, from three waves.

    Spectral, dealiased; the heat part is exact, the rest by the midpoint rule.
    """
    n, steps = 64, 200
    start = three_waves(c, n)
    wave = jnp.fft.rfftfreq(n, 1 / n)
    step = 1 / steps
    half = jnp.exp(-VISCOSITY * wave**2 * step / 2)

    def transport(w: Array) -> Array:
        u = jnp.fft.irfft(w * (wave < n / 3), n, axis=1)
        return -0.5j * wave * jnp.fft.rfft(u * u, axis=1)

    def advance(w: Array, _: None) -> tuple[Array, None]:
        middle = half * (w + step / 2 * transport(w))
        return half * (half * w + step * transport(middle)), None

    end, _ = jax.lax.scan(advance, jnp.fft.rfft(start, axis=1), None, length=steps)
    return jnp.fft.irfft(end, n, axis=1)[:, ::2]


COARSE_CELLS, COARSE_STEPS = 16, 10  # of the coarse solver


def coarse_burgers(c: Float[Array, "batch 6"]) -> Float[Array, "batch cells"]:
    """Return the same on sixteenths of the circle, in ten steps: finite volumes, upwind.

    Of first order, so that shocks are smeared and waves damped, but never the wrong way.
    """
    width, step = 2 * jnp.pi / COARSE_CELLS, 1 / COARSE_STEPS

    def advance(u: Array, _: None) -> tuple[Array, None]:
        right = jnp.roll(u, -1, axis=1)
        flux = (jnp.maximum(u, 0) ** 2 + jnp.minimum(right, 0) ** 2) / 2
        flux = flux - VISCOSITY * (right - u) / width
        return u - step / width * (flux - jnp.roll(flux, 1, axis=1)), None

    return jax.lax.scan(advance, three_waves(c, COARSE_CELLS), None, length=COARSE_STEPS)[0]


def coarse_on_places(c: Float[Array, "batch 6"]) -> Float[Array, "batch 32"]:
    """Return the coarse solution at the function's outputs, through its Fourier series."""
    wave = jnp.fft.rfft(coarse_burgers(c), axis=1)
    wave = jnp.pad(wave, ((0, 0), (0, 17 - wave.shape[1])))
    return jnp.fft.irfft(wave, 32, axis=1) * (32 / COARSE_CELLS)


def _burgers() -> Case:
    about = "a partial differential equation with shocks; 6 coefficients, 32 outputs"
    cheap = CheapModel(
        lambda c: jnp.concatenate([c, coarse_burgers(c)], axis=1),
        (0,) * 6 + (1,) * COARSE_CELLS,
        coarse_on_places,
    )
    return Case("Burgers", about, burgers, within(*[(-1.0, 1.0)] * 6), cheap=cheap)


def fisher(p: Float[Array, "batch 5"]) -> Float[Array, "batch 32"]:
    """Return a population's density at time 4 on 32 places; it grows, spreads and drifts."""
    growth, diffusion, drift, place, width = (column[:, None] for column in p.T)
    n, steps = 64, 400
    x = (jnp.arange(n) + 0.5) / n
    start = 0.8 * jnp.exp(-(((x - place) / width) ** 2) / 2)

    def slope(u: Array) -> Array:
        before, after = jnp.roll(u, 1, axis=1), jnp.roll(u, -1, axis=1)
        spread = diffusion * (before - 2 * u + after) * n**2
        return growth * u * (1 - u) + spread - drift * (after - before) * n / 2

    return runge_kutta(slope, start, 4 / steps, steps)[-1][:, ::2]


def _fisher() -> Case:
    ranges = within((0.3, 1.5), (0.0005, 0.004), (-0.05, 0.05), (0.35, 0.65), (0.03, 0.1))
    about = "Fisher and KPP's reaction, diffusion and drift; 5 parameters, 32 outputs"
    return Case("Fisher", about, fisher, ranges)


def elliptic(z: Float[Array, "batch 10"]) -> Float[Array, "batch 20"]:
    """Return u of -(a u')' = 1, u = 0 at both ends, on 20 places; log a is a sum of ten waves."""
    n = 100
    s = (jnp.arange(n) + 0.5) / n
    wave = jnp.arange(z.shape[1]) + 0.5
    resistance = jnp.exp(
        -0.6 * z @ (jnp.sqrt(2) * jnp.sin(jnp.pi * wave[:, None] * s) / wave[:, None])
    )
    flow, load = jnp.cumsum(resistance, axis=1) / n, jnp.cumsum(s * resistance, axis=1) / n
    return (load[:, -1:] / flow[:, -1:] * flow - load)[:, 4::5]


def _elliptic() -> Case:
    about = "an elliptic equation with a random coefficient; 10 normal numbers, 20 outputs"
    return Case("elliptic", about, elliptic, lambda random, count: random.normal(size=(count, 10)))


class Embedding(eqx.Module):
    """A shipped network up to its last layer; of data points in one row, as they were stored."""

    network: Any
    last: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    preprocess: Function | None = eqx.field(static=True, default=None)

    def __call__(self, x: Float[Array, "batch d"]) -> Float[Array, "batch m"]:
        from flax import nnx

        network: Any = nnx.merge(self.network.graphdef, self.network.state)
        setattr(network, self.last, lambda inner: inner)
        x = x.reshape(len(x), *self.shape)
        return network(x if self.preprocess is None else self.preprocess(x))


def _digits() -> Case:
    images = np.concatenate([load_data("digits", split).images for split in ("train", "test")])
    images = np.random.default_rng(0).permutation(images).astype(np.float32)
    rows, model = images.reshape(len(images), -1), load_model("lenet5-digits")
    shape, preprocess = images.shape[1:], model.preprocess
    function = Embedding(model, "fc3", shape, preprocess)
    about = "the 84 numbers before LeNet5's last layer, of scikit-learn's digits; 64 pixels"
    third = len(rows) // 3
    student = load_student("lenet5-digits")
    inner = Embedding(student, "head", shape, preprocess)

    def features(x: Array) -> Array:
        return jnp.concatenate([inner(x), student(preprocess(x.reshape(len(x), *shape)))], axis=1)

    widths = (0,) * inner(jnp.asarray(rows[:1])).shape[1] + (1,) * 10
    cheap = CheapModel(features, widths)
    return Case("digits", about, function, (rows[:third], rows[third:]), cheap=cheap)


def _cifar10(data_dir: Path | None) -> Case:
    model, student = load_model("repvgg-cifar10"), load_student("repvgg-cifar10")
    images = load_data("cifar10", "test", data_dir=data_dir).shuffled(0).images
    x = np.asarray(model.preprocess(images))
    rows, shape = x.reshape(len(x), -1), x.shape[1:]
    about = "RepVGG's inner layer of CIFAR-10's test images, 3,072 pixels; the learner goes by its "
    about += "student's inner layer"
    function, features = Embedding(model, "head", shape), Embedding(student, "head", shape)
    return Case("CIFAR-10", about, function, (rows[:2000], rows[2000:]), features)


def _diabetes() -> Case:
    from sklearn.datasets import load_diabetes

    data: Any = load_diabetes()
    x, target = ((each - each.mean(0)) / each.std(0) for each in (data.data, data.target))
    rows = np.random.default_rng(0).permutation(x.astype(np.float32))
    network = train(x.astype(np.float32), target.astype(np.float32))
    about = (
        "a network of 2 x 64 units, trained on scikit-learn's diabetes data; 10 inputs, 1 output "
        f"(for {STEPS} steps: of half of the rows that leaves R2 = 0.47 on the others. After 400, "
        "-0.20, it has its rows by heart, and past answers tell little of it: 0.71 of the "
        "nearest's error)"
    )
    return Case("diabetes", about, network, (rows[::2], rows[1::2]))


def train(x: np.ndarray, target: np.ndarray, *, steps: int = STEPS) -> Function:
    """Train a regression network by Adam with weight decay, all rows at once."""
    network = eqx.nn.MLP(x.shape[1], 1, 64, 2, jnp.tanh, key=jax.random.key(0))
    optimizer = optax.adamw(3e-3, weight_decay=1e-2)

    rows = jnp.asarray(x)

    def loss(network: eqx.nn.MLP) -> Array:
        return jnp.mean((jax.vmap(network)(rows)[:, 0] - target) ** 2)

    @eqx.filter_jit
    def descend(network: eqx.nn.MLP) -> eqx.nn.MLP:
        numbers, fixed = eqx.partition(network, eqx.is_array)

        def step(state, _):
            numbers, moments = state
            slopes = eqx.filter_grad(loss)(eqx.combine(numbers, fixed))
            updates, moments = optimizer.update(slopes, moments, numbers)
            return (eqx.apply_updates(numbers, updates), moments), None

        (numbers, _), _ = jax.lax.scan(step, (numbers, optimizer.init(numbers)), None, length=steps)
        return eqx.combine(numbers, fixed)

    return jax.vmap(descend(network))
