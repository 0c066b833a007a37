"""Skeleton transformer with two faults in one backward; the loss is finite.

Two joints of the rest pose coincide, so the bone length is the root of zero; the predicted rotation
of the root joint equals the true one, so the angle is acos(1).  In the time of the backward the
bones come first.  A reachability term makes NaN before both, for the camera, which is no parameter.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False  # True, "first" or "second"
CASE = dict(
    id="large_pose_two_roots",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[2, 1],
    culprits=[
        dict(
            op="aten::sqrt",
            node="SqrtBackward0",
            marker="CULPRIT",
            cause="infinite_derivative_at_boundary",
        ),
        dict(
            op="aten::acos",
            node="AcosBackward0",
            marker="CULPRIT2",
            cause="infinite_derivative_at_boundary",
        ),
    ],
    decoys=["aten::pow", "aten::clamp", "aten::div", "aten::mul"],
    fix="eps; clamp inside (-1, 1)",
)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        h = self.n1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


class Skeleton(nn.Module):
    def __init__(self, joints=6, d=12):
        super().__init__()
        self.token = nn.Parameter(torch.randn(joints, d))
        self.stem = nn.Linear(2, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(3))
        self.turn, self.offset = nn.Linear(d, 4), nn.Linear(d, 3)
        rest = torch.randn(joints, 3)
        rest[4] = rest[5]  # an end effector without length
        self.register_buffer("rest", rest)
        for layer in (self.turn, self.offset):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, keypoints):
        x = self.stem(keypoints) + self.token
        for block in self.blocks:
            x = block(x)
        quat = self.turn(x) + torch.tensor([1.0, 0.0, 0.0, 0.0])
        quat = quat * quat.square().sum(-1, keepdim=True).rsqrt()
        return quat, self.rest + self.offset(x)


def geodesic(q, truth):
    cos = (q * truth).sum(-1).abs()
    limit = 1 - 1e-6 if FIX in (True, "second") else 1.0
    return 2 * torch.acos(cos.clamp(-limit, limit))  # CULPRIT2


def bones(joints):
    d2 = joints.diff(dim=1).square().sum(-1)
    if FIX in (True, "first"):
        d2 = d2 + 1e-9
    return d2.sqrt()  # CULPRIT


def loss_fn(model, keypoints, truth, lengths):
    camera = torch.zeros(3, requires_grad=True)
    quat, joints = model(keypoints)
    angle = geodesic(quat, truth).mean()
    bone = (bones(joints) - lengths).abs().mean()
    with torch.no_grad():
        spread = (joints - joints[:1]).square().sum((1, 2))
        model.log = spread / spread.sum().mul(0)
    reach = camera.square().sum().sqrt()  # goes to the camera only
    return angle + bone + 0.1 * F.relu(reach - 1) + 1e-2 * reach


def build():
    torch.manual_seed(0)
    truth = F.normalize(torch.randn(2, 6, 4), dim=-1)
    truth[:, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    return Skeleton(), (torch.randn(2, 6, 2), truth, torch.rand(2, 5)), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
