"""The benchmarks: each runs by its name, and the parts that need a check of their own."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require

from nercc_jax.stragglers import Hedge
from nercc_jax.surrogates import Kernel
from nercc_jax.testing import SimulatedClock, SimulatedPool

with bench_modules(run="run", report="report") as found:
    RUN, REPORT = found.run, found.report
FOLDER = Path(RUN.__file__).parent
# These take seconds, with no data but scikit-learn's and no server.
QUICK = {
    "coding": (),
    "independent": (),
    "rows": ("--rows", "60", "--laws", "constant"),
    "ensembles": (),
    "hedging": ("--requests", "130"),
}


@pytest.fixture(scope="module")
def bench():
    """Modules of bench/ that import each other as scripts do."""
    require("matplotlib", "demo")
    names = ("functions", "rates", "rivals", "streams", "tails", "tails_systems")
    with bench_modules(**{name: name for name in names}) as found:
        yield found


def started(*words):
    """What a process prints, in the folder of the benchmarks, as users start them."""
    require("matplotlib", "demo")
    require("csaps", "bench")
    require("aiohttp", "serve-test")
    done = subprocess.run(
        [sys.executable, *words], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_each_has_options_and_says_what_it_measures():
    found = started(
        "-c",
        "import run\n"
        "for name in run.BENCHES:\n"
        "    parser = run.parser_of(name, run.find(name))\n"
        "    assert parser.parse_args(['--quick']).quick\n"
        "    print(parser.format_help())",
    )
    assert all(f"usage: bench/run.py {name} " in found for name in RUN.BENCHES)
    assert found.count("--data-dir") >= len(RUN.BENCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_small_version_runs_and_names_its_origin(name, tmp_path):
    path = tmp_path / "found.json"
    started("run.py", name, "--quick", "--output", str(path), *QUICK[name])
    environment = json.loads(path.read_text())["environment"]
    assert {"commit", "dirty", "rooms", "date", "device", "versions"} <= environment.keys()


def test_the_age_of_a_result_depends_on_code_alone():
    source = '"""A room."""\n\nx = "#"  # a mark\n\n\ndef f():\n    """Return x."""\n    return x\n'
    assert REPORT.code_of(source) == 'x = "#"\ndef f():\n    return x'


def test_an_unknown_name_lists_all(capsys):
    assert RUN.main(["nothing"]) == 2
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in RUN.BENCHES)
    assert RUN.main([]) == 0


def test_no_benchmark_imports_what_is_private():
    for path in Path(RUN.__file__).parent.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if "nercc_jax" in line]
        private = [line for line in lines if "import" in line and "._" in line.split("import")[0]]
        assert not private, (path.name, private)
        assert not [line for line in lines if " import _" in line], path.name


# -- Slopes of the error in the number of workers -------------------------------------------------

SIZES = (256, 512, 1024, 2048)


def test_slopes_and_their_standard_error_against_polyfit(bench):
    """The spread over straggler sets is known, too, where the line fits by chance."""
    rng = np.random.default_rng(0)
    n = np.array([20, 64, 200, 640, 2000])
    errors = 3.0 * n**-2.5 * rng.lognormal(0, 0.05, 5)
    points = [
        {"num_workers": int(each), "mean": mean, "half_width": 0.01 * mean}
        for each, mean in zip(n, errors, strict=True)
    ]
    fit = bench.rates.fit_slope(points)
    (slope, _), covariance = np.polyfit(np.log(n), np.log(errors), 1, cov=True)
    assert fit["slope"] == pytest.approx(slope)
    assert fit["standard_error"] == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6)
    wide = [point | {"half_width": 0.5 * point["mean"]} for point in points]
    assert bench.rates.fit_slope(wide)["standard_error"] > 2 * fit["standard_error"]
    assert bench.rates.fit_slope(points[:2]) is None


def test_the_slope_of_a_power_law_and_its_interval(bench):
    """The interval is as wide as that of slopes of data drawn anew."""
    rng = np.random.default_rng(0)

    def drawn():
        noise = rng.lognormal(0, 0.5, (4, 60, 1)) * np.ones(3)
        return [7.0 * n**-3.5 * each for n, each in zip(SIZES, noise, strict=True)]

    curve = bench.rates.independent_curve(SIZES, drawn(), 0.2, 0.0)
    slopes = [
        np.polyfit(np.log(SIZES), np.log([e.mean() for e in drawn()]), 1)[0] for _ in range(400)
    ]
    low, high = curve["interval"]
    assert low < -3.5 < high
    assert high - low == pytest.approx(np.subtract(*np.quantile(slopes, (0.975, 0.025))), rel=0.3)
    assert -3 < curve["rates"]["log^3 N^-3"] < -2
    errors = [np.full((5, 2), 7.0 * n**-3.0) for n in SIZES[:-1]] + [np.full((5, 2), 1e-30)]
    curve = bench.rates.independent_curve(SIZES, errors, 0.2, 1e-20)
    assert curve["slope"] == pytest.approx(-3)
    assert curve["fitted"] == list(SIZES[:-1])


def test_errors_on_the_host_are_those_of_decoding(bench):
    rates = bench.rates
    function = next(rates.scalar_functions(3))
    exact, masks = rates.answers_of(function), rates.independent_sets(0.2, 64, 2)
    for name, code in rates.codes_of(64).items():
        y = rates.answers_of(function, code)
        found = rates.decoding_errors(code, masks, {"f": y}, {"f": exact})["f"]
        with jax.enable_x64(True):
            plain = jax.tree.map(jnp.asarray, code)
            for mask, errors in zip(masks, found, strict=True):
                decoded = np.stack([plain.decode(each, mask) for each in y])
                wanted = np.mean((decoded - exact) ** 2, axis=(1, 2))
                np.testing.assert_allclose(errors, wanted, rtol=1e-6, err_msg=name)


# -- Coding: figures against stored ones -----------------------------------------------------------


def test_a_figure_is_worse_by_over_5_percent_of_the_stored_one_or_above_its_limit():
    require("csaps", "bench")
    with bench_modules(coding="coding") as found:
        limited = "lines of a decode's gradient"
        now = {"jit / product": 1.1, "kept / product": 1.04, "new": 9.0, limited: 2001}
        rows = found.coding.compared(now, {"jit / product": 1.0, "kept / product": 1.0})
    shown = {row["figure"]: (row["change"], row["worse"]) for row in rows}
    assert shown["jit / product"] == ("+10.0 %", "yes")
    assert shown["kept / product"] == ("+4.0 %", "")
    assert shown["new"] == ("nothing stored", "")
    assert shown[limited] == ("nothing stored", "yes")


# -- Functions: lost copies and recall by hand ----------------------------------------------------


def test_lost_copies_by_hand(bench):
    random, size = np.random.default_rng(0), 20
    x = random.uniform(-1, 1, (2 * size, 2)).astype(np.float32)
    own = np.stack([np.sin(x[:, 0] + x[:, 1]), x[:, 0] * x[:, 1]], axis=1)
    answered = random.random((3, 2, size)) < 0.8
    kernel = Kernel("squared_exponential", centre=np.zeros(2), noise=1e-4)
    found = bench.functions.lost_copies(
        jnp.asarray(x), jnp.asarray(own), jnp.asarray(answered), kernel, None
    )
    wanted = [np.empty((3, 2 * size, 2)) for _ in found]
    for s, g in np.ndindex(3, 2):
        rows = slice(g * size, (g + 1) * size)
        points, outputs, seen = x[rows].astype(float), own[rows], answered[s, g]
        square = ((points[:, None] - points) ** 2).sum(-1)
        known = np.exp(-square[:, seen] / 2)
        covariance = known[seen] + 1e-4 * np.eye(seen.sum())
        mean = outputs[seen].mean(0)
        process = mean + known @ np.linalg.solve(covariance, outputs[seen] - mean)
        nearest = outputs[seen][square[:, seen].argmin(1)]
        for place, filled in enumerate((mean, nearest, process)):
            wanted[place][s, rows] = np.where(seen[:, None], outputs, filled)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


# -- Balancers: which worker's queue a query joins, and when copies go out ------------------------


def _ends(bench, rule, arrivals, seconds, num_workers=1, limit=1e9):
    """Return when each query is answered, and the calls that were sent."""
    times = iter(seconds)
    ends = [np.nan] * len(arrivals)
    with SimulatedPool(np.negative, num_workers, seconds=lambda size: next(times)) as pool:
        balancer, clock = bench.tails_systems.Balancer(pool, rule, Hedge(limit)), pool.clock
        assert isinstance(clock, SimulatedClock)

        def send(number):
            def hear(future):
                assert future.result().values == [[-number]]
                ends[number] = clock.now()

            balancer.submit(np.full((1, 1), float(number))).add_done_callback(hear)

        for number, when in enumerate(arrivals):
            clock.at(when, lambda number=number: send(number))
        clock.run(until=1e4)
        return ends, pool.report().sent


@pytest.mark.parametrize("number", [1, 5])
def test_rules_choose_as_they_say(bench, number):
    """With one worker, all rules are one queue (Lindley's recursion); with five, they are not."""
    random, systems = np.random.default_rng(0), bench.tails_systems
    arrivals = np.cumsum(random.exponential(1.0, 400))
    services = random.exponential(0.8 * number, 400)
    rules = (systems.LeastLoaded(5), systems.LeastLoaded(2))
    rules += (systems.LeastLoaded(1), systems.Prequal(3, 0.5, size=3))
    found = [np.array(_ends(bench, rule, arrivals, services, number)[0]) for rule in rules]
    if number == 1:
        free, ends = 0.0, []
        for arrived, service in zip(arrivals, services, strict=True):
            free = max(free, arrived) + service
            ends.append(free)
        np.testing.assert_allclose(found, np.tile(ends, (len(rules), 1)))
    else:
        best, two, blind, prequal = (float(np.mean(ends - arrivals)) for ends in found)
        assert best < two < blind
        assert prequal < blind


def test_every_system_of_the_tails_can_be_made(bench):
    """Their data are not in every clone: a change of policies had broken them unseen."""
    work = bench.streams.Work("own", np.zeros((2, 3)), np.zeros((2, 4)), wanted=0.1)
    tails, cell = bench.tails_systems, {"p99_ms": 1, "p999_ms": 1, "calls": 1}
    made = [*tails.systems(work, "5 %"), *tails.rivals(tails.tune_rivals(lambda _: cell, None))]
    assert len({system.name for system in made}) == len(made) > 15


# -- The accelerator benchmark: counts of a program's text, verdicts, and timing -------------------

ADD = """
%add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} add(%p, %p)
}
"""
FUSION = "%f = f32[4]{0} fusion(%x), kind=kLoop, calls=%add"
# Two launches a turn.
TURN = (
    ADD
    + """
%turn (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.3 = (s32[], f32[4]{0}) parameter(0)
  %y = f32[4]{0} get-tuple-element(%p.3), index=1
  %a = f32[4]{0:T(8,128)S(1)} fusion(%y), calls=%add, backend_config={"estimated_cycles":"50"}
  %b = s32[] copy(%i.9)
  ROOT %t = (s32[], f32[4]{0}) tuple(%b, %a)
}
"""
)
WHILE = "%w = (s32[], /*index=5*/f32[4]{0:T(8,128)}) while(%x), condition=%below, body=%turn"
KNOWN = WHILE + ', backend_config={"known_trip_count":{"n":"19"}}'
BRANCHES = ADD + "".join(
    f"\n%{name} (p: f32[4]) -> f32[4] {{\n" + f"  {FUSION}\n" * number + "}\n"
    for name, number in (("cheap", 1), ("dear", 5))
)
CONDITIONAL = "%c = f32[4]{0} conditional(%p, %x, %x), "


@pytest.fixture(scope="module")
def accelerator():
    with bench_modules(command="accelerator") as found:
        yield found.command


def program(entry, rest=ADD):
    """A program's text as XLA writes it, with these lines in its entry."""
    lines = "\n".join(f"  {line}" for line in entry)
    head = "HloModule jit_run, entry_computation_layout={(f32[4]{0})->f32[4]{0}}\n\n"
    return f"{head}{rest}\nENTRY %main (x: f32[4]) -> f32[4] {{\n{lines}\n}}\n"


@pytest.mark.parametrize(
    ("entry", "rest", "counts"),
    [
        (["%x = f32[4]{0} parameter(0)", "%y = f32[2]{0} bitcast(%x)", FUSION], ADD, (1, 0, 0, 0)),
        (["%s = (f32[4], u32[]) copy-start(%x)", "%d = f32[4] copy-done(%s)"], ADD, (1, 0, 0, 0)),
        ([KNOWN, FUSION], TURN, (39, 950, 1, 0)),
        ([WHILE], TURN, (1, 0, 0, 1)),
        (["%k = f32[4]{0} call(%x), to_apply=%turn"], TURN, (2, 50, 0, 0)),
        ([CONDITIONAL + "branch_computations={%dear, %cheap}"], BRANCHES, (2, 0, 0, 0)),
        (
            [CONDITIONAL + "true_computation=%dear, false_computation=%cheap"],
            BRANCHES,
            (2, 0, 0, 0),
        ),
    ],
    ids=["fusion", "start", "known loop", "open loop", "call", "branches", "true and false"],
)
def test_counts(accelerator, entry, rest, counts):
    assert accelerator.count(program(entry, rest)) == accelerator.Counts(*counts)
