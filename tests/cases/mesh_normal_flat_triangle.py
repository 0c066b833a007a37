"""Face normals of a mesh by F.normalize of a cross product with eps=0: a triangle with two equal
corners has no normal, 0/0.  Mesh fitting and differentiable rendering."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="mesh_normal_flat_triangle",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    decoys=["aten::linalg_cross", "aten::linalg_vector_norm", "aten::mul", "aten::index"],
    fix="the default eps=1e-12",
)


class Mesh(nn.Module):
    def __init__(self):
        super().__init__()
        corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
        self.register_buffer("rest", corners)
        self.offset = nn.Parameter(torch.zeros(5, 3))

    def forward(self, faces):
        a, b, c = (self.rest + self.offset)[faces].unbind(1)
        area = torch.linalg.cross(b - a, c - a)
        return F.normalize(area, dim=-1, eps=1e-12 if FIX else 0.0)  # CULPRIT


def build():
    torch.manual_seed(0)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 1, 4]])
    light = F.normalize(torch.randn(3), dim=0)
    shade = torch.rand(3)
    return Mesh(), (faces, light, shade), lambda m, f, l, s: (m(f) @ l - s).pow(2).mean()
