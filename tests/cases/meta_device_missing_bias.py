"""A model made on the meta device, materialised by to_empty and filled from a state dict that lacks
one bias (strict=False): the bias holds whatever was in memory, here torch's own fill by NaN."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="meta_device_missing_bias",
    source="",
    phase="data",
    op="parameter",
    node=None,
    marker="CULPRIT",
    cause="uninitialised_memory",
    precision="any",
    where="param:value.bias",
    decoys=["aten::addmm", "aten::silu", "aten::mse_loss", "aten::native_layer_norm"],
    fix="reset_parameters of what the state dict lacks",
)


class Fare(nn.Module):
    def __init__(self):
        super().__init__()
        self.route = nn.EmbeddingBag(6, 4, mode="mean")
        self.norm = nn.LayerNorm(4)
        self.value = nn.Linear(4, 1)

    def forward(self, stops):
        return self.value(nn.functional.silu(self.norm(self.route(stops)))).squeeze(-1)


def build():
    torch.manual_seed(0)
    saved = {k: v for k, v in Fare().state_dict().items() if k != "value.bias"}
    with torch.device("meta"):
        model = Fare()
    torch.use_deterministic_algorithms(True)
    model.to_empty(device="cpu")  # CULPRIT
    torch.use_deterministic_algorithms(False)
    model.load_state_dict(saved, strict=False)
    if FIX:
        nn.init.zeros_(model.value.bias)
    batch = (torch.tensor([[0, 2, 5], [1, 1, 3]]), torch.tensor([0.4, 0.9]))
    return model, batch, lambda m, s, y: nn.functional.mse_loss(m(s), y)
