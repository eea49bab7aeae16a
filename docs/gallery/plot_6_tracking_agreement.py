"""
Which domain pulls against the others
=====================================

With ``track_alignment="pairs"`` every meta-iteration reports how well the domains' gradients agree, and of each domain
the cosine of its gradient with the sum of the others'. Below zero, a step for the others undoes its own.

Four hospitals of the same kind, and a fifth that writes a quarter of its labels the other way round.
"""

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, meta_batches

torch.set_num_threads(1)
torch.manual_seed(0)

features = torch.randn(5 * 400, 8)
labels = (features @ torch.linspace(-1, 1, 8) + 0.5 * torch.randn(len(features)) > 0).long()
names = [("north", "south", "east", "west", "odd")[number % 5] for number in range(len(features))]
is_odd = torch.tensor([name == "odd" for name in names])
labels = torch.where(is_odd & (features[:, 0] > 0.7), 1 - labels, labels)

# %%
# A list by ``meta_batches`` from a ``DomainBatchSampler`` knows its domains, so the reports name them.

dataset = TensorDataset(features, labels)
loader = DataLoader(dataset, batch_sampler=DomainBatchSampler(names, batch_size=32))
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2))
criterion = nn.CrossEntropyLoss()
optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(meta_lr=0.5, track_alignment="pairs"))

reports = []
for _ in range(25):
    for batches in meta_batches(loader):
        reports.append(optimizer.meta_step(lambda batch: criterion(model(batch[0]), batch[1]), batches))
print({name: round(value, 3) for name, value in reports[-1].scalars().items()})

# %%
# One batch of 32 makes a noisy measurement: the lines are means over neighbours. The order of the legend is that of the
# means, the domain that agrees least last.

agreement = pd.DataFrame([report.scalars() for report in reports]).filter(like="agreement_with_rest/")
agreement = agreement.rename(columns=lambda name: name.rpartition("/")[2])
order = agreement.mean().sort_values(ascending=False).index

figure, axes = plt.subplots(figsize=(7, 4))
agreement[order].rolling(21, center=True, min_periods=1).mean().plot(ax=axes)
axes.axhline(0.0, color="0.6", linestyle=":")
axes.set(xlabel="meta-iteration", ylabel="cosine with the others' gradients")
figure.tight_layout()
print("agrees least:", order[-1])
plt.show()
