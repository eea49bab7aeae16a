"""Parameter shapes of networks that people train, written out from their architectures."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    """Three layers, 784 to 10: 0.27 M parameters."""
    return [shape for i, o in ((784, 256), (256, 256), (256, 10)) for shape in ((o, i), (o,))]


def cdsprites() -> Shapes:
    """The network of ``examples/cdsprites.py``: 0.04 M parameters."""
    convs = [(o, i, 4, 4) for i, o in ((3, 16), (16, 32), (32, 64))]
    return [shape for conv in convs for shape in (conv, conv[:1])] + [(2, 1024), (2,)]


def resnet50() -> Shapes:
    """He et al., 2016: 161 tensors, 25.6 M parameters."""

    def conv(i: int, o: int, k: int) -> Shapes:
        return [(o, i, k, k), (o,), (o,)]  # and its BatchNorm

    shapes = conv(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int, layers: int, before: Shapes, after: Shapes, *, fused_qkv: bool) -> Shapes:
    """Encoder layers with a feed-forward part four times as wide."""
    matrices = [(3 * width, width)] if fused_qkv else [(width, width)] * 3
    matrices = [*matrices, (width, width), (4 * width, width), (width, 4 * width)]
    layer = [shape for matrix in matrices for shape in (matrix, matrix[:1])] + [(width,)] * 4
    return before + layer * layers + after


def distilbert() -> Shapes:
    """Sanh et al., 2019, base: 100 tensors, 66.4 M parameters."""
    embeddings: Shapes = [(30522, 768), (512, 768), (768,), (768,)]
    return transformer(768, 6, embeddings, [], fused_qkv=False)


def vit_b_16() -> Shapes:
    """Dosovitskiy et al., 2021: 152 tensors, 86.6 M parameters."""
    before: Shapes = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    return transformer(768, 12, before, [(768,), (768,), (1000, 768), (1000,)], fused_qkv=True)


NETWORKS = {
    "CdSprites net": cdsprites,
    "MLP": mlp,
    "ResNet-50": resnet50,
    "DistilBERT": distilbert,
    "ViT-B/16": vit_b_16,
}
