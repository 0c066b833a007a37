"""Policy gradient with Categorical on masked logits: the replay buffer stores an action that the
present mask forbids, so that the infinity of the mask is picked as its log-probability."""

import torch
from torch import nn
from torch.distributions import Categorical

FIX = False
CASE = dict(
    id="stale_action_mask_categorical",
    source="",
    phase="forward",
    op="aten::gather",
    node=None,
    marker="CULPRIT",
    cause="infeasible_target",
    precision="any",
    asked=True,  # nothing makes the infinity but the mask; the target picks it
    also=["aten::masked_fill", "aten::sub"],
    decoys=["aten::addmm", "aten::logsumexp", "aten::mul", "aten::mean"],
    fix="the mask of the time at which the action was taken",
)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.GRUCell(3, 5)
        self.act = nn.Linear(5, 4)

    def forward(self, seen, legal):
        return self.act(self.trunk(seen)).masked_fill(~legal, float("-inf"))


def loss_fn(m, seen, legal, action, advantage):
    if FIX:
        legal = legal | nn.functional.one_hot(action, 4).bool()
    policy = Categorical(logits=m(seen, legal), validate_args=False)
    taken = policy.log_prob(action)  # CULPRIT
    return -(advantage * taken).mean()


def build():
    torch.manual_seed(0)
    legal = torch.ones(3, 4, dtype=torch.bool)
    legal[1, 2] = legal[0, 3] = False
    batch = (torch.randn(3, 3), legal, torch.tensor([0, 2, 1]), torch.tensor([0.5, 1.0, -0.7]))
    return Policy(), batch, loss_fn
