"""The peak of a product, from which floors are computed, is that of what the CPU can do."""

from itertools import count

import pytest
import timing

FLOPS = 20 * 2 * 1400 * 1150 * 4600


@pytest.mark.parametrize("bf16, peak", [(True, {"fp32": FLOPS / 2, "bf16": FLOPS / 3}), (False, {"fp32": FLOPS / 2})])
def test_peaks_are_those_of_the_fastest_way_in_each_precision_that_the_cpu_has(monkeypatch, bf16, peak):
    """Two ways in fp32 take 2 and 3 seconds; four in bf16 take 3 or more."""
    def medians(candidates, _):
        return {name: {"fp32": 2, "bf16": 1}[name[0]] + number for number, name in zip(count(), candidates)}
    monkeypatch.setattr(timing, "has_bf16", lambda: bf16)
    monkeypatch.setattr(timing, "medians", medians)
    assert timing.peaks(1) == peak
