"""Parameters that are made of other tensors, as quantised and distributed ones are.

They have no memory of their own: to read it where their dispatch is off would end the process.
"""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import nanhunt
from nanhunt import measurement
from nanhunt.recorder import unrecorded


@pytest.fixture
def net():
    """A layer whose weight is two tensors."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach().clone()))
    return layer


def lose(net, x, *, bad=True):
    return (net(x) * (0 if bad else 1)).square().add(0 if bad else 1).sqrt().sum()


def test_they_are_counted_by_what_they_hold():
    """In and out of a place where nothing is recorded."""
    pair = TwoTensor(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    assert measurement.count(pair).nan == 1
    with unrecorded(), torch.no_grad():
        assert measurement.count(pair).nan == 1
        assert measurement.suspects([pair]) == [0]
    assert measurement.local(pair) is pair.a


def test_detect(net):
    """The op is named, and a finite step passes in silence."""
    with nanhunt.detect():
        lose(net, torch.ones(2, 4), bad=False).backward()
    with pytest.raises(nanhunt.NonFiniteError) as caught, nanhunt.detect():
        lose(net, torch.ones(2, 4)).backward()
    assert caught.value.report.culprits[0].op == "aten::sqrt"


def test_hunt(net):
    """Natively and in FP64, with everything put back."""
    before = net.weight.detach().a.clone()
    report = nanhunt.hunt((net, torch.ones(2, 4), lose), precisions=("native",))
    assert (report.verdict, report.culprits[0].op) == ("culprit", "aten::sqrt")
    assert torch.equal(net.weight.detach().a, before)


def test_watch(net):
    """The step is withheld, the next one taken."""
    sgd, told = torch.optim.SGD(net.parameters(), 0.1), []
    watch = nanhunt.watch(net, sgd, clip=1.0, budget=0, on_report=told.append)
    x = torch.ones(2, 4)
    taken = [watch.step(lambda i=i: lose(net, x, bad=i == 1)).stepped for i in range(3)]
    assert taken == [True, False, True]
    assert told[0].culprits[0].op == "aten::sqrt"
