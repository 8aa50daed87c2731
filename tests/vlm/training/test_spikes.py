"""What counts as a spike: by median and median absolute deviation of the steps before, once there are enough."""

import json
import math

import numpy as np
import pytest
from scipy.stats import median_abs_deviation

from vlm.checkpoint.manifest import SpikeRecord
from vlm.training.spikes import GuardConfig, SpikeWatch, limit_of

USUAL = [2.0, 2.3, 1.9, 2.2, 2.1]


def filled(**config: object) -> SpikeWatch:
    watch = SpikeWatch(GuardConfig.model_validate({"window": 5, **config}))
    for value in USUAL:
        assert watch.judge(value, 10 * value) is None
    return watch


def test_the_limit_is_that_many_robust_deviations_above_the_median() -> None:
    values = np.random.default_rng(0).lognormal(size=301)
    median, limit = limit_of(values.tolist(), 7.0)
    assert median == np.median(values)
    assert limit == pytest.approx(median + 7 * median_abs_deviation(values, scale="normal"), rel=1e-4)
    assert limit_of([4.0, 4.0, 4.0], 5.0)[1] == pytest.approx(4.2)  # a hundredth of the median is no deviation


def test_nothing_is_judged_before_the_window_is_full() -> None:
    watch = SpikeWatch(GuardConfig(window=5))
    for value in (1.0, 100.0, 1.0, 10_000.0, 1.0):
        assert watch.most_norm(value) == math.inf
        assert watch.judge(value, value) is None
    assert watch.judge(1e9, 1.0) is not None


def test_a_loss_that_stands_out_lets_no_norm_pass_and_a_spike_is_not_remembered() -> None:
    watch = filled()
    before, limit = watch.record(), limit_of(USUAL, 10.0)[1]
    assert watch.most_norm(1.01 * limit) < 0
    assert watch.most_norm(0.99 * limit) == limit_of([10 * value for value in USUAL], 10.0)[1]
    loss, norm = watch.judge(1.01 * limit, 20.0), watch.judge(2.0, 1_000.0)
    assert loss is not None
    assert norm is not None
    assert (loss.figure, norm.figure) == ("loss", "grad_norm")
    assert loss.words == f"the loss is {1.01 * limit:.4g}, above {limit:.4g} (median 2.1)"
    assert watch.judge(-50.0, 0.0) is None  # low is no spike
    assert watch.record() != before
    assert watch.record().losses == (*USUAL[1:], -50.0)


def test_only_the_figures_that_are_asked_for_are_watched_and_no_number_is_left_to_others() -> None:
    assert filled(figures=["grad_norm"]).judge(1e9, 20.0) is None
    assert filled(figures=["loss"]).most_norm(2.0) == math.inf
    watch = filled()
    before = watch.record()
    assert watch.judge(math.nan, math.nan) is None
    assert watch.judge(2.0, math.inf) is None
    assert watch.record() == before


def test_windows_go_on_from_a_checkpoints_json_bit_for_bit() -> None:
    watch = filled()
    watch.judge(math.pi, math.e * 7)
    again = SpikeWatch(watch.config)
    again.restore(SpikeRecord.model_validate(json.loads(json.dumps(watch.record().model_dump(mode="json")))))
    assert again.record() == watch.record()
    assert again.most_norm(2.2) == watch.most_norm(2.2)
