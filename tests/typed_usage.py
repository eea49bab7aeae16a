"""How the types of settings are meant: checked by ``make lint``, run by nobody.

mypy in strict mode also complains of a ``type: ignore`` for which there is no need.
"""

import torch

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

model = torch.nn.Linear(1, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)

GradMatch(sgd).method.meta_lr = 0.1
GradMatch(sgd, Fish()).method.inner_steps = 3
GradMatch(sgd, SmoothFish(1.0, 0.1)).method.inner_lr = 0.2
GradMatch(sgd, IDGM(model, 0.1)).method.gamma = 0.5
optimizer: GradMatch[Fish] = GradMatch(sgd, Fish())
with optimizer.slow_weights():
    loss = model(torch.zeros(1, 1))

GradMatch(sgd, Fish()).method.meta_rl = 0.1  # type: ignore[attr-defined]  # the name is mistyped
GradMatch(sgd, Fish()).method.buffers = "mean"  # type: ignore[assignment]  # there is no such choice
