"""Which of ComfyUI's switches travel to the ranks, and what the ranks make of them."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import HostComfyUI

CPU = torch.device("cpu")


@pytest.fixture
def args(comfyui, monkeypatch):
    """What this ComfyUI was started with; a test may set it."""
    import comfy.cli_args

    def put(**values):
        for name, value in values.items():
            monkeypatch.setattr(comfy.cli_args.args, name, value)

    put(port=1234, lowvram=True)  # the host's own business
    return put


def switches() -> dict:
    from comfy_xdit.comfy_types.installation import host_comfyui

    return dict(host_comfyui().switches)


def test_switches_that_change_numbers_travel_and_those_of_the_host_do_not(args):
    before = switches()
    args(force_upcast_attention=True, use_split_cross_attention=True, supports_fp8_compute=True)

    changed = {"force_upcast_attention", "use_split_cross_attention", "supports_fp8_compute"}
    assert switches() == before | dict.fromkeys(changed, True)
    assert not {"port", "lowvram"} & before.keys()


def test_optimisations_travel_by_name_and_are_the_same_again(args):
    from comfy.cli_args import PerformanceFeature

    from worker.models.comfyui import installation

    chosen = {PerformanceFeature.Fp8MatrixMultiplication, PerformanceFeature.Fp16Accumulation}
    args(fast=chosen)

    told = switches()["fast"]
    assert told == ("fp16_accumulation", "fp8_matrix_mult")
    assert installation._value(told) == chosen


def test_a_switch_that_cannot_travel_is_refused(args):
    args(force_upcast_attention=object())
    with pytest.raises(
        InvalidInput, match=r"--force-upcast-attention .*cannot be told to the ranks; start it"
    ):
        switches()


def test_a_switch_that_the_ranks_comfyui_does_not_know_is_refused():
    from worker.models.comfyui import installation

    host = HostComfyUI("somewhere", "0.8.0", (("attend_better", True),))
    with pytest.raises(
        InvalidInput, match=r"0\.8\.0 in somewhere knows no switch 'attend_better'; restart it"
    ):
        installation._set_switches(host, CPU)
