"""A Lightning training in which one sample of one batch is all padding.

Its mean over nothing is 0/0; the callback withholds the step, prints the report and goes on.
Run it with `python examples/watch_lightning.py`.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanhunt.adapters.lightning import WatchCallback


class Pooled(pl.LightningModule):
    """Tokens are embedded and averaged over those that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], _batch_idx: int) -> Tensor:
        """Mean squared error of a number per sentence: tokens `[B, T]`, targets `[B]`."""
        tokens, target = batch
        mask = (tokens != 0).unsqueeze(-1)
        mean = (self.embed(tokens) * mask).sum(1) / mask.sum(1)
        return (self.head(mean).squeeze(-1) - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> WatchCallback:
    """Train six batches; the fourth has an empty sentence."""
    torch.manual_seed(0)
    batches = [(torch.randint(1, 10, (4, 5)), torch.randn(4)) for _ in range(6)]
    batches[3][0][2] = 0
    callback = WatchCallback()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Pooled(), DataLoader(batches, batch_size=None))
    print("steps taken:", [row.step for row in callback.watch.figures if row.stepped])
    return callback


if __name__ == "__main__":
    main()
