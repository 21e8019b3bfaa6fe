"""Relative position buckets against a table computed by hand and MPNet's; the bias against a loop over pairs."""

import pytest
import torch
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from pmlm_dist.model.relative_position import RelativeBias, relative_bucket
from pmlm_dist.parallel import groups

# 16 buckets per sign: 0..7 exact; then 8 + floor(8 ln(a/8) / ln 16), so bucket b starts at 8 * 2^((b-8)/2):
# 8, 11.31, 16, 22.63, 32, 45.25, 64, 90.51 (and 128, which stays in bucket 15).
FIRST_DISTANCE = {**{a: a for a in range(9)}, 9: 12, 10: 16, 11: 23, 12: 32, 13: 46, 14: 64, 15: 91}


def by_hand(distance: int) -> int:
    bucket = max(b for b, first in FIRST_DISTANCE.items() if abs(distance) >= first)
    return bucket + (16 if distance > 0 else 0)


def test_buckets_equal_table_computed_by_hand():
    distances = range(-600, 601)
    expected = [by_hand(d) for d in distances]
    assert relative_bucket(torch.tensor(list(distances))).tolist() == expected


def test_buckets_equal_those_of_mpnet():
    distances = torch.arange(-600, 601)
    assert torch.equal(relative_bucket(distances), MPNetEncoder.relative_position_bucket(distances, num_buckets=32))


@pytest.mark.parametrize(("buckets", "max_distance"), [(8, 16), (16, 20), (32, 128), (64, 1000)])
def test_buckets_of_a_sign_are_all_used_and_increase_with_distance(buckets, max_distance):
    actual = relative_bucket(-torch.arange(2 * max_distance), buckets=buckets, max_distance=max_distance)
    assert (actual.diff() >= 0).all()
    assert actual.unique().tolist() == list(range(buckets // 2))


def test_bias_equals_table_entry_of_every_pair():
    groups.init_process_groups()
    bias = RelativeBias(3, buckets=32, max_distance=128, std=1.0)
    queries, keys = torch.randint(0, 300, (2, 5)), torch.randint(0, 300, (2, 7))
    actual = bias(queries, keys)
    assert actual.shape == (3, 2, 5, 7)
    for b in range(2):
        for q in range(5):
            for k in range(7):
                bucket = by_hand(int(keys[b, k] - queries[b, q]))
                assert torch.equal(actual[:, b, q, k], bias.weight[:, bucket])


def test_for_contiguous_equals_bias_of_positions():
    groups.init_process_groups()
    bias = RelativeBias(3, buckets=8, max_distance=6, std=1.0)
    positions = torch.arange(20)[None]
    assert torch.equal(bias.for_contiguous(20), bias(positions, positions)[:, 0])


def test_bias_copies_nothing_from_the_host(monkeypatch):
    """The table of buckets is made once, with the model, and is no part of a checkpoint."""
    groups.init_process_groups()
    bias = RelativeBias(3, buckets=8, max_distance=6, std=1.0)
    assert set(bias.state_dict()) == {"weight"}
    monkeypatch.setattr(torch, "tensor", None)
    bias = bias.to("meta")  # raises where a tensor of the host is used
    assert bias.for_contiguous(20).device.type == "meta"


def test_bf16_table_gets_gradient_summed_in_fp32():
    """In bf16 a sum of ones stops growing at 256."""
    groups.init_process_groups()
    bias = RelativeBias(1, buckets=8, max_distance=6, std=1.0).to(torch.bfloat16)
    positions = torch.arange(300)[None]
    for actual in (bias.for_contiguous(300), bias(positions, positions)):
        (gradient,) = torch.autograd.grad(actual.to(torch.bfloat16).sum(), bias.weight)
        assert abs(float(gradient.float().sum()) - 300 * 300) < 0.01 * 300 * 300


def test_half_of_the_heads_begin_looking_at_one_neighbor_each():
    """With many equal keys a head has most of its attention at its own distance, and the others none at any."""
    groups.init_process_groups()
    bias = RelativeBias(5, buckets=32, max_distance=128, std=0.0, local=True)
    attention_HT = bias.by_distance(40).softmax(dim=1)
    distances = torch.arange(-40, 41)
    assert distances[attention_HT[:3].argmax(dim=1)].tolist() == [-1, 1, -2]
    assert (attention_HT[:3].amax(dim=1) > 0.9).all()
    assert torch.equal(attention_HT[3:], torch.full((2, 81), 1 / 81))
    assert not RelativeBias(
        5, buckets=4, max_distance=128, std=0.0, local=True
    ).weight.any()  # no bucket of one distance
