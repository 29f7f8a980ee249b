"""The accelerator benchmark: what it counts in a program's text, its verdicts, and its timing."""

import pytest
from conftest import bench_modules

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
def bench():
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
def test_counts(bench, entry, rest, counts):
    assert bench.count(program(entry, rest)) == bench.Counts(*counts)


def test_text_without_a_program_is_refused(bench):
    with pytest.raises(ValueError, match="no ENTRY"):
        bench.count("HloModule nothing\n")


PRODUCT = "%2 = stablehlo.dot_general %0, %1, contracting_dims = [1] x [0]"
FULL = PRODUCT + ", precision = [HIGHEST, HIGHEST] : (tensor<2x2xf32>) -> tensor<2x2xf32>"
HALF = PRODUCT + ", precision = [DEFAULT, DEFAULT] : (tensor<2x2xf32>) -> tensor<2x2xf32>"
HOST = '%h = f32[4] custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"'


@pytest.mark.parametrize(
    ("counts", "platform", "lowered", "hlo", "words"),
    [
        ((25, 0, 0, 1), "cuda", FULL, "", []),
        ((26, 0, 0, 1), "cuda", FULL, "", ["launches 26 > 25"]),
        ((26, 0, 0, 1), "tpu", FULL, "", []),
        ((1, 0, 1, 2), "tpu", FULL, "", ["loops 1 > 0", "loops that depend on data 2 > 1"]),
        ((1, 0, 0, 0), "tpu", HALF, "", ["products below full precision 1 > 0"]),
        ((1, 0, 0, 0), "tpu", "tensor<4xf64>", "", ["float64"]),
        ((1, 0, 0, 0), "tpu", "", HOST, ["callbacks to the host"]),
    ],
)
def test_verdicts(bench, counts, platform, lowered, hlo, words):
    made = bench.Program(print, (), launches=25, open_loops=1)
    assert bench.faults(bench.Counts(*counts), made, platform, lowered, hlo) == words


def test_a_program_is_compiled_and_timed(bench):
    made = {"bare, N": bench.inference("LeNet5", 1)["bare, N"]}
    (row,) = bench.time_all({"case": ("LeNet5 (20, 8)", 1, made)}).values()
    (part,) = row["parts"].values()
    low, high = part["quartiles_s"]
    assert 0 < low <= part["median_s"] <= high
    lowered, compiled, _ = bench.compile_for(made["bare, N"])
    assert bench.count(compiled.as_text()).launches > 0
    assert len(bench.faults(bench.Counts(), made["bare, N"], "tpu", lowered.as_text(), "")) == 1
