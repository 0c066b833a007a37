"""How far a step moved the parameters, measured on some of their elements."""

import torch
from torch import Tensor

from nanhunt.measurement import local
from nanhunt.watching.held import Held

_ELEMENTS = 4096  # of each parameter, evenly spaced; a copy of them is small


class Drift:
    """‖Δθ‖/‖θ‖ of each group over one optimizer step."""

    @torch.no_grad()
    def __init__(self, held: Held) -> None:
        self._held = held
        self._before = [_some(p).clone() for p in held.parameters]

    @torch.no_grad()
    def measure(self) -> tuple[tuple[str, float], ...]:
        """The ratio by group, after the step; of what moved from 0, nothing is told."""
        names = self._held.group_names
        now = [_some(p) for p in self._held.parameters]
        pairs = zip(now, self._before, strict=True)
        moved = [torch.linalg.vector_norm(a - b) for a, b in pairs]
        sizes = [torch.linalg.vector_norm(b) for b in self._before]
        home = moved[0].device
        rows = torch.stack([torch.stack([t.to(home) for t in row]) for row in (moved, sizes)])
        squares = [[0.0, 0.0] for _ in names]
        for i, (delta, size) in enumerate(zip(*rows.tolist(), strict=True)):
            pair = squares[self._held.group_at(i)]
            pair[0] += delta * delta
            pair[1] += size * size
        ratios = ((n, (d / s) ** 0.5) for n, (d, s) in zip(names, squares, strict=True) if s > 0)
        return tuple((name, ratio) for name, ratio in ratios if ratio - ratio == 0.0)


def _some(parameter: Tensor) -> Tensor:
    values = local(parameter).detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    flat = values.reshape(-1) if values.is_contiguous() else values.flatten()
    return flat[:: max(1, flat.numel() // _ELEMENTS)]
