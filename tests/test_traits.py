"""What classes of ComfyUI's do beside their plans."""

import pytest
import torch

from worker.models.comfyui.cases import CASES
from worker.models.plans.traits import TRAITS, Rows, Traits, traits_of

EQUAL, OTHER = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25])
MASKED = torch.tensor([[0.5, 0.1], [0.2, 0.5]])  # by token: the largest of both rows is the same


def test_every_class_with_traits_is_one_that_is_tried():
    u_nets = {"UNetModel"}  # which no plan spreads: tests/comfyui/test_checkpoint.py
    assert TRAITS.keys() <= {case.name for case in CASES.values()} | u_nets


@pytest.mark.parametrize("time", [EQUAL, OTHER])
def test_rows_are_apart_where_nothing_else_is_said(time):
    assert traits_of("a class that nobody knows").rows_apart(time)
    assert not Traits(Rows.TOGETHER).rows_apart(time)


def test_rows_with_one_largest_timestep_are_apart():
    traits = Traits(Rows.ONE_TIME)
    assert (
        traits.rows_apart(EQUAL) and traits.rows_apart((MASKED, None)) and traits.rows_apart((EQUAL, EQUAL))
    )
    assert not traits.rows_apart(OTHER) and not traits.rows_apart((EQUAL, OTHER))


def test_rows_of_a_u_net_are_apart_but_for_frames_of_a_video():
    assert traits_of("UNetModel", {"use_temporal_attention": False}).rows_apart(OTHER)
    assert not traits_of("UNetModel", {"use_temporal_attention": True}).rows_apart(EQUAL)
    assert not traits_of("UNetModel", {"use_temporal_resblock": True}).rows_apart(EQUAL)
