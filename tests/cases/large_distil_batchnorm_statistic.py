"""Distillation with a teacher that was left in training mode.

One exposure spike of 1e21 in step 1 makes the running variance of the teacher's first batch norm
infinite: its output is zero there and everything of that step stays finite, no op returns a
non-finite value.  Step 2 compares the student's batch variance with the running one.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_distil_batchnorm_statistic",
    source="",
    phase="forward",
    op="aten::native_batch_norm",
    node=None,
    marker="CULPRIT",
    cause="overflow_fp32",
    precision="fp32",
    kinds=[3],
    also=["aten::batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm"],
    steps=4,
    fail_step=2,
    birth_step=1,
    module="teacher.norms.0",
    decoys=["aten::sub", "aten::pow", "aten::mean", "aten::div"],
    where="buffer:teacher.norms.0.running_var",
    fix="clamp the input of the teacher",
)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        sizes = [2, width, width, width]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(sizes, [*sizes[1:], width], strict=True)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        features = []
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = norm(x)  # CULPRIT
            x = F.silu(conv(x))
            features.append(x)
            x = F.avg_pool2d(x, 2) if x.shape[-1] > 2 else x
        return self.head(x.mean((2, 3))), features


class Distiller(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = Net(8).requires_grad_(False), Net(4)
        self.lift = nn.ModuleList(nn.Conv2d(4, 8, 1) for _ in range(4))

    def forward(self, x):
        small = torch.tanh(x)
        kept = [norm.running_var.log1p() for norm in self.teacher.norms[:1]]
        batch = [small.var((0, 2, 3)).log1p()]
        drift = sum((a - b).square().mean() for a, b in zip(batch, kept, strict=True))
        if FIX:
            x = x.clamp(-1e4, 1e4)
        with torch.no_grad():
            wanted, features = self.teacher(x)
        logits, own = self.student(small)
        pairs = zip(self.lift, own, features, strict=True)
        hint = sum(F.smooth_l1_loss(lift(a), b) for lift, a, b in pairs)
        return logits, wanted, hint, drift


def loss_fn(model, x, y):
    logits, wanted, hint, drift = model(x)
    soft = F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
    with torch.no_grad():
        hits = torch.stack([(logits.argmax(-1) == y)[y == c].float().mean() for c in range(5)])
        model.per_class = hits, hits.log()  # an absent class has no mean
    return F.cross_entropy(logits, y) + soft + 0.1 * hint + 1e-2 * drift


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(4, 2, 8, 8, generator=g)
    if step == 1:
        x[2, 1, 3, 3] = 1e21
    return x, torch.randint(0, 4, (4,), generator=g)


def build():
    torch.manual_seed(0)
    return Distiller(), batch_at(0), loss_fn


def make_optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
