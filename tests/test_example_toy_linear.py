"""The linear example: its data, what ERM and the matched models make of them, and the command line."""

from dataclasses import replace

import pytest
import torch
import toy_linear
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_gradmatch import GradMatch

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


def test_without_warm_up_idgm_turns_against_the_labels_and_fish_does_not():
    assert train("IDGM", replace(DEFAULTS, warmup=0)).test_accuracy < 0.55
    cold, warm = (train("Fish", replace(DEFAULTS, warmup=warmup, iterations=300)) for warmup in (0, DEFAULTS.warmup))
    assert cold.weights == pytest.approx(warm.weights, abs=0.05)


# ----------------------------------------------------------------------------------------------------- command line

SMALL = ["--samples", "50", "--warmup", "3", "--iterations", "4"]


def test_table_has_a_row_for_each_method_and_the_seed_decides_it(capsys):
    printed = []
    for seed in ("5", "5", "6"):
        assert toy_linear.main([*SMALL, "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    rows = {line.split()[0]: line.split()[1:] for line in printed[0].splitlines() if line.strip()}
    assert rows["method"] == ["w1", "w2", "w3", "w4", "train", "accuracy", "test", "accuracy", "inner", "product"]
    for method in toy_linear.METHODS:
        assert len([float(number) for number in rows[method]]) == 7
    assert "f1 alone is right in" in printed[0]
    assert printed[0] == printed[1] != printed[2]


def test_log_holds_what_every_tenth_meta_iteration_measured(tmp_path, monkeypatch):
    reports = []
    meta_step = GradMatch.meta_step
    monkeypatch.setattr(GradMatch, "meta_step", lambda *args: reports.append(meta_step(*args)) or reports[-1])
    toy_linear.main(["--samples", "50", "--warmup", "13", "--iterations", "8", "--log", str(tmp_path)])
    for number, method in enumerate(toy_linear.METHODS):
        board = EventAccumulator(str(tmp_path / method)).Reload()
        scalars = {step: reports[21 * number + step].scalars() for step in (0, 10, 20)}
        assert set(board.Tags()["scalars"]) == {tag for found in scalars.values() for tag in found}
        assert {"loss/domain 1", "grad_norm/domain 2", "cosine"} <= set(board.Tags()["scalars"])
        for tag in board.Tags()["scalars"]:
            shown = {event.step: event.value for event in board.Scalars(tag)}
            expected = {step: found[tag] for step, found in scalars.items() if tag in found}
            assert shown == pytest.approx(expected, rel=1e-6), (method, tag)


def test_gamma_is_that_of_fish_unless_given():
    assert DEFAULTS.gamma == 4
    assert toy_linear.parse(["--lr", "2"]).gamma == 0.5
    assert toy_linear.parse(["--lr", "2", "--gamma", "3"]).gamma == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmup=-1"], "argument --warmup: should be from 0 to 1000000 (got -1)"),
        (["--seed", "one"], "argument --seed: invalid whole number value: 'one'"),
        (["--lr", "fast"], "argument --lr: invalid number value: 'fast'"),
        (["--meta-lr", "2"], "argument --meta-lr: should be in (0, 1] (got 2.0)"),
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
