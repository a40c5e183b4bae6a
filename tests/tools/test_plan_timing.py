"""The time model against values worked out by hand, and its published calibration runs."""

import dataclasses

import pytest

from megaphi.config import Model
from megaphi.metrics.flops import flops_per_token, peak_flops
from tools.planning.devices import DEVICES, find_device
from tools.planning.layout import Job, Layout, PipelineSchedule, Recompute
from tools.planning.timing import (
    PUBLISHED,
    RATES,
    assumptions,
    bandwidth,
    calibration,
    mfu,
    predicted_rate,
    step_time,
)

A100, H100 = DEVICES["a100-80gb"], DEVICES["h100"]
PHI1 = Job(
    model=Model(residual_dropout=0.1, attention_dropout=0.1),
    sequence_length=2048,
    global_batch_size=8,
)


def test_one_step_of_phi1_on_an_a100_by_hand() -> None:
    time = step_time(PHI1, Layout(), A100)
    tokens = 8 * 2048
    # 6 FLOPs a weight and token at 77% of 312 TFLOP/s
    assert time.gemm == pytest.approx(6 * 1_312_817_152 * tokens / (0.77 * 312e12))
    assert time.gemm == pytest.approx(0.537, abs=0.0005)
    # a causal product is s d FLOPs a token; 2 forward, 5 backward, at 125 TFLOP/s
    assert time.attention == pytest.approx(7 * 2048 * 2048 * 24 * tokens / 125e12)
    # rotary 2 + 6, block end 5 + 6, GELU 8 + 12, bias and sum of gradients 6: 45 vectors of
    # 4,096 bytes at 82% of 2.039 TB/s, and 8 bytes a weight
    hbm = 0.82 * 2.039e12
    per_token = 24 * 45 * 4096
    assert time.elementwise == pytest.approx((per_token * tokens + 8 * 1_418_270_720) / hbm)
    # 4 passes over bf16 logits; the head's gradient 8 bytes in each of 4 chunks, and 20
    logits, weight = tokens * 51200 * 2, 51200 * 2048
    assert time.loss == pytest.approx((4 * logits + (4 * 8 + 20) * weight) / hbm)
    assert time.optimizer == pytest.approx(34 * 1_418_270_720 / hbm)
    assert time.communication == time.bubble == 0.0
    assert time.total == pytest.approx(sum(time.kinds.values()))
    flops = flops_per_token(PHI1.model, 2048) * tokens
    assert mfu(PHI1, Layout(), A100, time.total) == pytest.approx(flops / time.total / 312e12)


def test_plain_operations_move_more() -> None:
    plain = step_time(dataclasses.replace(PHI1, kernels="torch"), Layout(), A100)
    fused = step_time(PHI1, Layout(), A100)
    hbm = 0.82 * 2.039e12
    # 92 vectors against 45
    assert plain.elementwise - fused.elementwise == pytest.approx(24 * 47 * 4096 * 8 * 2048 / hbm)
    assert plain.optimizer / fused.optimizer == pytest.approx(104 / 34)
    assert plain.gemm == fused.gemm


def test_published_runs_are_met() -> None:
    """The figures of llm-foundry's table; a roofline may be fast by a quarter, not slow."""
    rates = {run.device: run.tokens_per_second_per_gpu for run in PUBLISHED}
    assert rates == {"a100-80gb": 20513, "h100": 45455}
    for run in PUBLISHED:
        # their NumParams is 1,315,950,592, biases none and the head tied
        matrices = 24 * 12 * 2048**2 + run.job.model.vocab_size * 2048
        assert matrices == pytest.approx(1_315_950_592, rel=0.005)
        predicted = predicted_rate(run, DEVICES[run.device])
        assert 1.0 < predicted / run.tokens_per_second_per_gpu < 1.25
        factor = calibration(DEVICES[run.device])
        assert factor * predicted == pytest.approx(run.tokens_per_second_per_gpu)
    assert calibration(DEVICES["h200"]) == calibration(H100)


def test_published_utilisation_is_in_our_convention() -> None:
    # "MFU 59.86" at 20,513 tokens/s/GPU counts 6 N + 12 L d s too
    run = PUBLISHED[0]
    seconds = run.job.tokens_per_step / (20513 * 8)
    assert mfu(run.job, run.layout, A100, seconds) == pytest.approx(0.5986, abs=0.003)


def test_data_parallel_traffic_by_hand() -> None:
    job = dataclasses.replace(PHI1, global_batch_size=16)
    layout = Layout(data=16, micro_batch_size=1)
    alone = step_time(
        dataclasses.replace(PHI1, global_batch_size=1), Layout(micro_batch_size=1), A100
    )
    time = step_time(job, layout, A100)
    micro_batch = (
        alone.total - alone.optimizer - alone.loss - 6 * 2048 * 51200 * 2048 / _gemm_rate()
    )
    # 8 GPUs of a node share 8 adapters, 170 GB/s achieved, which is below NVLink's 231
    part = 15 / 16 * 1_418_270_720 / min(0.77 * 300e9, 8 * 0.85 * 25e9)
    gather = max(2 * part / 25, 2 * part - 0.8 * micro_batch / 3)
    reduce = max(4 * part / 25, 4 * part - 0.8 * micro_batch * 2 / 3)
    assert time.communication == pytest.approx(gather + reduce)
    assert time.optimizer == pytest.approx(alone.optimizer / 16)


def _gemm_rate() -> float:
    """Matrix products of 2,048 tokens on an A100: fewer rows than 16,384 cost some speed."""
    return 0.77 * 312e12 * (2048 / 2432) / (16384 / 16768)


def test_full_sharding_and_small_batches_cost_time() -> None:
    job = dataclasses.replace(PHI1, global_batch_size=512)
    kept = Layout(data=64, micro_batch_size=1)
    freed = dataclasses.replace(kept, reshard_after_forward=True)
    assert step_time(job, freed, A100).communication > step_time(job, kept, A100).communication
    large = Layout(data=64, micro_batch_size=8)
    assert step_time(job, large, A100).total < step_time(job, kept, A100).total


def test_recomputation_costs_a_forward_pass() -> None:
    times = {
        kind: step_time(PHI1, dataclasses.replace(Layout(), recompute=kind), A100)
        for kind in Recompute
    }
    none, selective, full = (times[kind] for kind in Recompute)
    head = 6 * 8 * 2048 * 51200 * 2048 / (0.77 * 312e12)
    assert selective.gemm == none.gemm
    assert none.total < selective.total < full.total
    assert full.gemm - head == pytest.approx((none.gemm - head) * 4 / 3)
    assert full.attention == pytest.approx(none.attention * 9 / 7)


def test_bubbles() -> None:
    job = dataclasses.replace(PHI1, global_batch_size=64)

    def bubble(schedule: PipelineSchedule, chunks: int = 1, stages: int = 4) -> float:
        layout = Layout(pipeline=stages, schedule=schedule, chunks=chunks)
        return step_time(job, layout, A100).bubble

    one = bubble(PipelineSchedule.ONE_F_ONE_B)
    # (p - 1) (F + B + W) against (p - 1) (F + B - W) and (p - 1) (F + B - 2 W), all alike
    zero = bubble(PipelineSchedule.INTERLEAVED_ZERO_BUBBLE, 2)
    assert zero == pytest.approx(bubble(PipelineSchedule.INTERLEAVED, 2) / 3)
    assert bubble(PipelineSchedule.ZBV, 2) == 0.0
    # but for the tensors that each chunk sends on
    assert bubble(PipelineSchedule.INTERLEAVED, 3) == pytest.approx(one / 3, rel=0.02)
    assert bubble(PipelineSchedule.ONE_F_ONE_B, stages=1) == 0.0
    # half as many layers a stage, but 7 instead of 3 other stages; the head is not halved
    assert bubble(PipelineSchedule.ONE_F_ONE_B, stages=8) == pytest.approx(one * 7 / 6, rel=0.03)


def test_links() -> None:
    link, network = 0.8 * 450e9, 0.85 * 50e9
    assert bandwidth(H100, 8, 8, 1) == pytest.approx(link)
    # all 8 adapters together are slower than NVLink, a lone one much more so
    assert bandwidth(H100, 8, 16, 1) == pytest.approx(min(link, 8 * network))
    assert bandwidth(H100, 8, 16, 4) == pytest.approx(2 * network)
    assert bandwidth(H100, 8, 2, 8) == pytest.approx(network)


def test_every_device_is_complete() -> None:
    assert RATES.keys() == DEVICES.keys()
    for device in DEVICES.values():
        assert device.bf16_peak == peak_flops(device.name.split("-")[0], _bf16())
        table = assumptions(device)
        assert len(table) >= 12
        assert all(name and value and source for name, value, source in table)
    names = ["a100-40gb", "a100-80gb", "h100", "h200", "b200"]
    rates = [step_time(PHI1, Layout(), DEVICES[name]).total for name in names]
    assert rates == sorted(rates, reverse=True)


def _bf16() -> object:
    import torch

    return torch.bfloat16


def test_unknown_devices_are_refused() -> None:
    assert find_device("H100") is H100
    with pytest.raises(ValueError, match=r"v100.*a100-40gb, a100-80gb, h100, h200, b200"):
        find_device("v100")
