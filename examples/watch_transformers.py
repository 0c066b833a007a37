"""A Transformers training in which one class is impossible by an additive mask, and is the label.

The loss is infinite; the callback withholds the step, prints the report and goes on. Without it the
log shows the mean of the other losses. Run it with `python examples/watch_transformers.py`.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from nanhunt.adapters.transformers import WatchCallback


class Chooser(nn.Module):
    """Chooses among the actions that are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 3)

    def forward(self, x: Tensor, allowed: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of `x [B, 4]`, `allowed [B, 3]` and the actions taken, `labels [B]`."""
        logits = self.score(x).masked_fill(~allowed, float("-inf"))
        return {"loss": F.cross_entropy(logits, labels)}


def main() -> WatchCallback:
    """Train six steps; in the fourth an action was taken that is not allowed."""
    torch.manual_seed(0)
    rows = [
        {"x": torch.randn(4), "allowed": torch.tensor([True, True, k != 7]), "labels": 2}
        for k in range(12)
    ]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    callback = WatchCallback()
    Trainer(Chooser(), arguments, train_dataset=rows, callbacks=[callback]).train()
    print("steps taken:", [row.step for row in callback.watch.figures if row.stepped])
    return callback


if __name__ == "__main__":
    main()
