"""``python -m benchmarks.domains data``: get the emoji, and compute what all runs share, drawings and features."""

import sys
from pathlib import Path

from benchmarks.domains import emoji, emoji_images, sentiment

root = Path(sys.argv[1])
emoji_images.download(root)
for source in (emoji.MAPS, sentiment.SOURCE):
    source.load(root)
