"""Mean teacher whose shadow weights are debiased one step too early: division by 1 - d**0.

The teacher is a set of buffers that torch.func.functional_call runs.  After the first optimizer
step the shadow is divided by zero, the parameters are fine.  The loss of step 1 compares with the
teacher.  Unlabelled samples have NaN targets throughout, which indexing leaves out.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_mean_teacher_debias",
    source="",
    phase="optimizer",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="optimizer_arithmetic",
    precision="any",
    kinds=[3, 5, 10],
    steps=3,
    fail_step=1,
    birth_step=0,
    fail_sink="loss",
    also=["aten::div_", "aten::_foreach_div"],
    decoys=["aten::addmm", "aten::native_layer_norm", "aten::mse_loss", "aten::copy_"],
    fix="count the step before",
)


class Encoder(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.stem = nn.Linear(5, d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 2, 2 * d, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(d, 1)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1)).squeeze(-1)


class MeanTeacher(nn.Module):
    decay = 0.9

    def __init__(self):
        super().__init__()
        self.student = Encoder()
        self.register_buffer("count", torch.zeros(()))
        for name, p in self.student.named_parameters():
            self.register_buffer("sum_" + name.replace(".", "_"), torch.zeros_like(p))
            self.register_buffer("ema_" + name.replace(".", "_"), p.detach().clone())

    def shadow(self):
        names = [name for name, _ in self.student.named_parameters()]
        return {name: getattr(self, "ema_" + name.replace(".", "_")) for name in names}

    def forward(self, x, noise):
        with torch.no_grad():
            target = functional_call(self.student, self.shadow(), (x,))
        return self.student(x + noise), target

    @torch.no_grad()
    def follow(self):
        seen = self.count + 1 if FIX else self.count
        bias = 1 - self.decay**seen
        for name, p in self.student.named_parameters():
            total = getattr(self, "sum_" + name.replace(".", "_"))
            total.lerp_(p, 1 - self.decay)
            mean = total / bias  # CULPRIT
            getattr(self, "ema_" + name.replace(".", "_")).copy_(mean)
        self.count += 1


def loss_fn(model, x, noise, y):
    out, target = model(x, noise)
    known = torch.isfinite(y)
    with torch.no_grad():
        model.log = (y / y.mean()).exp(), (x / torch.zeros_like(x)).amax()
    return F.mse_loss(out[known], y[known]) + 0.5 * F.mse_loss(out, target)


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    y = torch.randn(6, generator=g)
    y[::2] = float("nan")
    return torch.randn(6, 4, 5, generator=g), 0.1 * torch.randn(6, 4, 5, generator=g), y


def build():
    torch.manual_seed(0)
    return MeanTeacher(), batch_at(0), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    opt.step()
    model.follow()
    yield "step", loss
