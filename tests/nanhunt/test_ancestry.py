"""Lineage: where a number came from and what became of it, asked of the tensors of real steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanhunt.causes.lineage import making
from nanhunt.recorder import Scope, inquire
from nanhunt.recorder.kept import Kept, element
from nanhunt.records import Birth
from nanhunt.replay import replay
from nanhunt.subject import Subject

KEEP = 2**28


def kept_replay(loss, *batch, keep=KEEP):
    """A replay of one step of which `w` = 1 is the only parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(()))
    subject = Subject(model, [batch], lambda m, *b: loss(m.w, *b))
    return replay(subject, batch, scope=Scope(keep=keep))


def ask(done, op, *, node=None):
    """What the inquiry about the first birth in an op tells; `node` where it is in the backward."""
    events = done.trace.events
    guilty = next(e for e in events if e.birth and base(e.op) == op and e.node == node)
    origin = guilty
    if node is not None:
        origin = next(e for e in events if e.made == guilty.number)
    first = next((e.index for e in events if e.phase == "backward"), len(events))
    return inquire(done.kept, guilty, origin, first)


def base(op):
    return op.removeprefix("aten::").strip("_")


def ops(chain):
    """The ops of a chain, the nearest first; an empty one stands for what the step was given."""
    return [base(ancestor.op) for ancestor in chain]


def lineage(loss, *batch, op="log", role="self"):
    """The chain of an operand of the op in which something is born."""
    return ask(kept_replay(loss, *batch), op).chain(role)


def numbers(*values):
    return torch.tensor(values)


# -- up: through what passes a number on -----------------------------------------------------------

# Each makes, of 3, 0 and 5 (or of three rows with them), a tensor whose only 0 comes from the 0.
PASSING = {
    "clone": lambda y: y.clone(),
    "to_copy": lambda y: y.double(),
    "view": lambda y: y.view(3, 1),
    "transpose": lambda y: y.view(3, 1).t(),
    "slice": lambda y: y[1:],
    "flipped_slice": lambda y: torch.as_strided(y, (2,), (1,), 1),
    "expand": lambda y: y.expand(2, 3),
    "unsqueeze": lambda y: y.unsqueeze(0).unsqueeze(2),
    "neg": lambda y: torch.neg(y) * -1,
    "abs": lambda y: y.abs(),
    "sqrt": lambda y: y.sqrt(),
    "square": lambda y: y.square(),
    "mul": lambda y: y * 2,
    "mul_other": lambda y: numbers(4.0, 2.0, 1.0) * y,
    "mul_broadcast": lambda y: y.view(3, 1) * torch.ones(3, 4),
    "div": lambda y: y / 7,
    "clamp": lambda y: y.clamp(-1, 1),
    "maximum": lambda y: torch.maximum(y, numbers(-1.0, -1.0, -1.0)),
    "where": lambda y: torch.where(numbers(1.0, 1.0, 0.0) > 0, y, 9.0),
    "where_other": lambda y: torch.where(numbers(1.0, 0.0, 1.0) > 0, numbers(9.0, 0.0, 9.0), y),
    "reshape_of_transposed": lambda y: torch.outer(y, numbers(1.0, 2.0)).t().reshape(6),
    "index": lambda y: y[torch.tensor([2, -2, 0])],
    "index_of_another_axis": lambda y: y.expand(2, 3)[:, torch.tensor([[1], [2]])],
    "index_by_a_mask": lambda y: y.expand(2, 3)[:, y < 9],
    "index_by_a_mask_of_two_axes": lambda y: y.view(1, 3)[y.view(1, 3) < 9],
    "index_select": lambda y: y.view(1, 3).index_select(-1, torch.tensor([1, 0])),
    "index_select_of_one": lambda y: y.index_select(0, torch.tensor(1)),
    "index_select_of_a_number": lambda y: y[1].index_select(0, torch.tensor([0])),
    "gather": lambda y: y.expand(2, 3).gather(1, torch.tensor([[1, 0], [0, 1]])),
    "gather_of_a_number": lambda y: y[1].gather(0, torch.tensor(0)),
    "matrix_product": lambda y: torch.outer(y, numbers(1.0, 2.0)) @ torch.ones(2, 2),
    "batched_product": lambda y: y.view(1, 3, 1) @ torch.ones(1, 1, 4),
    "linear_in_3d": lambda y: y.view(1, 3, 1) @ torch.ones(1, 4),
    "cat": lambda y: torch.cat([numbers(2.0, 4.0), y]),
    "cat_of_an_empty_one": lambda y: torch.cat([y[:0], y, numbers(1.0)]),
    "cat_along_another_axis": lambda y: torch.cat([torch.ones(3, 2), y.view(3, 1)], -1),
    "stack": lambda y: torch.stack([numbers(1.0, 2.0, 3.0), y]),
    "stack_along_the_last_axis": lambda y: torch.stack([y, numbers(1.0, 2.0, 3.0)], -1),
}


@pytest.mark.parametrize("name", PASSING)
def test_zero_is_followed_to_its_maker(name):
    """The op that made the 0 is at the end, out of the very numbers that it was made of."""
    given = numbers(3.0, -200.0, 5.0)
    chain = lineage(lambda w, x: PASSING[name](torch.exp(x * w)).log().sum(), given)
    assert ops(chain)[-1] == "exp"
    assert chain[-1].value == 0
    assert chain[-1].operands == (("self", -200.0),)
    assert all(ancestor.value == 0 for ancestor in chain)


REDUCING = {
    "sum": lambda m: m.sum(1),
    "sum_of_all": lambda m: m[1].sum(),
    "sum_kept": lambda m: m.sum(1, keepdim=True),
    "sum_of_first": lambda m: m.t().sum(0),
    "sum_of_negative_dim": lambda m: m.sum(-1),
    "mean": lambda m: m.mean(1),
    "mean_kept": lambda m: m.mean(1, keepdim=True),
    "norm": lambda m: torch.linalg.vector_norm(m, dim=1),
    "norm_kept": lambda m: m.norm(dim=1, keepdim=True),
    "amax": lambda m: m.amax(1),
    "max": lambda m: m.max(1).values,
    "prod": lambda m: m.prod(1),
    "prod_kept": lambda m: m.prod(1, keepdim=True),
    "cumprod": lambda m: m.cumprod(1),
    "cumsum": lambda m: m.cumsum(1),
}


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2)])
def test_zero_is_followed_through_a_reduction(name, shape):
    """To an element of the slice that was reduced, also where the matrix is square."""
    given = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) / 100 - 1
    given[1] = -200.0 - torch.arange(shape[1])
    chain = lineage(lambda w, x: REDUCING[name](torch.exp(x * w)).log().sum(), given)
    assert ops(chain)[-1] == "exp"
    assert chain[-1].operands[0][1] <= -200


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("amin", lambda m: m.amin(1)),
        ("min", lambda m: m.min(1).values),
        ("prod", lambda m: m.prod(1)),
        ("cumprod", lambda m: m.cumprod(1)),
        ("prod_of_all", lambda m: m[1].prod()),
    ],
)
def test_the_smallest_of_a_slice_decides(name, reduce):
    """One 0 among larger numbers makes a minimum and a product 0."""
    given = torch.zeros(3, 3)
    given[1, 2] = -200.0
    chain = lineage(lambda w, x: reduce(torch.exp(x * w)).log().sum(), given)
    assert ops(chain)[-1] == "exp"
    assert chain[-1].operands == (("self", -200.0),)


def test_the_largest_of_a_maximum_need_not_be_large():
    """A maximum over negative numbers comes from the smallest magnitude."""
    given = numbers(-5.0, -0.5, -3.0)
    chain = lineage(lambda w, x: (x * w).amax().log(), given)
    assert ops(chain) == ["amax", "mul"]
    assert chain[-1].operands[0] == ("self", -0.5)


def test_a_part_of_what_was_put_together_is_no_other():
    """A 0 that was given, beside one that underflowed in another part."""
    given = numbers(3.0, -200.0)

    def loss(w, x):
        return (1 / torch.cat([numbers(0.0, 2.0), torch.exp(x * w)])).sum()

    inquiry = ask(kept_replay(loss, given), "reciprocal")
    assert ops(inquiry.chain("self")) == ["cat", ""]
    assert making(inquiry.chain("self")) == "given"


def test_of_several_elements_one_with_a_zero_is_asked_about():
    """Its neighbour is only too small; where none is 0 the first one is."""
    given = numbers(-100.0, -103.5, -200.0)

    def loss(w, x):
        return (1 / torch.exp(x * w)).sum()

    chain = ask(kept_replay(loss, given), "reciprocal").chain("self")
    assert (chain[-1].value, chain[-1].operands) == (0.0, (("self", -200.0),))
    assert making(chain) == "underflow"
    chain = ask(kept_replay(loss, given[:2]), "reciprocal").chain("self")
    assert chain[-1].operands == (("self", -100.0),)
    assert making(chain) == "exact"


@pytest.mark.parametrize("reduce", [torch.cumsum, torch.cumprod, torch.sum, torch.prod])
def test_a_number_without_dimensions_is_reduced(reduce):
    """It has no axis to go along."""
    chain = lineage(lambda w, x: reduce(torch.exp(x * w), 0).log(), torch.tensor(-200.0))
    assert ops(chain)[-1] == "exp"


def test_given_numbers_end_the_chain():
    """A 0 of the batch was made by nobody."""
    chain = lineage(lambda w, x: (x[1:] * w).log().sum(), numbers(1.0, 0.0))
    assert ops(chain) == ["mul", ""]
    assert (chain[-1].value, chain[-1].operands, chain[-1].event) == (0.0, (), None)


def test_a_mask_that_is_multiplied_with_is_an_operand():
    """A 0 that a mask of booleans or of whole numbers made is no number that became too small."""
    for mask in (numbers(3.0, -1.0) > 0, torch.tensor([1, 0])):
        chain = lineage(lambda w, x, m: (x * w * m).log().sum(), numbers(3.0, -1.0), mask)
        assert dict(chain[0].operands) == {"self": -1.0, "other": 0.0}
        assert making(chain) != "underflow"


def test_what_a_checkpoint_runs_again_has_a_fate_too():
    """The forward of a reentrant checkpoint, the one with a graph, is a part of the backward."""

    def part(x):
        return torch.where(x > 0, torch.where(x > 0, x, 0.0).sqrt(), 0.0)

    done = kept_replay(
        lambda w, x: checkpoint(part, x * w, use_reentrant=True).sum(), numbers(3.0, -1.0)
    )
    assert ask_sqrt(done).removed_by == "aten::where"


def test_the_branch_that_was_chosen_is_followed():
    """Both branches are 0; only the other one underflowed."""
    given = numbers(-200.0, 1.0)

    def loss(w, x, chosen):
        return torch.where(chosen, torch.exp(x * w), torch.relu(w - 1)).log().sum()

    planted = lineage(loss, given, torch.tensor([True, True]))
    healthy = lineage(loss, given, torch.tensor([False, True]))
    assert ops(planted) == ["where", "exp"]
    assert "exp" not in ops(healthy)
    assert ops(healthy)[:2] == ["where", "relu"]


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda m: m.flip(0),
        lambda m: m.sort(0).values,
        lambda m: m.roll(1, 0),
        torch.linalg.inv,
        lambda m: torch.cumsum(m, 0).flip(0),
    ],
)
def test_an_equal_shape_does_not_lay_one_tensor_over_another(shuffle):
    """An op that moves numbers has other ones at the same place, so no operand is told there."""
    given = torch.eye(3) * 2

    def loss(w, x):
        return shuffle(torch.exp(x * w) - 1).log().sum()

    chain = lineage(loss, given)
    assert len(chain) == 1
    assert chain[0].operands == ()


def test_operands_of_a_matrix_product_are_its_row_and_column():
    """Also where all three are square: an element of the product lies over none of the factors."""
    left = torch.ones(2, 2)
    left[1] = 0.0
    right = torch.tensor([[7.0, 8.0], [9.0, 3.0]])
    chain = lineage(lambda w, a, b: ((a * w) @ (b * w)).log().sum(), left, right)
    assert ops(chain) == ["mm", "mul", ""]
    assert chain[0].operands == (("self", 0.0), ("mat2", 9.0))


# -- up: memory that is written to -----------------------------------------------------------------


def test_the_last_writer_of_an_element_made_it():
    """Of a buffer that is filled part by part, the part counts."""

    def loss(w, x):
        buffer = torch.ones(4) * 3
        buffer[2:] = torch.exp(x * w)
        buffer[:1].fill_(2.0)
        return buffer.log().sum()

    chain = lineage(loss, numbers(-200.0, 1.0))
    assert ops(chain) == ["copy", "exp"]
    assert chain[-1].operands == (("self", -200.0),)


def test_a_part_that_nobody_wrote_to_is_as_before():
    """The other part of the same buffer is no evidence."""

    def loss(w, x):
        buffer = torch.zeros(4)
        buffer[2:] = torch.exp(x * w)
        return buffer[:3].log().sum()

    assert ops(lineage(loss, numbers(1.0, -200.0))) == ["zeros"]


def test_in_place_ops_tell_no_operand_that_they_overwrote():
    """What a clamp in place was given is gone: it is not taken for what it left."""

    def loss(w, x):
        y = x * w
        y.clamp_(max=0.0)
        return y.log().sum()

    chain = lineage(loss, numbers(5.0, 1.0))
    assert ops(chain) == ["clamp"]
    assert chain[0].operands == ()
    healthy = lineage(lambda w, x: (x * w).clamp(max=0.0).log().sum(), numbers(5.0, 1.0))
    assert healthy[0].operands == (("self", 5.0),)


def test_an_operand_that_was_overwritten_later_is_not_told():
    """The number that the product was made of stood there only then."""

    def loss(w, x):
        factor = torch.full((2,), 1e-30) * w.detach()
        y = factor * 1e-30
        factor.fill_(5.0)
        return (y * w).log().sum()

    chain = lineage(loss, numbers(1.0))
    assert ops(chain) == ["mul", "mul"]
    assert chain[-1].operands == ()

    def healthy(w, x):
        factor = torch.full((2,), 1e-30) * w.detach()
        return (factor * 1e-30 * w).log().sum()

    assert lineage(healthy, numbers(1.0))[-1].operands == (("self", pytest.approx(1e-30)),)


def test_an_operand_of_the_guilty_op_that_it_overwrote_is_left_out():
    """A division in place has a divisor, and no dividend any more."""

    def loss(w, x):
        y = x * w
        y.div_(torch.exp(-x * 100))
        return y.sum()

    inquiry = ask(kept_replay(loss, numbers(1.0, 2.0)), "div")
    assert ops(inquiry.chain("other")) == ["exp"]
    assert inquiry.chain("self") == ()


@pytest.mark.parametrize(("index", "known"), [(0, (("self", 0.0),)), (1, ())])
def test_an_element_is_told_while_only_another_one_is_written_to(index, known):
    """Of an operand that was written to in part, the other part is as it was."""

    def loss(w, x):
        y = torch.exp(x)
        z = y.clone()
        y[index] = 4.0
        return (z * w).log().sum()

    chain = lineage(loss, numbers(1.0, -200.0))
    assert chain[1].operands == known
    assert ops(chain) == (["mul", "clone", "exp"] if known else ["mul", "clone"])


def test_complex_numbers_are_followed_into_their_parts():
    """A view as real numbers counts in other units than the memory that it looks at."""
    z = torch.tensor([1 + 1j, 2 + 0j, 0 + 3j, 4 + 4j])

    def loss(w, z):
        return torch.view_as_real(z * w)[:, 0].clone().log().sum()

    chain = lineage(loss, z)
    assert ops(chain) == ["clone"]  # 0 is the real part, and 3 the magnitude
    assert chain[0].operands == (("self", 0.0),)
    whole = kept_replay(lambda w, z: torch.view_as_real(z * w).clone().reciprocal().sum(), z)
    assert ask(whole, "reciprocal").chain("self")[0].value == 0


def test_sparse_operands_are_left_out():
    """Their values stand in another shape than their own."""

    def loss(w, x):
        sparse = torch.sparse_coo_tensor([[0, 1], [1, 0]], x, (2, 2), check_invariants=True)
        return torch.sparse.sum((sparse * w * 1e38) * 1e38)

    inquiry = ask(kept_replay(loss, numbers(1.0, 2.0)), "mul")
    assert inquiry.chain("self") == ()


# -- what is kept ----------------------------------------------------------------------------------


def test_a_small_budget_drops_the_oldest_answers():
    """What was given up is missing, and nothing else takes its place."""

    def loss(w, x):
        y = torch.exp(x * w)
        zero = y.clone()
        for _ in range(8):
            y = y + 1.0
        return (zero.log() + y).sum()

    given = torch.full((64,), -200.0)
    whole = ask(kept_replay(loss, given), "log").chain("self")
    assert ops(whole) == ["clone", "exp"]
    parts = [ask(kept_replay(loss, given, keep=256 * n), "log").chain("self") for n in range(4, 30)]
    assert all(part == whole[: len(part)] for part in parts)
    assert {len(part) for part in parts} == {0, 1, 2}


def test_a_budget_for_nothing_answers_nothing():
    """The culprit itself was given up."""

    def loss(w, x):
        y = (x * w).log()
        return sum((y * k for k in range(9)), y).sum()

    inquiry = ask(kept_replay(loss, torch.zeros(64), keep=64), "log")
    assert (inquiry.lineage, inquiry.result, inquiry.removed_by) == ((), None, None)


def test_nothing_is_kept_unless_asked():
    """A plain recorder holds no tensor."""
    model = nn.Linear(2, 1)
    subject = Subject(model, [torch.ones(1, 2)], lambda m, x: m(x).sum())
    assert replay(subject, torch.ones(1, 2)).kept is None


def test_calls_are_held_by_their_index():
    """A call is known by the index of its event, and those after it follow in order."""
    done = kept_replay(lambda w, x: (x * w).sum(), numbers(1.0))
    events = done.trace.events
    assert [done.kept.get(e.index).call.info.name for e in events] == [e.op for e in events]
    assert [call.event for call in done.kept.after(events[0].index)] == [
        e.index for e in events[1:]
    ]
    assert Kept(KEEP).get(0) is None


@pytest.mark.parametrize(
    ("tensor", "where", "value"),
    [
        (torch.tensor([1.0, 2.0]), (1,), 2.0),
        (torch.tensor(3 + 4j), (), 5.0),
        (torch.tensor([True]), (0,), 1.0),
        (torch.ones(2, dtype=torch.bfloat16), (1,), 1.0),
        (torch.tensor([1.0]), (), None),
        (torch.ones(0), (0,), None),
        (torch.ones(2, device="meta"), (0,), None),
        (torch.eye(2).to_sparse(), (0, 0), None),
    ],
)
def test_element(tensor, where, value):
    """One number of a tensor; of a complex one the magnitude, and None where there is none."""
    assert element(tensor, where) == value


# -- down: what became of a result -----------------------------------------------------------------

SAFE = numbers(0.0, 4.0, 9.0)
# What takes the result at index 0 out of the forward again; and its healthy twin, which leaves it.
REMOVING = {
    "where": (
        lambda y, keep: torch.where(keep, y, 0.0),
        lambda y, keep: torch.where(~keep, y, 0.0),
    ),
    "where_other": (
        lambda y, keep: torch.where(~keep, torch.zeros(3), y),
        lambda y, keep: torch.where(keep, torch.zeros(3), y),
    ),
    "where_after_more": (
        lambda y, keep: torch.where(keep, (y.exp() * 2).view(3, 1)[:, 0], 0.0),
        lambda y, keep: torch.where(~keep, (y.exp() * 2).view(3, 1)[:, 0], 0.0),
    ),
    "where_of_a_scalar_column": (
        lambda y, keep: torch.where(keep.view(3, 1), y.view(3, 1) + torch.zeros(3, 4), 0.0),
        lambda y, keep: torch.where(~keep.view(3, 1), y.view(3, 1) + torch.zeros(3, 4), 0.0),
    ),
    "where_of_a_row": (
        lambda y, keep: torch.where(keep, y.expand(3, 3) * 1, 0.0),
        lambda y, keep: torch.where(keep.view(3, 1), y.expand(3, 3) * 1, 0.0),
    ),
    "index": (
        lambda y, keep: y[keep],
        lambda y, keep: y[~keep],
    ),
    "index_by_position": (
        lambda y, keep: y[torch.tensor([1, -1])],
        lambda y, keep: y[torch.tensor([1, -3])],
    ),
    "index_by_rows_and_columns": (
        lambda y, keep: y.view(1, 3).expand(2, 3).clone()[[0, 1], [1, 2]],
        lambda y, keep: y.view(1, 3).expand(2, 3).clone()[[0, 1], [1, 0]],
    ),
    "index_of_the_second_axis": (
        lambda y, keep: y.view(1, 3)[:, keep],
        lambda y, keep: y.view(1, 3)[:, ~keep],
    ),
    "masked_select": (
        lambda y, keep: y.masked_select(keep),
        lambda y, keep: y.masked_select(~keep),
    ),
    "masked_fill": (
        lambda y, keep: y.masked_fill(~keep, 1.0),
        lambda y, keep: y.masked_fill(keep, 1.0),
    ),
    "masked_fill_of_a_row": (
        lambda y, keep: y.expand(3, 3).masked_fill(~keep, 1.0),
        lambda y, keep: y.expand(3, 3).masked_fill(~keep.view(3, 1), 1.0),
    ),
    "index_put": (
        lambda y, keep: torch.index_put(y, (~keep,), torch.tensor(0.0)),
        lambda y, keep: torch.index_put(y, (keep,), torch.tensor(0.0)),
    ),
    "index_put_at_pairs": (
        lambda y, keep: torch.index_put(
            y.view(1, 3).expand(2, 3).clone(),
            (torch.tensor([0, 1]), torch.tensor([0, 0])),
            torch.tensor(7.0),
        ),
        lambda y, keep: torch.index_put(
            y.view(1, 3).expand(2, 3).clone(),
            (torch.tensor([0, 1]), torch.tensor([1, 0])),
            torch.tensor(7.0),
        ),
    ),
    "index_put_in_place": (
        lambda y, keep: set_to_zero(y.clone(), ~keep),
        lambda y, keep: set_to_zero(y.clone(), keep),
    ),
    "fill": (
        lambda y, keep: with_filled(y.clone(), 0),
        lambda y, keep: with_filled(y.clone(), 1),
    ),
    "copy": (
        lambda y, keep: set_to(y.clone(), slice(0, 2), torch.ones(2)),
        lambda y, keep: set_to(y.clone(), slice(1, 3), torch.ones(2)),
    ),
    "clamp": (
        lambda y, keep: y.clamp(min=1e-3),
        lambda y, keep: y.clamp(min=-1.0, max=2.0),
    ),
    "clamp_min": (
        lambda y, keep: y.clamp_min(1e-3),
        lambda y, keep: y.clamp_min(0.0),  # its slope at the bound is 1
    ),
    "maximum": (
        lambda y, keep: torch.maximum(y, torch.ones(3)),
        lambda y, keep: torch.minimum(y, torch.ones(3)),
    ),
    "relu": (
        lambda y, keep: torch.relu(y),  # its slope at 0 is 0
        lambda y, keep: torch.relu(y + 1),
    ),
    "relu_below": (
        lambda y, keep: torch.relu(y - 1),
        lambda y, keep: torch.relu(1 - y),
    ),
    "relu_in_place": (
        lambda y, keep: torch.relu_(y - 1),
        lambda y, keep: torch.relu_(y + 1),
    ),
}


def set_to(y, index, value):
    y[index] = value
    return y


def with_filled(y, index):
    y[index : index + 1].fill_(7.0)
    return y


def set_to_zero(y, index):
    return set_to(y, index, 0.0)


def fate(after, x=SAFE):
    """What an inquiry about the square root tells whose slope at index 0 is infinite."""

    def loss(w, x):
        y = torch.sqrt(x * w)
        return after(y, x > 0).sum()

    done = kept_replay(loss, x)
    return done, ask_sqrt(done)


def ask_sqrt(done):
    """Ask about the division by the root of 0, whether or not anything was born there."""
    events = done.trace.events
    guilty = next(e for e in events if e.node == "SqrtBackward0" and base(e.op) == "div")
    origin = next(e for e in events if e.made == guilty.number)
    first = next(e.index for e in events if e.phase == "backward")
    return inquire(done.kept, guilty, origin, first)


@pytest.mark.parametrize("name", REMOVING)
def test_the_op_that_takes_a_result_out_is_found(name):
    """Planted: the gradient that comes back is 0, and 0/0 is NaN."""
    done, inquiry = fate(REMOVING[name][0])
    guilty = next(e for e in done.trace.events if e.node == "SqrtBackward0" and e.birth)
    assert guilty.birth.kind == "nan"
    assert inquiry.removed_by is not None
    assert name.startswith(base(inquiry.removed_by))
    assert inquiry.result == 0


@pytest.mark.parametrize("name", REMOVING)
def test_a_result_that_stays_in_is_removed_by_nobody(name):
    """The healthy twin: the gradient that comes back is not 0."""
    done, inquiry = fate(REMOVING[name][1])
    guilty = next(e for e in done.trace.events if e.node == "SqrtBackward0" and e.birth)
    assert guilty.birth.kind == "inf"
    assert inquiry.removed_by is None
    assert inquiry.result == 0


STAYING = {
    "plain": lambda y, keep: y,
    "also_used_as_it_is": lambda y, keep: torch.where(keep, y, 0.0) + y,
    "used_as_it_is_first": lambda y, keep: y.sum() + torch.where(keep, y, 0.0).sum(),
    "in_both_branches": lambda y, keep: torch.where(keep, y, torch.relu(1 - y)),
    "one_of_its_copies_is_left": lambda y, keep: torch.where(torch.eye(3) > 0, y.expand(3, 3), 0.0),
    "mixed_with_others_first": lambda y, keep: torch.relu(y.view(1, 3) @ torch.ones(3, 3) - 1),
    "through_nan_to_num": lambda y, keep: torch.nan_to_num(y),
    "in_a_list": lambda y, keep: torch.cat([y, torch.where(keep, y, 0.0)]),
    "accumulated": lambda y, keep: torch.index_put(y, (~keep,), torch.tensor(1.0), accumulate=True),
}


@pytest.mark.parametrize("name", STAYING)
def test_one_way_into_the_loss_is_enough_to_stay_in(name):
    """An element that another op takes out of one of several ways is not removed."""
    done, inquiry = fate(STAYING[name])
    guilty = next(e for e in done.trace.events if e.node == "SqrtBackward0" and e.birth)
    assert guilty.birth.kind == "inf"
    assert inquiry.removed_by is None


def test_an_element_in_two_windows_stays_in_with_one():
    """A view of overlapping windows shows it twice."""

    def after(y, keep):
        windows = y.unfold(0, 2, 1)  # the 0 in the middle ends the first and begins the second
        return torch.where(torch.tensor([True, False]), windows, 0.0)

    _, inquiry = fate(after, numbers(4.0, 0.0, 9.0))
    assert inquiry.removed_by is None


LEAVING = {
    "a_metric": lambda y, keep: (y.mean(), torch.where(keep, y, 0.0))[1],
    "a_detached_part": lambda y, keep: torch.where(keep, y, 0.0) * y.detach().sum(),
    "its_own_mask": lambda y, keep: torch.where(y > 0, y, 0.0),
    "a_mask_and_a_copy": lambda y, keep: torch.where((y > 0) & keep, y.clone(), 0.0),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_the_gradient_does_not_come_back_through_does_not_count(name):
    """A metric, a detached copy and a comparison see the element and do not keep it in."""
    _, inquiry = fate(LEAVING[name])
    assert inquiry.removed_by == "aten::where"


def test_a_result_that_was_overwritten_is_not_told():
    """The log is taken out in place: where it stood there is the 0 that took its place."""

    def loss(w, x):
        y = torch.log(x * w)
        y[x == 0] = 5.0
        return y.sum()

    done = kept_replay(loss, SAFE)
    inquiry = ask(done, "div", node="LogBackward0")
    assert base(inquiry.removed_by) == "index_put"
    assert inquiry.result is None


def test_what_nan_to_num_replaced_is_removed_by_it():
    """The infinite log of 0 becomes a large number, through which no gradient comes back."""
    done = kept_replay(lambda w, x: torch.nan_to_num(torch.log(x * w)).sum(), SAFE)
    inquiry = ask(done, "div", node="LogBackward0")
    assert inquiry.removed_by == "aten::nan_to_num"
    assert inquiry.result == float("-inf")


@pytest.mark.parametrize("keepdim", [False, True])
def test_the_result_of_a_reduction_is_that_of_its_slice(keepdim):
    """Also of a square matrix, on which the vector of its results could be laid as well."""
    given = torch.full((3, 3), 2.0)
    given[1, 0] = 0.0

    def loss(w, x):
        y = (x * w).prod(1, keepdim=keepdim)
        return torch.where(y > 5, y, 1.0).sum()

    done = kept_replay(loss, given)
    events = done.trace.events
    origin = next(e for e in events if e.op == "aten::prod")
    first = next(e.index for e in events if e.phase == "backward")
    formula = [e for e in events if e.number == origin.made]
    guilty = next(e for e in formula if done.kept.get(e.index).outputs[0].shape == given.shape)
    born = replace(guilty, birth=Birth(0, 1, "nan", indices=((1, 2),)))
    inquiry = inquire(done.kept, born, origin, first)
    assert (inquiry.result, inquiry.removed_by) == (0.0, "aten::where")
    other = replace(guilty, birth=Birth(0, 1, "nan", indices=((2, 1),)))
    inquiry = inquire(done.kept, other, origin, first)
    assert (inquiry.result, inquiry.removed_by) == (8.0, None)
