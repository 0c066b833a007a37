"""From hand-made events to findings and sentences, without torch."""

import math
from dataclasses import replace

import pytest

from nanhunt.analysis import (
    confusable_names,
    describe_nonfinite,
    explain,
    find_culprits,
    find_suspects,
    is_cured,
    judge_ablation,
    judge_precision,
    vector_use,
)
from nanhunt.analysis.walk import walk_back, way_to_sink
from nanhunt.records import (
    Ancestor,
    Birth,
    Frame,
    Group,
    Inquiry,
    Operand,
    OpEvent,
    Run,
    Sink,
    Spectrum,
    Step,
    TensorFacts,
    Term,
    Trace,
)

FINE = TensorFacts((4,), "float32")
BAD = TensorFacts((4,), "float32", nan=2)
NAN = Birth(0, 2, "nan", indices=((1,), (3,)))
LINE, OTHER, THIRD = Frame("m.py", 3, "f"), Frame("m.py", 7, "g"), Frame("m.py", 9, "h")


def event(index, op="mul", *, phase="forward", finite=False, **more):
    """An event whose output is not finite; `sources` makes its first input so."""
    given = {
        "inputs": (BAD if more.get("sources") else FINE,),
        "outputs": (FINE if finite else BAD,),
        "dtype": "float32",
    }
    return OpEvent(index, phase, f"aten::{op}", **given | more)


def made(index, op, number, frame=LINE, **more):
    """A finite forward op that made an autograd node."""
    return event(index, op, finite=True, made=number, frame=frame, **more)


def back(index, op, number=None, node=None, **more):
    """A backward event, non-finite, of a node."""
    return event(index, op, phase="backward", node=node, number=number, **more)


def loss(*last):
    """A non-finite loss, left so by these events."""
    return Sink("loss", "loss", BAD, last=last)


def gradient(name, *last, group="head"):
    """A non-finite gradient, left so by these events."""
    return Sink("gradient", name, BAD, group, last)


GOOD_LOSS = Sink("loss", "loss", TensorFacts((), "float32"))


def trace(events, *sinks, **more):
    """A trace whose loss is finite unless it is given."""
    sinks = sinks if sinks and sinks[0].kind == "loss" else (GOOD_LOSS, *sinks)
    return Trace(tuple(events), sinks, **more)


def stops(of):
    """The indices at which the walk through a trace ends."""
    walk = walk_back(of)
    return [stop.order for stop in walk.stops] if walk else None


def only(of, **more):
    """The single culprit of a trace."""
    (finding,) = find_culprits(of, **more)
    return finding


# -- the walk --------------------------------------------------------------------------------------


def test_harmless_value_is_no_culprit():
    """What is non-finite and reaches no sink is not met."""
    events = [event(0, "log", birth=NAN), event(1, "div", birth=NAN), event(2, sources=((1,),))]
    assert stops(trace(events, loss(2))) == [1]
    assert walk_back(trace(events, loss(2))).visited == {1, 2}


def test_finite_sinks_have_no_culprit():
    """Nothing is walked when everything that matters is finite."""
    healthy = trace([event(0, birth=NAN)])
    assert (stops(healthy), find_culprits(healthy)) == (None, ())


def test_unexplained():
    """A way that ends nowhere names nobody."""
    for lost in (trace([], gradient("w")), trace([event(0)], loss(0))):
        assert (stops(lost), find_culprits(lost)) == ([], ())


def test_birth_ends_the_walk_and_propagation_does_not():
    """Ops that only pass a non-finite value on are passed."""
    events = [event(0, birth=NAN), event(1, sources=((0,),)), event(2, sources=((1,), (0,)))]
    assert stops(trace(events, loss(2))) == [0]


def test_birth_that_also_passes_on_is_walked_past():
    """An op can make a value and carry an older one; the older one comes first."""
    events = [event(0, "log", birth=NAN), event(1, "div", birth=NAN, sources=((0,),))]
    assert stops(trace(events, loss(1))) == [0, 1]
    assert only(trace(events, loss(1))).op == "aten::log"


def test_asked_infinity_is_not_blamed_where_another_value_was_made():
    """A mask is passed by; the softmax that makes NaN of it is the culprit."""
    mask = event(0, "masked_fill", asked=True)
    softmax = event(1, "_softmax", birth=replace(NAN, from_asked=True), sources=((0,),))
    assert stops(trace([mask, softmax], loss(1))) == [1]
    finding = only(trace([mask, softmax], loss(1)))
    assert (finding.op, finding.cause) == ("aten::_softmax", "fully_masked_reduction")


def test_asked_infinity_beside_a_birth_is_no_stop():
    """Where both reach the loss, only the one that nobody asked for counts."""
    events = [event(0, "full", asked=True), event(1, "log", birth=NAN)]
    assert stops(trace([*events, event(2, "add", sources=((0,), (1,)))], loss(2))) == [1]


def test_asked_infinity_counts_where_nothing_else_was_met():
    """A loss to which the program itself added an infinity is infinite for that reason."""
    events = [event(0, "full", asked=True), event(1, "add", sources=((0,),))]
    assert stops(trace(events, loss(1))) == [0]
    assert only(trace(events, loss(1))).op == "aten::full"


def test_several_stops_come_in_the_order_of_time():
    """Whatever the order of the sinks; what was there before the step is first."""
    events = [event(0, birth=NAN), event(1, birth=NAN), event(2, birth=NAN)]
    state = (Sink("batch", "batch", BAD),)
    assert stops(trace(events, loss(2, 0, 1))) == [0, 1, 2]
    assert stops(trace(events, loss(2, -1, 1), state=state)) == [-1, 1, 2]


def test_turning_point_of_an_infinity_that_was_asked_for():
    """Where it was picked, else where it was first computed with, else where it was written."""
    mask = event(0, "masked_fill", asked=True)
    computed = event(1, "sub", asked=True, sources=((0,),))
    picked = event(2, "gather", asked=True, sources=((1,),))
    last = event(3, "neg", asked=True, sources=((2,),))
    cast = event(1, "_to_copy", asked=True, sources=((0,),))
    after = event(2, "mul", asked=True, sources=((1,),))
    assert stops(trace([mask, computed, picked, last], loss(3))) == [2]
    unpicked = replace(picked, op="aten::abs")
    assert stops(trace([mask, computed, unpicked, last], loss(3))) == [1]
    assert stops(trace([mask], loss(0))) == [0]
    # A cast hands it on; where nothing else was done with it the cast is all there is.
    assert stops(trace([mask, cast, after], loss(2))) == [2]
    assert stops(trace([mask, cast], loss(1))) == [1]


def test_what_writes_to_gradients_is_part_of_the_backward():
    """No forward op reaches a gradient but by a node, which holds what it read."""
    clips = event(0, "div", birth=NAN)
    found = only(trace([clips], gradient("w", 0)))
    assert (found.phase, found.node, found.is_on_gradients) == ("backward", None, True)
    earlier = [replace(clips, step=3), replace(event(1, sources=((0,),)), step=4)]
    found = only(trace(earlier, gradient("w", 1)))
    assert (found.phase, found.step, found.is_on_gradients) == ("forward", 3, False)
    assert only(trace([clips], loss(0))).phase == "forward"


def test_what_writes_to_parameters_after_the_backward_is_the_update():
    """Also where nobody has said that an optimizer is at work; a forward that does so is none."""
    stepped = Sink("stepped", "w", BAD, last=(1,))
    by_hand = event(1, "div", birth=NAN)
    found = only(Trace((back(0, "mul"), by_hand), (stepped,)))
    assert (found.phase, found.cause) == ("optimizer", "optimizer_arithmetic")
    before = Trace((event(0), by_hand, back(2, "mul")), (stepped,))
    assert only(before).phase == "forward"
    assert only(Trace((event(0), by_hand), (stepped,))).phase == "forward"


def test_first_station_decides():
    """A sink that was met earlier comes first, whatever its kind: several losses in one step."""
    events = [event(0, birth=NAN), back(1, "div", birth=NAN)]
    late, early = replace(loss(0), order=2), replace(gradient("w", 1), order=1)
    assert stops(Trace(tuple(events), (early, late))) == [1]
    assert stops(Trace(tuple(events), (replace(early, order=2), late))) == [0]


def test_what_an_earlier_step_left_is_followed_back():
    """A loss may be spoiled by a value that a backward, or a forward, made steps ago."""
    of_backward = replace(back(0, "div", birth=NAN), step=3)
    reads = replace(event(1, sources=((0,),)), step=4)
    found = only(trace([of_backward, reads], loss(1)))
    assert (found.op, found.phase, found.step) == ("aten::div", "backward", 3)
    inner = [replace(e, step=4) for e in (of_backward, reads)]
    assert only(trace(inner, loss(1))).phase == "forward"  # the loss ran a backward of its own
    of_forward = replace(event(0, "log", birth=NAN), step=3)
    meets = replace(back(1, "mul", sources=((0,),)), step=4)
    found = only(trace([of_forward, meets], gradient("w", 1)))
    assert (found.op, found.phase, found.step) == ("aten::log", "forward", 3)


def test_cured_means_finite_where_it_was_not_first():
    """Sinks that come later may still fail: that is another fault."""
    events = [event(0, birth=NAN), back(1, "div", birth=NAN)]
    before = trace(events, loss(0), gradient("w", 1))
    assert not is_cured(before, before)
    assert is_cured(before, trace(events, gradient("w", 1)))
    assert is_cured(before, trace(events))
    assert not is_cured(trace(events, gradient("w", 1)), before)
    assert not is_cured(trace(events, gradient("w", 1)), trace(events, gradient("v", 1)))
    first = trace(events, replace(gradient("w", 1), order=1))
    assert is_cured(first, trace(events, replace(gradient("w", 1), order=3)))


def test_suspects():
    """One for each line, in the order of time, with all of its births; data comes first."""
    events = [
        event(0, "log", birth=NAN, frame=LINE),
        event(1, "sqrt", birth=NAN, frame=OTHER),
        event(2, "log", birth=NAN, frame=LINE),
        event(3, "add", sources=((0, 1, 2),)),
    ]
    found = find_suspects(trace(events, loss(3)))
    assert [[e.index for e in s.events] for s in found] == [[0, 2], [1]]
    assert [s.finding.line for s in found] == [LINE.line, OTHER.line]
    assert find_culprits(trace(events, loss(3))) == (found[0].finding,)
    state = (Sink("parameter", "head.weight", BAD),)
    first, *rest = find_suspects(trace(events, loss(3, -1), state=state))
    assert (first.finding.phase, first.finding.where) == ("data", "param:head.weight")
    assert (first.events, len(rest)) == ((), 2)
    assert find_suspects(trace(events)) == ()


@pytest.mark.parametrize(
    ("kind", "name", "where"),
    [
        ("batch", "batch[1]", "batch[1]"),
        ("parameter", "head.weight", "param:head.weight"),
        ("buffer", "norm.running_var", "buffer:norm.running_var"),
        ("optimizer", "exp_avg of w", "exp_avg of w"),
    ],
)
def test_tensor_that_was_not_finite_before(kind, name, where):
    """It is named so that a program can look it up."""
    found = only(trace([], loss(-1), state=(Sink(kind, name, BAD),)))
    assert (found.phase, found.where) == ("data", where)


def test_explained_with_what_an_inquiry_told():
    """The ops that made the operand are quoted, and the cause may be another."""
    zero = Operand("self", FINE, at=(0.0,), at_zero=2)
    born = replace(NAN, kind="inf", operands=(zero,))
    of = trace([event(0, "log", birth=born, frame=LINE)], loss(0))
    (suspect,) = find_suspects(of)
    made_by = Ancestor("aten::exp", 0.0, "float32", operands=(("self", -200.0),))
    found = explain(of, suspect, Inquiry(lineage=(("self", (made_by,)),)))
    assert suspect.finding.cause == "pole"
    assert found.cause == "underflow_to_zero"
    assert found.evidence == (*suspect.finding.evidence, "self there is 0: exp(-200)")
    data = trace([], loss(-1), state=(Sink("batch", "batch", BAD),))
    (suspect,) = find_suspects(data)
    assert explain(data, suspect, Inquiry(growth=1e9)) == suspect.finding


def test_first_kind_of_sink_decides():
    """A non-finite loss explains its gradients; gradients explain the stepped parameters."""
    events = [event(0, birth=NAN), back(1, "div", birth=NAN), event(2, phase="optimizer")]
    events[2] = replace(events[2], birth=NAN)
    stepped = Sink("stepped", "w", BAD, last=(2,))
    assert stops(trace(events, loss(0), gradient("w", 1), stepped)) == [0]
    assert stops(trace(events, gradient("w", 1), stepped)) == [1]
    assert stops(trace(events, stepped)) == [2]
    assert only(trace(events, stepped)).phase == "optimizer"


def test_gradient_walk_stays_in_the_backward():
    """From a gradient nothing leads back into a forward whose loss was finite."""
    kept = event(0, "log", birth=NAN)
    events = [kept, back(1, "mul", sources=((0,),)), back(2, "sum", sources=((1,),))]
    assert stops(trace(events, gradient("w", 2))) == [1]


def test_kept_forward_value_is_a_stop_only_at_finite_gradients():
    """A node whose incoming gradient was non-finite already is not the one that lets it out."""
    events = [
        event(0, "log", birth=NAN),
        back(1, "div", birth=NAN),
        back(2, "mul", sources=((1,), (0,))),
    ]
    assert stops(trace(events, gradient("w", 2))) == [1]


def test_walk_ends_on_circles_of_memory():
    """Ops that write in place may be each other's source."""
    events = [event(0, "add_", sources=((1,),)), event(1, "mul_", sources=((0,),))]
    assert stops(trace(events, loss(1))) == []


def test_way_is_the_shortest_to_the_first_sink():
    """Of two ways from the culprit, the one with fewer ops."""
    events = [
        back(0, "div", birth=NAN),
        back(1, "mul", sources=((0,),)),
        back(2, "mm", sources=((1,),)),
        back(3, "sum", sources=((0,),)),
        back(4, "t", sources=((2,), (3,))),
    ]
    both = trace(events, gradient("w", 4))
    assert [e.index for e in way_to_sink(both, walk_back(both), events[0])] == [0, 3, 4]
    ends = trace(events, gradient("w", 4), gradient("b", 0))
    assert [e.index for e in way_to_sink(ends, walk_back(ends), events[0])] == [0]


def test_way_of_an_event_that_leads_nowhere_is_itself():
    """A way can always be shown."""
    events = [event(0, birth=NAN), event(1, birth=NAN)]
    one = trace(events, loss(1))
    assert way_to_sink(one, walk_back(one), events[0]) == (events[0],)


# -- findings: which op, which line ----------------------------------------------------------------


def backward(*before, number=5, node="SqrtBackward0", op="div", **more):
    """Forward ops, then one backward op that makes a non-finite gradient."""
    fault = back(len(before), op, number, node, birth=NAN)
    return trace([*before, fault], gradient("w", len(before)), **more)


def test_forward_finding_is_the_op_itself():
    """A value made in the forward: the op, its line, its module, no formula."""
    one = trace([event(0, "log", birth=NAN, frame=LINE, module="net.head")], loss(0))
    finding = only(one)
    assert (finding.phase, finding.op, finding.module) == ("forward", "aten::log", "net.head")
    assert (finding.file, finding.line, finding.function) == ("m.py", 3, "f")
    assert (finding.node, finding.formula_op, finding.dtype) == (None, None, "float32")


def test_backward_finding_is_the_forward_op_of_the_node():
    """The origin is looked up by the number of the node."""
    finding = only(backward(made(0, "exp", 4, OTHER), made(1, "sqrt", 5)))
    assert (finding.op, finding.node, finding.formula_op) == (
        "aten::sqrt",
        "SqrtBackward0",
        "aten::div",
    )
    assert (finding.phase, finding.line, finding.function) == ("backward", 3, "f")


def test_earliest_event_of_a_number_is_the_origin():
    """Ops that make no node bear the number of the last one that did."""
    assert only(backward(made(0, "sqrt", 5), made(1, "detach", 5, OTHER))).op == "aten::sqrt"


def test_gap_in_the_numbers_falls_to_the_nearest_earlier_op():
    """An in-place op on a view runs under a number that no forward op has."""
    events = (made(0, "exp", 2, OTHER), made(1, "sqrt_", 4), made(2, "log", 9, THIRD))
    finding = only(backward(*events, number=6, node="CopySlices"))
    assert (finding.op, finding.line) == ("aten::sqrt_", 3)


def test_node_without_any_forward_op_stands_for_itself():
    """Where nothing was recorded before the node, the formula's op is all there is."""
    finding = only(backward(number=5))
    assert (finding.op, finding.file, finding.line) == ("aten::div", None, None)


def test_recomputed_op_counts_as_forward():
    """Under checkpointing the op that made the node runs in the backward, on a line."""
    again = back(1, "sqrt", None, None, made=5, frame=OTHER)
    finding = only(backward(made(0, "exp", 4), replace(again, outputs=(FINE,))))
    assert (finding.op, finding.line) == ("aten::sqrt", 7)


def test_birth_in_a_recomputed_op_keeps_its_own_line():
    """What the user's code does during the backward is its own origin."""
    fault = back(1, "log", 5, "CheckpointBackward0", birth=NAN, frame=OTHER)
    finding = only(trace([made(0, "exp", 5), fault], gradient("w", 1)))
    assert (finding.op, finding.line) == ("aten::log", 7)


def test_custom_function_is_named_at_the_line_that_applied_it():
    """Not at the line inside its forward."""
    inside = made(0, "exp", 5, OTHER, caller=LINE)
    finding = only(backward(inside, node="GateBackward", op="mul"))
    assert (finding.op, finding.line, finding.formula_op) == ("custom:Gate", 3, "aten::mul")
    assert finding.cause == "custom_function_bug"


def test_custom_function_without_a_caller_takes_the_origin():
    """Where the applying line is unknown, the forward's own line is told."""
    assert only(backward(made(0, "exp", 5, OTHER), node="GateBackward")).line == 7


def test_sum_by_the_engine_belongs_to_no_node():
    """Two finite gradients that overflow together are no formula's fault."""
    fault = back(1, "add", 5, "MulBackward0", birth=replace(NAN, kind="inf", by_engine=True))
    finding = only(trace([made(0, "mul", 5), fault], gradient("w", 1)))
    assert (finding.op, finding.node, finding.formula_op) == ("aten::add", None, None)
    assert finding.cause == "gradient_accumulation_overflow"


def test_occurrence_counts_runs_of_the_op_on_its_line():
    """In a loop the how-manieth pass it was; other lines and ops do not count."""
    forward = (
        made(0, "sqrt", 1),
        made(1, "sqrt", 2, OTHER),
        made(2, "exp", 3),
        made(3, "sqrt", 4),
        made(4, "sqrt", 5),
        made(5, "sqrt", 6),
    )
    assert only(backward(*forward)).occurrence == 3
    assert only(backward(*forward, number=1)).occurrence == 1


def test_terms_are_the_owners_of_the_node():
    """A shared node has several owners, an unknown one none."""
    owners = {5: ("align", "gap"), 4: ("other",)}
    assert only(backward(made(0, "sqrt", 5), owners=owners)).terms == ("align", "gap")
    assert only(backward(made(0, "sqrt", 6), number=6, owners=owners)).terms == ()
    forward = event(0, "log", birth=NAN, made=4)
    assert only(trace([forward], loss(0), owners=owners)).terms == ("other",)


def test_poisoned_gradients_are_counted_by_group():
    """In the order in which the groups are met."""
    sinks = (gradient("a", 0), gradient("b", 0, group="body"), gradient("c", 0))
    finding = only(trace([back(0, "div", birth=NAN)], *sinks))
    assert finding.poisoned == (("head", 2, 2), ("body", 1, 1))


def test_path_has_one_station_for_each_place():
    """From the culprit to the first sink; additions of the engine are left out of it."""
    events = [
        made(0, "linear", 1, THIRD, module="net"),
        made(1, "exp", 2, OTHER),
        made(2, "sqrt", 3),
        back(3, "div", 3, "SqrtBackward0", birth=NAN),
        back(4, "mul", 3, "SqrtBackward0", sources=((3,),)),
        back(5, "add", 1, "AddmmBackward0", sources=((4,),)),
        back(6, "mul", 2, "ExpBackward0", sources=((5,),)),
        back(7, "mm", 1, "AddmmBackward0", sources=((6,),)),
    ]
    assert only(trace(events, gradient("w", 7), gradient("b", 7))).path == (
        Step("aten::sqrt", "SqrtBackward0", "", LINE),
        Step("aten::exp", "ExpBackward0", "", OTHER),
        Step("aten::linear", "AddmmBackward0", "net", THIRD),
    )


# -- findings: data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "op", "module"),
    [
        ("batch", "input", ""),
        ("parameter", "parameter", "net.head"),
        ("buffer", "buffer", "net.head"),
        ("optimizer", "optimizer state", ""),
        ("captured", "input", ""),
    ],
)
def test_data_finding(kind, op, module):
    """What was there before the step is told with its counts and its first index."""
    facts = TensorFacts((2, 3), "float64", nan=1, posinf=2, neginf=3)
    state = (Sink("batch", "x", BAD), Sink(kind, "net.head.w", facts, where=(1, 2)))
    finding = only(trace([event(0, sources=((-2,),))], loss(0), state=state))
    assert (finding.phase, finding.op, finding.module) == ("data", op, module)
    assert (finding.cause, finding.dtype) == ("bad_data", "float64")
    assert finding.evidence == (
        "net.head.w [2, 3] holds 1 NaN, 2 +inf, 3 -inf before the step, first at index [1, 2]",
    )
    assert finding.recipes == ("validate_batch",)


def test_data_finding_of_a_single_number():
    """A scalar has no index."""
    state = (Sink("captured", "a tensor", TensorFacts((), "float32", neginf=1)),)
    assert only(trace([], loss(-1), state=state)).evidence == (
        "a tensor [] holds 1 -inf before the step, it is a single number",
    )


# -- findings: evidence ----------------------------------------------------------------------------


def evidence(birth, op="div", shape=(4, 2), samples=4):
    """What is measured of a forward birth, in words."""
    one = event(0, op, birth=birth, outputs=(TensorFacts(shape, "float32", nan=2),))
    return list(only(trace([one], loss(0)), samples=samples).evidence)


@pytest.mark.parametrize(
    ("birth", "shape", "sentence"),
    [
        (NAN, (4,), "div returned 2 NaN of 4 elements [4], first at [1]"),
        (Birth(0, 1, "inf", ((),)), (), "div returned 1 infinite of 1 element []"),
        (
            Birth(0, 3, "nan and inf", ((0, 1),), samples=2),
            (4, 2),
            (
                "div returned 3 NaN or infinite of 8 elements [4, 2], in 2 of 4 samples, "
                "first at [0, 1]"
            ),
        ),
        (
            Birth(0, 3, "nan", samples=2),
            (5, 2),
            "div returned 3 NaN of 10 elements [5, 2], in 2 of 5 entries of the first dimension",
        ),
    ],
)
def test_evidence_counts_the_elements(birth, shape, sentence):
    """How many, of how many, in how many samples, and where first."""
    assert evidence(birth, shape=shape) == [sentence]


@pytest.mark.parametrize(
    ("operand", "sentence"),
    [
        (Operand("self", FINE, at_zero=2), "dividend: exactly 0 at all of them"),
        (Operand("other", FINE, at=(0.0, 3.5, 3.5), at_zero=1), "divisor: 0, 3.5 there, exactly "),
        (Operand("other", FINE, at=(2.0,), at_zero=0), "divisor: 2 there"),
        (Operand("weight", FINE, smallest=-1.0, largest=2.0), "weight: -1 to 2"),
        (Operand("index", TensorFacts((3,), "int64")), "index: [3] int64"),
    ],
)
def test_evidence_quotes_the_operands(operand, sentence):
    """Their values at the offending elements, else their range, else their shape."""
    if sentence.endswith("exactly "):
        sentence += "0 at 1 of 2"
    assert evidence(replace(NAN, operands=(operand,)))[1] == sentence


def test_evidence_of_one_element():
    """It is `that element`."""
    born = Birth(0, 1, "inf", operands=(Operand("other", FINE, at_zero=1),))
    assert evidence(born)[1] == "divisor: exactly 0 at that element"


def test_evidence_gives_the_arguments_where_no_tensor_went_in():
    """An op without operands is explained by its numbers."""
    born = replace(NAN, scalars=(("start", 1e30), ("end", 2.0)))
    assert evidence(born, op="arange")[1] == "arguments: start = 1e+30, end = 2"
    assert len(evidence(replace(born, operands=(Operand("self", FINE, at_zero=0),)))) == 2


def test_evidence_of_a_decomposition():
    """How many values are tied, and the rank; kept tensors say nothing more."""
    spectrum = Spectrum(4, 9, 3, 2, 0.0, 1e-4, 5, 1.25)
    kept = Operand("saved eigenvalues", FINE, at_zero=0)
    assert evidence(replace(NAN, spectrum=spectrum, operands=(kept,)))[:-1] == [
        (
            "3 of 4 samples: bit-identical values among the 9 that the call returned (up to 2 "
            "equal), smallest gap 0"
        ),
        (
            "rank: 5 of 9 values stand above the floor 0.0001, which is null space plus loading; "
            "the largest is 1.25"
        ),
    ]


@pytest.mark.parametrize(
    ("kept", "cause"),
    [
        (TensorFacts((4,), "float32", neginf=2), "inf_minus_inf_or_zero_times_inf"),
        # The loss is finite, so that what the forward left as NaN was taken out of it.
        (TensorFacts((4,), "float32", nan=2), "masked_branch_backward"),
    ],
)
def test_evidence_of_a_kept_value(kept, cause):
    """Where nothing was born the input is told that let the value in; NaN is no infinity."""
    events = [
        event(0, "log", birth=NAN),
        replace(back(1, "mul", sources=((), (0,))), inputs=(FINE, kept)),
    ]
    finding = only(trace(events, gradient("w", 1)))
    assert finding.evidence == (
        "input 1 of mul, kept from the forward, holds 2 non-finite of 4 elements",
    )
    assert finding.cause == cause


def test_what_came_after_is_what_the_program_did_with_the_result():
    """Nodes that ran before the guilty one and whose forward came after it: a mask among them."""
    zero = Operand("self", FINE, at=(0.0,), at_zero=2)
    pole = Operand("other", FINE, at=(0.0,), at_zero=2)
    born = replace(NAN, operands=(zero, pole))

    def cause(number):
        mask = back(2, "where", number, "WhereBackward0", finite=True)
        fault = back(3, "div", 5, "SqrtBackward0", birth=born)
        events = [made(0, "sqrt", 5), made(1, "where", number), mask, fault]
        return only(trace(events, gradient("w", 3))).cause

    assert cause(6) == "masked_branch_backward"
    assert cause(4) == "infinite_derivative_at_boundary"


# -- comparison: one run in words ------------------------------------------------------------------

HEAD, POISONED = Group("head", 1.0, 0, 4, 1), Group("head", math.nan, 2, 4, 1)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (Run("native", raised="E: no"), "the step raised E: no"),
        (Run("native", loss=math.nan), "the loss is nan"),
        (Run("native", loss=-math.inf), "the loss is -inf"),
        (
            Run("native", loss=1.5, groups=(POISONED,)),
            "the loss is finite (1.5); 2 of 3 gradients are not",
        ),
        (
            Run("native", loss=1.5, groups=(HEAD,), stepped_nonfinite=2),
            "loss and gradients are finite; after the optimizer step 2 of 4 parameters are not",
        ),
        (Run("native", loss=1.5, groups=(HEAD,)), "the loss (1.5) and 3 gradients are finite"),
    ],
)
def test_describe_nonfinite(run, sentence):
    """The first thing that is not finite, with its numbers."""
    assert describe_nonfinite(run) == sentence


# -- comparison: precisions ------------------------------------------------------------------------

SICK = Run("native", loss=1.0, groups=(POISONED,), culprit="aten::div", culprit_dtype="float32")
WELL = Run("native", loss=1.0, groups=(HEAD,))


def named(run, variant, **more):
    """The same run under another variant."""
    return replace(run, variant=variant, **more)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([], ""),
        ([WELL, named(SICK, "fp64")], ""),
        ([SICK], ""),
        ([named(WELL, "fp64")], ""),
        ([SICK, named(WELL, "fp64", ablated=("a",))], ""),
        ([SICK, named(SICK, "fp32")], ""),
        (
            [SICK, named(WELL, "fp32"), named(WELL, "fp64")],
            "a fault of range or rounding in half precision: gone in fp32",
        ),
        (
            [SICK, named(SICK, "fp32"), named(WELL, "fp64")],
            "a fault of rounding or range: gone in fp64, not in fp32",
        ),
        ([SICK, named(WELL, "fp64")], "a fault of rounding or range: gone in fp64"),
        (
            [SICK, named(SICK, "fp32", raised="E"), named(WELL, "fp64")],
            "fp32 cannot tell: it raised E; a fault of rounding or range: gone in fp64",
        ),
        (
            [SICK, named(SICK, "fp64", culprit_dtype="complex128")],
            "not a precision fault: div ran in complex128 and failed there too",
        ),
        (
            [SICK, named(SICK, "fp64", culprit="aten::log", culprit_dtype="float64")],
            "fp64 fails as well, but at another op: log",
        ),
        (
            [SICK, named(SICK, "fp64")],
            "fp64 cannot tell: the op still ran in float32",
        ),
        (
            [SICK, named(SICK, "fp64", culprit=None, culprit_dtype=None)],
            "fp64 cannot tell: the op still ran in an unknown dtype",
        ),
        (
            [SICK, named(SICK, "fp64", culprit="buffer", culprit_dtype="float64")],
            "fp64 cannot tell: its replay begins with a value that is non-finite",
        ),
        (
            [replace(SICK, culprit="input"), named(SICK, "fp64", culprit="input")],
            "not a precision fault: the input is non-finite before the step",
        ),
        ([SICK, named(SICK, "fp64", raised="E")], "fp64 cannot tell: it raised E"),
    ],
)
def test_judge_precision(runs, sentence):
    """What the precisions show, and no more than what was run can show."""
    assert judge_precision(runs) == sentence


# -- comparison: ablations -------------------------------------------------------------------------

ALIGN, GAP = Term("align", 0.5, True, 12, 19), Term("gap", 0.25, True, 3, 5)
BEFORE = Run("native", loss=0.75, terms=(ALIGN, GAP), groups=(POISONED,))


def judged(name="align", after=(GAP,), was=None, now=None, **more):
    """The judgement on an ablation after which these terms are left."""
    run = Run("native", (name,), **{"loss": 0.25, "terms": after, "groups": (HEAD,)} | more)
    weights = tuple({} if w is None else {name: w} for w in (was, now))
    return judge_ablation(name, BEFORE, run, weights)


def test_term_that_is_gone_took_effect():
    """No op of it is left in the backward."""
    one = judged()
    assert (one.names, one.mode, one.requested) == (("align",), "without", True)
    assert (one.finite, one.cures, one.took_effect) == (True, True, True)
    assert (one.ops_before, one.ops_after) == ((12, 19), (0, 0))
    assert (one.loss, one.groups, one.raised) == (0.25, (HEAD,), None)


def test_term_that_still_has_a_backward_took_no_effect():
    """Its forward may still run; its backward must not."""
    still = judged(after=(replace(ALIGN, backward_ops=1), GAP))
    assert (still.took_effect, still.ops_after) == (False, (12, 1))
    assert judged(after=(replace(ALIGN, backward_ops=0), GAP)).took_effect is True


@pytest.mark.parametrize(
    ("was", "now", "effect"), [(0.0, 0.0, False), (0.5, 0.5, False), (0.5, 0.0, True)]
)
def test_weight_must_have_been_live_and_be_gone(was, now, effect):
    """A weight that was 0 before cannot take effect, nor one that cannot be set."""
    one = judged(was=was, now=now)
    assert (one.took_effect, one.weight_before, one.weight_after) == (effect, was, now)


def test_weight_stands_for_the_term_that_went_with_it():
    """The term that vanished or became 0, if it is the only one."""
    gone = judged("lam_align", was=0.5, now=0.0)
    assert (gone.ops_before, gone.took_effect) == ((12, 19), True)
    zeroed = judged("lam_align", after=(Term("align", 0.0, False), GAP), was=0.5, now=0.0)
    assert (zeroed.ops_before, zeroed.ops_after) == ((12, 19), (0, 0))
    assert judged("lam_both", after=(), was=0.5, now=0.0).ops_before is None


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [(0.75, 0.25, True), (0.75, 0.75, None), (math.nan, math.nan, None), (math.nan, 1.0, True)],
)
def test_without_ops_the_value_of_the_loss_must_tell(before, after, effect):
    """Where it did not change, nothing shows whether the weight took effect; NaN shows nothing."""
    runs = [Run("native", loss=value, groups=(HEAD,)) for value in (before, after)]
    assert judge_ablation("lam", *runs, ({"lam": 1.0}, {"lam": 0.0})).took_effect is effect


def test_run_that_raised_cannot_tell():
    """It says why it raised, and claims nothing."""
    one = judged(after=(), loss=math.nan, raised="KeyError: 'align'")
    assert (one.took_effect, one.finite, one.cures) == (None, False, False)
    assert one.raised == "KeyError: 'align'"


# -- comparison: names and vectors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "confusable"),
    [
        ("lam_align", "lam_subspace_align", True),
        ("lam_subspace_align", "lam_align", True),
        ("lam_align", "lam_align", False),
        ("lam_align", "lam_gap", False),
        ("align", "lam_align", False),
        ("lam_align_x", "lam_align_y", False),
    ],
)
def test_confusable_names(one, other, confusable):
    """One name holds all the words of the other, and more than one of them."""
    expected = (("lam_align", "lam_subspace_align"),) if confusable else ()
    assert confusable_names([one, other], [one]) == expected


def test_confusable_names_are_told_once_and_of_interest():
    """Each pair once; a pair that nobody asked about is not told."""
    names = ["lam_align", "lam_subspace_align", "w_a", "w_a_b"]
    assert confusable_names(names, names[:2]) == (("lam_align", "lam_subspace_align"),)
    assert confusable_names(names, []) == ()


def decomposition(number, *ops, run=0, start=10, node="LinalgEighBackward0"):
    """The ops of one backward of a decomposition."""
    found = (
        back(start + i, op, number, node, node_run=run, finite=True) for i, op in enumerate(ops)
    )
    return tuple(found)


def test_vector_use():
    """A backward that divides uses the vectors; one that does not is safe for repeated values."""
    events = (
        made(0, "_linalg_eigh", 1),
        made(1, "_linalg_eigh", 2),
        made(2, "_linalg_svd", 3, module="net"),
        made(3, "linalg_eig", 4),
        *decomposition(1, "mul", "div_", "mul", run=1),
        *decomposition(2, "mul", "matmul", run=2),
        *decomposition(3, "div", run=3, node="LinalgSvdBackward0"),
        *decomposition(4, "mul", run=4, node="LinalgEigBackward0"),
        *decomposition(9, "mul", run=5),
        *decomposition(1, "div", run=6, node="SqrtBackward0"),
    )
    assert vector_use(trace(events, owners={1: ("align", "gap"), 2: ("gap",)})) == (
        "linalg_eigh in term align, gap: vectors used",
        "linalg_eigh in term gap: values only, its backward never divides",
        "linalg_svd in net: vectors used",
        "linalg_eig: values only, its backward never divides",
        "decomposition: values only, its backward never divides",
    )
    assert vector_use(trace(events[:4])) == ()
