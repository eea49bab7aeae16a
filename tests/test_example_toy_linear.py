"""The linear example: its data, what ERM and the matched models make of them, and the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_linear
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from torch_gradmatch import GradMatch

SCRIPT = Path(__file__).parents[1] / "examples" / "toy_linear.py"
DEFAULTS = toy_linear.parse([])
SEEDS = range(5)
MATCHED = ["IDGM", "Fish", "SmoothFish"]


def train(method, config):
    return toy_linear.train(method, *toy_linear.make_domains(config), config)


def lead(result):
    """By how much f1 outweighs f2 and f3 together: above 1, the model follows f1 whatever they say."""
    w1, w2, w3, _ = result.weights
    return w1 / (abs(w2) + abs(w3))


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("seed", SEEDS)
def test_features_agree_with_the_label_as_often_as_stated(seed):
    training, test = toy_linear.make_domains(replace(DEFAULTS, samples=20_000, seed=seed))
    for name, (x, y) in zip(toy_linear.AGREEMENT, [*training, test], strict=True):
        assert x.shape == (20_000, 4)
        assert y.shape == (20_000, 1)
        assert x.abs().eq(1).all()
        assert set(y.unique().tolist()) == {0.0, 1.0}
        agrees = x * (2 * y - 1)
        expected = torch.tensor(toy_linear.AGREEMENT[name])
        # Five standard deviations of a fraction of 20,000 are at most 0.018.
        torch.testing.assert_close((agrees > 0).float().mean(dim=0), expected, atol=0.018, rtol=0)
        assert float(y.mean()) == pytest.approx(0.5, abs=0.018)
        independent = torch.corrcoef(agrees.T) - torch.eye(4)
        assert independent.abs().max() < 0.036


def test_the_seed_decides_the_samples():
    one, same, other = (toy_linear.make_domains(replace(DEFAULTS, seed=seed))[0][0] for seed in (3, 3, 4))
    assert torch.equal(one.features, same.features)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.features, other.features)


# ---------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("seed", SEEDS)
def test_erm_follows_the_spurious_features_and_the_matched_models_do_not(seed):
    config = replace(DEFAULTS, seed=seed)
    domains, test = toy_linear.make_domains(config)
    results = {method: toy_linear.train(method, domains, test, config) for method in toy_linear.METHODS}
    erm = results["ERM"]
    only_f1 = toy_linear.accuracy((1.0, 0.0, 0.0, 0.0), [test])
    assert only_f1 == pytest.approx(0.75, abs=0.02)
    assert lead(erm) < 0.75
    assert erm.train_accuracy > 0.78
    assert erm.test_accuracy < only_f1 - 0.1
    for method in MATCHED:
        assert lead(results[method]) > 1.25, method
        assert results[method].test_accuracy == only_f1, method
        assert results[method].train_accuracy < erm.train_accuracy, method
        assert results[method].inner_product > erm.inner_product + 0.03, method
    difference = torch.tensor(results["SmoothFish"].weights) - torch.tensor(results["IDGM"].weights)
    assert difference.abs().max() < 0.25


def test_erm_is_plain_training_on_the_pooled_samples():
    config = replace(DEFAULTS, samples=500, warmup=7, iterations=20)
    domains, _ = toy_linear.make_domains(config)
    x, y = (torch.cat(parts) for parts in zip(*domains, strict=True))
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.meta_step_size)
    for _ in range(27):
        optimizer.zero_grad()
        nn.BCEWithLogitsLoss()(model(x), y).backward()
        optimizer.step()
    weights = torch.tensor([train("ERM", config).weights])
    torch.testing.assert_close(weights, model.weight.detach(), atol=1e-5, rtol=1e-5)


def test_without_warm_up_idgm_turns_against_the_labels_and_fish_does_not():
    assert train("IDGM", replace(DEFAULTS, warmup=0)).test_accuracy < 0.55
    cold, warm = (train("Fish", replace(DEFAULTS, warmup=warmup, iterations=300)) for warmup in (0, DEFAULTS.warmup))
    assert cold.weights == pytest.approx(warm.weights, abs=0.05)


# ----------------------------------------------------------------------------------------------------- command line

SMALL = ["--samples", "50", "--warmup", "3", "--iterations", "4", "--seed", "5"]


def test_table_has_a_row_for_each_method_and_the_seed_decides_it(capsys):
    assert toy_linear.main(SMALL) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert rows["method"] == ["w1", "w2", "w3", "w4", "train", "accuracy", "test", "accuracy", "inner", "product"]
    for method in toy_linear.METHODS:
        assert len([float(number) for number in rows[method]]) == 7
    assert "f1 alone is right in" in printed
    toy_linear.main(SMALL)
    assert capsys.readouterr().out == printed
    toy_linear.main([*SMALL, "--seed", "6"])
    assert capsys.readouterr().out != printed


def test_log_holds_what_every_tenth_meta_iteration_measured(tmp_path, monkeypatch, capsys):
    reports = []
    meta_step = GradMatch.meta_step
    monkeypatch.setattr(GradMatch, "meta_step", lambda *args: reports.append(meta_step(*args)) or reports[-1])
    arguments = ["--samples", "50", "--warmup", "13", "--iterations", "8"]
    toy_linear.main([*arguments, "--log", str(tmp_path)])
    assert len(reports) == 21 * len(toy_linear.METHODS)
    for number, method in enumerate(toy_linear.METHODS):
        board = EventAccumulator(str(tmp_path / method)).Reload()
        tags = ["loss", "grad_norm"]
        tags += [f"{tag}/domain {domain}" for tag in tags for domain in (1, 2)] + ["inner_product", "cosine"]
        tags += ["gamma"]  # of the ERM that all begin with
        assert sorted(board.Tags()["scalars"]) == sorted(tags)
        for tag in tags:
            shown = {event.step: event.value for event in board.Scalars(tag)}
            scalars = {step: reports[21 * number + step].scalars() for step in (0, 10, 20)}
            expected = {step: found[tag] for step, found in scalars.items() if tag in found}
            assert shown == pytest.approx(expected, rel=1e-6), (method, tag)
    printed = capsys.readouterr().out
    toy_linear.main(arguments)
    assert capsys.readouterr().out == printed


def test_gamma_is_that_of_fish_unless_given():
    assert DEFAULTS.gamma == 4
    assert toy_linear.parse(["--lr", "2"]).gamma == 0.5
    assert toy_linear.parse(["--lr", "2", "--gamma", "3"]).gamma == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmup=-1"], "argument --warmup: should be from 0 to 1000000 (got -1)"),
        (["--iterations", "0"], "argument --iterations: should be from 1 to 1000000 (got 0)"),
        (["--seed", "one"], "argument --seed: invalid whole number value: 'one'"),
        (["--lr", "0"], "argument --lr: should be in (0, 1000] (got 0.0)"),
        (["--lr", "fast"], "argument --lr: invalid number value: 'fast'"),
        (["--meta-lr", "2"], "argument --meta-lr: should be in (0, 1] (got 2.0)"),
        (["--gamma=-1"], "argument --gamma: should be in [0, 1000] (got -1.0)"),
        (["--gamma", "nan"], "argument --gamma: should be in [0, 1000] (got nan)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        toy_linear.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:SmoothFish matches nothing")  # where every sigmoid is saturated
def test_extreme_settings_end_with_a_table(capsys):
    assert toy_linear.main([*SMALL, "--lr", "1000", "--gamma", "1000", "--meta-lr", "1"]) == 0
    assert "nan" not in capsys.readouterr().out
