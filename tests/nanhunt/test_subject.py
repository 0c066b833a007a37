"""A subject in any of its shapes, its batches, and every refusal with its sentence."""

import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from nanhunt.errors import SubjectError, UsageError
from nanhunt.structure import (
    count_samples,
    map_tensors,
    named_tensors,
    pick_samples,
    take_samples,
)
from nanhunt.subject import Subject, moved, told


def loss_fn(model, x):
    """A finite loss."""
    return model(x).mean()


def subject(batches=(), **more):
    """A subject with these batches."""
    return Subject(nn.Linear(2, 1), batches, loss_fn, **more)


def refusal(call, *args):
    """The sentence of the SubjectError that the call raises."""
    with pytest.raises(SubjectError) as caught:
        call(*args)
    return str(caught.value)


# -- shapes ----------------------------------------------------------------------------------------


def test_subject_is_taken_as_it_is():
    """Nothing is copied."""
    given = subject()
    assert Subject.of(given) is given


def test_bare_tuple_is_a_subject_of_one_batch():
    """`(model, batch, loss_fn)`: the batch itself, not a sequence of them."""
    model, batch = nn.Linear(2, 1), (torch.ones(1, 2),)
    taken = Subject.of((model, batch, loss_fn))
    assert (taken.model, taken.batches, taken.loss_fn) == (model, [batch], loss_fn)
    assert taken.batch(0) is batch


def test_any_object_of_that_shape_is_a_subject():
    """What it has is taken over, what it lacks or leaves None takes its default."""
    model = nn.Linear(2, 1)
    duck = SimpleNamespace(
        model=model, batches=[1], loss_fn=loss_fn, name="duck", seed=3, weights=None, other=1
    )
    taken = Subject.of(duck)
    assert (taken.model, taken.batches, taken.name, taken.seed) == (model, [1], "duck", 3)
    assert (taken.live_weights(), taken.groups, taken.optimizer) == ({}, {}, None)


def test_named_tuple_of_that_shape_is_no_bare_tuple():
    """Its second entry is the batches, since it says so."""

    class Offer(NamedTuple):
        model: object
        batches: object
        loss_fn: object

    assert Subject.of(Offer(nn.Linear(2, 1), [7, 8], loss_fn)).batch(1) == 8


SHAPES = "a subject is a tuple (model, batch, loss_fn) or an object with model, batches and loss_fn"


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (None, "None"),
        (7, "an object of type int"),
        ({"model": 1}, "an object of type dict"),
        ((1, 2), "a tuple of 2"),
        ((), "a tuple of 0"),
        (SimpleNamespace(model=1, batches=[]), "an object of type SimpleNamespace"),
    ],
)
def test_refuses_what_is_no_subject(value, came):
    """The sentence says what came."""
    assert refusal(Subject.of, value) == f"{SHAPES}; got {came}"


@pytest.mark.parametrize("wrap", [tuple, lambda parts: Subject(parts[0], [parts[1]], parts[2])])
def test_refuses_wrong_parts(wrap):
    """A subject made by hand is checked like any other."""
    model, batch = nn.Linear(2, 1), torch.ones(1, 2)
    assert refusal(Subject.of, wrap([loss_fn, batch, model])) == (
        "the subject's model is to be a torch.nn.Module; got an object of type function"
    )
    assert refusal(Subject.of, wrap([None, batch, loss_fn])) == (
        "the subject's model is to be a torch.nn.Module; got None"
    )
    assert refusal(Subject.of, wrap([model, batch, 0.5])) == (
        "the subject's loss_fn is to be called as loss_fn(model, *batch); "
        "got an object of type float"
    )


@pytest.mark.parametrize("part", ["model", "batches", "loss_fn"])
def test_refuses_a_needed_part_that_is_none(part):
    """None is no default for what every subject needs."""
    parts = {"model": nn.Linear(2, 1), "batches": [1], "loss_fn": loss_fn} | {part: None}
    assert refusal(Subject.of, SimpleNamespace(**parts)).endswith("; got None")


@pytest.mark.parametrize("batches", [iter([]), torch.ones(2), {0: 1}])
def test_refuses_batches_without_an_index(batches):
    """An iterator cannot be asked for batch 3 twice."""
    assert refusal(Subject.of, subject(batches)) == (
        "the subject's batches are to be a function of the index or a sequence; "
        f"got an object of type {type(batches).__name__}"
    )


def test_refuses_a_frozen_model():
    """Without a parameter that requires a gradient there is no backward."""
    frozen = subject()
    frozen.model.requires_grad_(requires_grad=False)
    sentence = "nothing can get a gradient: none of the model's {} parameters requires one; "
    assert refusal(Subject.of, frozen) == sentence.format(2) + "unfreeze at least one"
    empty = (nn.Identity(), None, loss_fn)
    assert refusal(Subject.of, empty) == sentence.format(0) + "unfreeze at least one"


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_batch_out_of_range_of_a_sequence(index):
    """A negative index does not count from the end."""
    assert refusal(subject([10, 11]).batch, index) == (
        f"batch {index} is out of range: the subject has 2 (0 to 1)"
    )


def test_batch_of_an_empty_sequence():
    """There is no range to name."""
    assert refusal(subject([]).batch, 0) == "batch 0 is out of range: the subject has no batches"


@pytest.mark.parametrize("error", [IndexError, KeyError, ValueError])
def test_batch_out_of_range_of_a_function(error):
    """The function's own sentence is told."""

    def batches(index):
        raise error(7)

    assert refusal(subject(batches).batch, 3) == "batch 3 is out of range: 7"


def test_negative_batch_never_reaches_a_function():
    """Python would count from the end without a word."""
    assert subject(lambda index: index).batch(4) == 4
    assert refusal(subject(lambda index: index).batch, -1) == (
        "batch -1 is out of range: batches are counted from 0"
    )


@pytest.mark.parametrize("error", [RuntimeError("disk gone"), SystemExit(3)])
def test_batch_that_fails_otherwise(error):
    """Any other error is told with its type and its line."""

    def batches(index):
        raise error

    line = batches.__code__.co_firstlineno + 1
    assert refusal(subject(batches).batch, 0) == (
        f"making batch 0 raised {type(error).__name__}: {error} (test_subject.py:{line})"
    )


def test_refusal_of_a_batch_function_is_kept():
    """A sentence that is meant for the reader is not wrapped in another one."""
    inner = subject([1])
    assert refusal(subject(inner.batch).batch, 5) == refusal(inner.batch, 5)


Pair = namedtuple("Pair", "x y")  # noqa: PYI024 - the plain form that users have


@dataclass
class Data:
    """A batch as a data class, with a field that its constructor does not take."""

    x: object
    rest: object = 5
    made: object = field(init=False, default=None)


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [((1, 2), (1, 2)), ((), ()), ([1, 2], ([1, 2],)), ({"x": 1}, ({"x": 1},)), (None, (None,))],
)
def test_only_a_tuple_is_splatted(batch, arguments):
    """Everything else is one argument."""
    one = Subject(nn.Identity(), [], lambda model, *given: given)
    assert one.call_loss(batch) == arguments


def test_named_tuple_is_one_argument():
    """Its fields are reached by name."""
    one = Subject(nn.Identity(), [], lambda model, *given: given)
    assert one.call_loss(Pair(1, 2)) == (Pair(1, 2),)


def test_map_rebuilds_every_kind_of_batch():
    """Tensors are changed wherever they are; types and other values are kept."""
    x = torch.zeros(2)
    batch = (x, [x, "s"], {"k": x}, Pair(x, 1), Data(x), OrderedDict(a=x), None, 3)
    changed = map_tensors(batch, lambda t: t + 1)
    names = ["[0]", "[1][0]", "[2]['k']", "[3].x", "[4].x", "[5]['a']"]
    assert [name for name, _ in named_tensors(changed)] == [f"batch{name}" for name in names]
    assert all(torch.equal(t, x + 1) for _, t in named_tensors(changed))
    assert [type(part) for part in changed] == [type(part) for part in batch]
    assert (changed[1][1], changed[3].y, changed[4].rest, changed[6:]) == ("s", 1, 5, (None, 3))
    assert not x.any()


def test_map_keeps_aliases():
    """A tensor that stands in two places is changed once."""
    x = torch.zeros(2)
    one, other = map_tensors((x, {"x": x}), torch.clone)
    assert one is other["x"]
    assert one is not x


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ((torch.ones(4, 2), torch.ones(4), torch.ones(3)), 4),
        (torch.ones(5, 1), 5),
        ({"x": torch.tensor(1.0)}, None),
        (None, None),
    ],
)
def test_count_samples(batch, samples):
    """The leading size that most tensors share."""
    assert count_samples(batch) == samples


LAYOUTS = {
    "strided": lambda x: x,
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse(layout=torch.sparse_csr),
    "nested": lambda x: torch.nested.as_nested_tensor([*x], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_are_taken_in_every_layout(name):
    """The first ones and chosen ones; what has no such dimension is left whole."""
    x, other = torch.arange(6.0).view(3, 2), torch.ones(2)

    def dense(tensor):
        return torch.stack([*tensor.unbind()]) if tensor.is_nested else tensor.to_dense()

    whole = LAYOUTS[name](x)
    first, left = take_samples((whole, other), 2, 3)
    assert first.layout == whole.layout
    assert torch.equal(dense(first) if name != "strided" else first, x[:2])
    assert left is other
    chosen = pick_samples(whole, [2, 0], 3)
    assert torch.equal(dense(chosen) if name != "strided" else chosen, x[[2, 0]])
    assert torch.equal(dense(pick_samples(x.to_sparse(), range(1, 3), 3)), x[1:])


def test_moved_to_the_same_device_is_the_same_subject():
    """Nothing happens on the CPU; elsewhere the batches follow the model."""
    one = subject([torch.ones(2)])
    assert moved(one, "cpu") is one
    away = moved(one, "meta")
    assert next(away.model.parameters()).device.type == away.batch(0).device.type == "meta"


# -- weights and groups ----------------------------------------------------------------------------


def test_live_weights_follow_a_function():
    """They are read anew each time, as numbers."""
    held = {"lam": torch.tensor(0.5)}
    one = subject(weights=lambda: held)
    assert one.live_weights() == {"lam": 0.5}
    held["lam"] = 2
    assert one.live_weights() == {"lam": 2.0}
    assert subject(weights={"a": 1}).live_weights() == {"a": 1.0}


def test_reweighted():
    """A weight is set where the subject says, and refused where it does not say."""
    calls = []
    subject(reweight=lambda *given: calls.append(given)).reweighted("lam", 0.0)
    assert calls == [("lam", 0.0)]
    with pytest.raises(UsageError) as caught:
        subject().reweighted("lam", 0.0)
    assert str(caught.value) == "the subject cannot set the weight 'lam': it has no `reweight`"


def net():
    """A model with two children, one parameter of its own and one frozen one."""
    model = nn.Module()
    model.body, model.head = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model.scale = nn.Parameter(torch.ones(()))
    model.frozen = nn.Parameter(torch.ones(()), requires_grad=False)
    return model


def test_groups_are_the_children_by_default():
    """What the model holds directly stands under `model`; frozen parameters do not count."""
    groups = Subject(net(), [], loss_fn).parameter_groups()
    assert {name: len(members) for name, members in groups.items()} == {
        "model": 1,
        "body": 2,
        "head": 4,
    }


def test_groups_by_prefix_and_by_parameter():
    """A prefix ends at a dot; the first group that names a parameter has it; empty ones go."""
    model = net()
    groups = {"first": ["head.0"], "mine": [model.scale, "body."], "rest": ["hea"], "frozen": []}
    assert Subject(model, [], loss_fn, groups=groups).parameter_groups() == {
        "first": ["head.0.weight", "head.0.bias"],
        "mine": ["scale", "body.weight", "body.bias"],
        "head": ["head.1.weight", "head.1.bias"],
    }


# -- errors of the user's code ---------------------------------------------------------------------


def test_told_is_one_line():
    """Type, message on one line, and the last line of the user's own code."""

    def fails():
        torch.ones(2).reshape(3, "x\ny")

    with pytest.raises(TypeError) as caught:
        fails()
    line = fails.__code__.co_firstlineno + 1
    assert told(caught.value).startswith("TypeError: reshape(): ")
    assert told(caught.value).endswith(f" (test_subject.py:{line})")
    assert "\n" not in told(caught.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(ValueError(), "ValueError"), (OSError("a\n b"), "OSError: a b"), (KeyError("k"), "'k'")],
)
def test_told_without_a_message_or_a_place(error, sentence):
    """What is not known is left out."""
    assert told(error) == (sentence if sentence[0] != "'" else f"KeyError: {sentence}")


def test_told_is_bounded():
    """A message of a megabyte is cut."""
    assert len(told(ValueError("x" * 10**6))) < 400


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("optimizer", "adam", "the subject's optimizer is to be a torch.optim.Optimizer; got"),
        ("scaler", 3, "the subject's scaler is to be a torch.amp.GradScaler; got"),
        ("seed", "a", "the subject's seed is to be a whole number; got 'a'"),
        ("groups", ["head"], "the subject's groups are to be a mapping, as in {'head': ['head']}"),
        ("groups", {"all": "weight"}, "group 'all' is to be a list of names or parameters, as in"),
        (
            "groups",
            {"all": ["weight", "wieght"]},
            (
                "the subject's group 'all' names 'wieght', which the model does not have; its "
                "parameters begin with weight, bias"
            ),
        ),
        ("groups", {"all": [torch.ones(2)]}, "'all' names an object of type Tensor, which the"),
    ],
)
def test_parts_of_another_kind_are_refused(field, value, sentence):
    """Each by its name, before anything is run."""
    with pytest.raises(SubjectError, match=re.escape(sentence)):
        Subject.of(Subject(nn.Linear(1, 1), [()], lambda m: m.weight.sum(), **{field: value}))
