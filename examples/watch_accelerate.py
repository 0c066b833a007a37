"""An Accelerate loop in which two points of one batch are the same.

The derivative of their distance is 0/0; the step is withheld, the report printed, and the loop goes
on. Run it with `python examples/watch_accelerate.py`.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nanhunt.adapters.accelerate import AccelerateWatch
from nanhunt.watching import Outcome


def spread(model: nn.Module, points: Tensor) -> Tensor:
    """Mean distance of neighbours among the images of points `[B, 4]`."""
    z = model(points)
    return -(z[1:] - z[:-1]).square().sum(-1).sqrt().mean()


def main() -> list[Outcome]:
    """Take six steps; in the fourth two neighbours are the same point."""
    torch.manual_seed(0)
    batches = [torch.randn(5, 4) for _ in range(6)]
    batches[3][2] = batches[3][1]
    accelerator, net = Accelerator(cpu=True), nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    watched = AccelerateWatch(accelerator, model, optimizer, clip=1.0)
    outcomes = [watched.step(lambda b: spread(model, b), batch=batch) for batch in batches]
    print(*outcomes, sep="\n")
    return outcomes


if __name__ == "__main__":
    main()
