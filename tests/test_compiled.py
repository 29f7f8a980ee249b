"""The check of compiled programs: what it counts in a program's text, and its verdicts."""

import json

import jax
import jax.numpy as jnp
import pytest
from conftest import bench_modules


@pytest.fixture(scope="module")
def bench():
    """bench/compiled.py and its neighbours, which import each other."""
    names = ("hlo", "budget", "programs", "target")
    parts = {name: f"_compiled_{name}" for name in names}
    with bench_modules(command="compiled", **parts) as found:
        yield found


def program(entry, rest=""):
    """A program's text as XLA writes it, with these lines in its entry."""
    lines = "\n".join(f"  {line}" for line in entry)
    head = "HloModule jit_run, entry_computation_layout={(f32[4]{0})->f32[4]{0}}\n\n"
    return f"{head}{rest}\nENTRY %main (x: f32[4]) -> f32[4] {{\n{lines}\n}}\n"


ADD = """
%add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} add(%p, %p)
}
"""
FUSION = "%f = f32[4]{0} fusion(%x), kind=kLoop, calls=%add"
# Two launches a turn; the condition compares a counter with 19.
LOOP = (
    ADD
    + """
%below (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(19)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%sound (p.2: (pred[], f32[4])) -> pred[] {
  %p.2 = (pred[], f32[4]{0}) parameter(0)
  %done = pred[] get-tuple-element(%p.2), index=0
  ROOT %not = pred[] not(%done)
}

%turn (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.3 = (s32[], f32[4]{0}) parameter(0)
  %y = f32[4]{0} get-tuple-element(%p.3), index=1
  %a = f32[4]{0:T(8,128)S(1)} fusion(%y), kind=kLoop, calls=%add, \
backend_config={"estimated_cycles":"50"}
  %b = s32[] copy(%i.9)
  ROOT %t = (s32[], f32[4]{0}) tuple(%b, %a)
}
"""
)


def while_loop(condition, config=""):
    source = 'metadata={op_name="jit(run)/jit(spline)/vmap()/while" stack_frame_id=3}'
    return (
        f"%w = (s32[], f32[4]{{0:T(8,128)}}, /*index=5*/f32[4]{{0}}) while(%x), "
        f"condition=%{condition}, body=%turn, {source}{config}"
    )


def test_a_fusion_is_one_launch_and_bookkeeping_none(bench):
    text = program(
        [
            "%x = f32[4]{0} parameter(0)",
            "%c = f32[] constant(1)",
            FUSION,
            "%s = (f32[4]{0}, f32[4]{0}) copy-start(%f)",
            "%d = f32[4]{0} copy-done(%s)",
            "%v = f32[2,2]{1,0} bitcast(%d)",
            'ROOT %r = f32[4]{0} custom-call(%v), custom_call_target="__cublas$gemm"',
        ],
        ADD,
    )
    found = bench.hlo.summarise(text)
    assert (found.cost.launches, found.cost.worst, found.cost.loops) == (3, 3, ())
    assert not found.float64
    assert not found.callbacks


@pytest.mark.parametrize(
    ("condition", "config", "turns"),
    [
        ("below", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
        ("below", "", 19),
        ("sound", "", None),
    ],
)
def test_turns_of_a_loop(bench, condition, config, turns):
    entry = ["%x = f32[4]{0} parameter(0)", FUSION, while_loop(condition, config)]
    found = bench.hlo.summarise(program(entry, LOOP))
    assert found.cost.loops == (bench.hlo.Loop(turns, 2, "spline/while"),)
    if turns is None:  # one look at the predicate; with a turn another one
        assert (found.cost.launches, found.cost.worst, found.cost.cycles) == (2, 5, 0)
        assert found.open_loops == found.cost.loops
    else:
        assert found.cost.launches == found.cost.worst == 1 + 2 * turns
        assert found.cost.cycles == 50 * turns
        assert found.counted_loops == found.cost.loops


def test_a_loop_that_also_looks_at_data_is_open(bench):
    both = LOOP.replace(
        "ROOT %lt = pred[] compare(%i, %n), direction=LT",
        "%lt = pred[] compare(%i, %n), direction=LT\n  ROOT %and = pred[] and(%lt, %flag)",
    )
    (loop,) = bench.hlo.summarise(program([while_loop("below")], both)).cost.loops
    assert loop.turns is None


def test_a_loop_within_a_loop_is_counted_each_turn(bench):
    inner = while_loop("below").replace("%w =", "%b =")
    nested = LOOP.replace("%b = s32[] copy(%i.9)", inner.replace("body=%turn", "body=%inner"))
    nested += LOOP[LOOP.index("%turn") :].replace("%turn", "%inner")
    found = bench.hlo.summarise(program([while_loop("below")], nested))
    assert found.cost.launches == 19 * (1 + 19 * 2)
    assert len(found.counted_loops) == 2


@pytest.mark.parametrize(
    "names",
    [
        "branch_computations={%cheap, %dear}",
        "true_computation=%dear, false_computation=%cheap",
    ],
)
def test_a_conditional_is_its_cheapest_branch_and_at_worst_its_dearest(bench, names):
    def branch(name, launches):
        lines = "\n".join(f"  %{name}.{i} = f32[4]{{0}} copy(%p)" for i in range(launches))
        return f"%{name} (p: f32[4]) -> f32[4] {{\n{lines}\n}}\n"

    entry = [f"ROOT %c = f32[4]{{0}} conditional(%x, %y, %z), {names}"]
    found = bench.hlo.summarise(program(entry, branch("cheap", 1) + "\n" + branch("dear", 5)))
    assert (found.cost.launches, found.cost.worst) == (2, 6)


def test_what_no_program_may_have_is_found_within_fusions(bench):
    wide = ADD.replace("%sum = f32[4]", "%sum = f64[4]")
    host = '%h = f32[4]{0} custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback"'
    sent = "%s = token[] send(%x), is_host_transfer=true"
    found = bench.hlo.summarise(program([FUSION, host, sent], wide))
    assert found.float64
    assert found.callbacks == ("send", "xla_ffi_python_gpu_callback")


def test_collectives_are_counted_where_they_start(bench):
    entry = [
        "%a = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}",
        "%b = f32[8]{0} all-gather-done(%a)",
        "%c = f32[4]{0} all-to-all(%x), dimensions={0}",
    ]
    assert bench.hlo.summarise(program(entry)).collectives == 2


def test_text_without_a_program_is_refused(bench):
    with pytest.raises(ValueError, match="no ENTRY"):
        bench.hlo.summarise("HloModule nothing\n")


def _sent(function, *arguments):
    """What is sent to a TPU's compiler; lowering needs none."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("precision", "rounded"), [(None, 2), ("high", 2), ("highest", 0)])
def test_products_below_full_precision(bench, precision, rounded):
    def products(a, b, image, kernel):
        convolved = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", precision=precision
        )
        return jnp.matmul(a, b, precision=precision), convolved

    shapes = (2, 3), (3, 4), (1, 2, 5, 5), (2, 2, 3, 3)
    text = _sent(products, *(jnp.ones(shape) for shape in shapes))
    assert len(bench.hlo.rounded_products(text)) == rounded
    assert not bench.hlo.has_float64(text)


def test_products_of_integers_are_not_rounded(bench):
    text = _sent(jnp.matmul, jnp.ones((2, 3), int), jnp.ones((3, 4), int))
    assert "dot_general" in text
    assert bench.hlo.rounded_products(text) == []


def test_float64_is_found_before_the_compiler(bench):
    with jax.enable_x64(True):
        assert bench.hlo.has_float64(_sent(jnp.sin, jnp.ones(3, "float64")))


def violations(bench, written, others=None, **numbers):
    """What is said of a program with these numbers under a budget as written in the file."""
    found = bench.budget.Measured(1.0, **numbers)
    budget = bench.budget.read_budget("p", written)
    return list(bench.budget.failures("p", budget, {"p": found, **(others or {})}))


def test_a_program_within_its_budget(bench):
    written = {"launches": 110, "loops": 0, "open_loops": 1}
    assert violations(bench, written, launches=110, open_loops=1) == []


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"launches": 777}, "launches 777 > 110"),
        (
            {"loops": 3, "turns": (19,) * 3, "sources": {"fit/while": 3}},
            "loops 3 > 0 (3 fit/while)",
        ),
        ({"open_loops": 2}, "loops that depend on data 2 > 1"),
        ({"temp_bytes": 2_000}, "temporary bytes 2,000 > 1,000"),
        ({"rounded": 1}, "products below full precision 1 > 0"),
        ({"float64": True}, "float64"),
        ({"callbacks": ("send",)}, "callbacks: send"),
        ({"error": "no tiles"}, "does not compile: no tiles"),
    ],
)
def test_a_program_beyond_its_budget(bench, numbers, words):
    written = {"launches": 110, "loops": 0, "open_loops": 1, "temp_bytes": 1000}
    assert violations(bench, written, **numbers) == [words]


def test_what_no_program_may_have_fails_without_a_budget(bench):
    assert violations(bench, {}, rounded=2, float64=True, launches=10**9) == [
        "float64",
        "products below full precision 2 > 0",
    ]
    assert violations(bench, {"rounded": 5}, rounded=5) == []


def test_a_program_beside_another(bench):
    written = {"times": {"one": 1.3}}
    one = {"one": bench.budget.Measured(1.0, launches=100)}
    assert violations(bench, written, one, launches=130) == []
    assert violations(bench, written, one, launches=131) == ["launches 131 > 1.3 x 100 of one"]
    (missing,) = violations(bench, written, launches=1)
    assert "one was not compiled" in missing


def test_a_limit_on_what_is_not_counted_is_refused(bench):
    with pytest.raises(ValueError, match="lunches"):
        bench.budget.read_budget("p", {"lunches": 3})


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_program_has_a_budget(bench, platform):
    programs = list(bench.programs.PROGRAMS)
    budgets = bench.budget.load_budgets(platform)
    assert list(budgets) == programs
    assert set(bench.programs.SLOW) < set(programs)
    for budget in budgets.values():
        assert set(budget.times) <= set(programs)
        assert "open_loops" in budget.limits


def test_what_a_program_is_compared_with_is_compiled_too(bench):
    budgets = bench.budget.load_budgets("cuda")
    names = list(bench.programs.PROGRAMS)
    chosen = bench.command.chosen(names, ["order_points 16*"], budgets)
    assert chosen == ["order_points 1,024", "order_points 16 x 1,024"]
    assert bench.command.chosen(names, ["*"], budgets) == names


def test_what_does_not_compile_is_reported(bench):
    def broken(devices):
        raise TypeError("no\n  tiles")

    found = bench.command.attempt(broken, [], lambda compiled: None)
    assert found.error == "TypeError: no tiles"


def test_a_row_shows_counts_beside_their_limits(bench):
    budget = bench.budget.Budget({"launches": 110, "open_loops": 1})
    numbers = {"launches": 777, "loops": 3, "turns": (5, 19, 19), "open_loops": 1}
    shown = bench.command.cells("p", bench.budget.Measured(2.0, **numbers), budget, True)
    assert shown[:5] == ["p", "2.0 s", "777/110", "0", "1 x 5, 2 x 19, 1 open"]
    assert shown[-1] == "FAILS"
    failed = bench.command.cells("p", bench.budget.Measured(2.0, error="no"), budget, True)
    assert bench.command.row(failed).split() == ["p", "2.0", "s", "FAILS"]


def test_a_missing_compiler_names_what_to_install(bench, monkeypatch):
    monkeypatch.setattr(bench.target.importlib.util, "find_spec", lambda name: None)
    for platform, package in {"tpu": r"jax\[tpu\]", "cuda": r"jax\[cuda12\]"}.items():
        with pytest.raises(ImportError, match=f"pip install '{package}"):
            bench.target.prepare(platform)


def test_updates_add_and_leave_budgets_alone(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.command, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.command, "_PLUGINS", {"tpu": ()})
    before = bench.budget.BUDGET_FILE.read_bytes()
    for name in ("one", "two"):
        found = {name: bench.budget.Measured(1.0, launches=3)}
        path = bench.command.write_results("tpu", "TPU v5 lite", found)
    written = json.loads(path.read_text())
    assert list(written["programs"]) == ["one", "two"]
    assert written["programs"]["one"]["launches"] == 3
    assert bench.budget.BUDGET_FILE.read_bytes() == before
