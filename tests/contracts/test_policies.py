"""Every policy and every batching mode, on random traffic in a pool too small for it."""

import pytest

from tokenmill.config import build
from tokenmill.engine.config import BATCHING, POLICIES, EngineConfig
from tokenmill.engine.policy import Batching, Policy
from tokenmill.testing import check_no_starvation, check_policy


def config(**scheduler) -> EngineConfig:
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 24, **scheduler}
    return build(EngineConfig, {"scheduler": scheduler, "cache": {"block_size": 4}})


@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_policy_loses_nothing(policy: str):
    assert issubclass(POLICIES.get(policy), Policy)
    for seed in range(3):
        check_policy(config(policy=policy), seed)


@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_policy_starves_nobody(policy: str):
    check_no_starvation(config(policy=policy, starvation_s=2.0))


@pytest.mark.parametrize("batching", BATCHING.names())
def test_a_batching_mode_loses_nothing(batching: str):
    assert issubclass(BATCHING.get(batching), Batching)
    for seed in range(3):
        check_policy(config(batching=batching), seed)
