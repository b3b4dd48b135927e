"""The three heads: classifier (Stage A), gate, auxiliary (Stage B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Sequential):
    """Stage A's linear head: features [N, F] to logits [N, K]."""

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(features, classes))


class Auxiliary(nn.Sequential):
    """Stage B's head, the stronger one: features [N, F] to logits [N, K] through one hidden layer."""

    def __init__(self, features: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__(nn.Linear(features, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes))


class Gate(nn.Module):
    """Logit of P(Stage A is correct | x) from features [N, F] and the margin of its logits [N, K]: [N].

    Its own weights learn; no gradient flows back into the logits, and into the features only when ``stop_features``
    is False. Starts at zero: one half for every image.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.stop_features = True
        self.linear = nn.Linear(features + 1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Gate logits [N]."""
        top = logits.detach().topk(2, dim=1).values
        margin = (top[:, :1] - top[:, 1:]).to(features.dtype)
        read = features.detach() if self.stop_features else features
        out: Tensor = self.linear(torch.cat((read, margin), dim=1))
        return out.squeeze(1)
