"""Which profiles are left for an engine that keeps no scores of tokens."""

import pytest

from core.errors import ConfigError
from workers.profiles import UNMEASURED_LOSSLESS, without_scores

_PIPELINE = UNMEASURED_LOSSLESS.pipeline.model_copy(update={"keep_ratio": 0.5})
HALF = UNMEASURED_LOSSLESS.model_copy(update={"name": "half", "pipeline": _PIPELINE})
PROFILES = (UNMEASURED_LOSSLESS, HALF)


@pytest.mark.parametrize("policy", ["controller", "lossless"])
def test_a_profile_that_needs_scores_is_left_out(policy: str) -> None:
    assert without_scores(PROFILES, policy) == (UNMEASURED_LOSSLESS,)


def test_a_policy_that_needs_scores_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.policy: profile half .* set engine\.score_window"):
        without_scores(PROFILES, "half")
