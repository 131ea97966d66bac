from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from fourbit.data import BatchPlan, Dataset, Origin, collate, epoch_order, pack


def make(lengths, *, weights=None, masked=()) -> Dataset:
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    supervised = np.ones(offsets[-1], dtype=np.bool_)
    supervised[offsets[:-1]] = False
    supervised[list(masked)] = False
    return Dataset(
        ids=np.arange(1, offsets[-1] + 1, dtype=np.int32),
        supervised=supervised,
        offsets=offsets,
        origin_index=np.arange(len(lengths)),
        origins=tuple(Origin("a", i + 1) for i in range(len(lengths))),
        weights=np.ones(len(lengths)) if weights is None else np.asarray(weights, dtype=float),
    )


def lognormal(n, *, seed, longest):
    draws = np.random.default_rng(seed).lognormal(5.0, 0.8, n)
    return np.clip(draws.astype(np.int64), 2, longest)


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    first = epoch_order(1000, seed=0, epoch=0)
    assert sorted(first) == list(range(1000))
    assert (first == epoch_order(1000, seed=0, epoch=0)).all()
    for seed, epoch in ((0, 1), (1, 0), (2**63 + 5, 0), (-1, 3)):
        other = epoch_order(1000, seed=seed, epoch=epoch)
        assert sorted(other) == list(range(1000))
        assert (first == other).mean() < 0.02


def test_the_order_never_changes():
    # A change here breaks the resuming of every run made before: raise ORDER_VERSION with it.
    order = epoch_order(10_000, seed=7, epoch=3)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert order[:6].tolist() == [786, 4714, 3475, 872, 7122, 8099]
    assert digest.startswith("081d93760f3c8bb9")


def test_the_order_is_unbiased():
    # Mean position of each of 50 samples over 400 epochs: standard error 14.4 / 20 = 0.72.
    positions = np.zeros(50)
    for epoch in range(400):
        positions[epoch_order(50, seed=1, epoch=epoch)] += np.arange(50)
    assert np.abs(positions / 400 - 24.5).max() < 5 * 0.72


def test_weights_are_copies_and_fractions_are_drawn_anew():
    weights = np.array([2.0] * 500 + [0.25] * 2000 + [1.5] * 500)
    counts = [Counter(epoch_order(weights, seed=0, epoch=e).tolist()) for e in range(2)]
    for count in counts:
        assert all(count[i] == 2 for i in range(500))
        quarter = sum(count[i] for i in range(500, 2500))
        assert abs(quarter - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
        assert {count[i] for i in range(2500, 3000)} == {1, 2}
    drawn = [{i for i in range(500, 2500) if count[i]} for count in counts]
    assert 0.1 < len(drawn[0] & drawn[1]) / 500 < 0.4


@pytest.mark.parametrize("seed", range(8))
def test_packs_hold_every_sample_once_within_the_limit(seed):
    longest = [64, 100, 512, 2048][seed % 4]
    lengths = lognormal(3000, seed=seed, longest=longest)
    order = epoch_order(3000, seed=seed, epoch=0)
    packs = pack(lengths, order, max_length=longest)
    assert sorted(i for members in packs for i in members) == list(range(3000))
    assert max(lengths[members].sum() for members in packs) <= longest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("longest", [512, 1024, 2048])
def test_packs_are_nearly_full(seed, longest):
    lengths = lognormal(4000, seed=seed, longest=longest)
    packs = pack(lengths, epoch_order(4000, seed=seed, epoch=0), max_length=longest)
    assert lengths.sum() / (len(packs) * longest) > 0.95


def test_packing_keeps_the_shuffle():
    lengths = lognormal(8000, seed=0, longest=1024)
    packs = pack(lengths, epoch_order(8000, seed=0, epoch=0), max_length=1024)
    # Neither the sample's index nor its length may tell where in the epoch it comes.
    place = np.concatenate([[p] * len(members) for p, members in enumerate(packs)])
    flat = np.concatenate(packs)
    assert abs(np.corrcoef(place, flat)[0, 1]) < 0.05
    assert abs(np.corrcoef(place, lengths[flat])[0, 1]) < 0.05
    # Windows of packing must not begin with many short samples and end with few long ones.
    means = np.array([lengths[members].mean() for members in packs])
    parts = [part.mean() for part in np.array_split(means, 24)]
    assert max(parts) / min(parts) < 1.8


def test_repeated_samples_and_bad_lengths():
    packs = pack([3, 4], [0, 1, 0, 1, 1], max_length=8)
    assert sorted(i for members in packs for i in members) == [0, 0, 1, 1, 1]
    assert pack([], [], max_length=8) == []
    for lengths in ([9], [0]):
        with pytest.raises(ValueError, match=r"1\.\.8"):
            pack(lengths, [0], max_length=8)


@pytest.mark.parametrize("packing", [True, False])
def test_a_plan_covers_an_epoch_and_depends_on_nothing_else(packing):
    dataset = make(lognormal(700, seed=3, longest=256), weights=[1.0] * 350 + [2.0] * 350)

    def plan():
        return BatchPlan(dataset, max_length=256, packing=packing, batch_size=4, seed=9)

    one, other = plan(), plan()
    later = other.epoch(2)
    assert one.epoch(0) == other.epoch(0)
    assert one.epoch(2) == later != one.epoch(0)
    for epoch in range(2):
        batches = one.epoch(epoch)
        assert len(batches) == one.micro_batches_per_epoch(epoch)
        seen = Counter(i for batch in batches for members in batch for i in members)
        assert seen == Counter({i: 1 if i < 350 else 2 for i in range(700)})
        assert all(1 <= len(batch) <= 4 for batch in batches)
        assert sum(len(batch) < 4 for batch in batches) <= 1


def test_without_packing_batches_are_of_similar_length():
    dataset = make(lognormal(2000, seed=5, longest=1024))
    plan = BatchPlan(dataset, max_length=1024, packing=False, batch_size=8, seed=0)
    assert all(len(members) == 1 for batch in plan.epoch(0) for members in batch)
    naive = np.asarray(epoch_order(2000, seed=0, epoch=0)).reshape(-1, 8)
    share = dataset.num_tokens / (dataset.lengths[naive].max(axis=1).sum() * 8)
    assert plan.efficiency(0) > 0.9 > share
    means = [np.mean([dataset.lengths[m[0]] for m in batch]) for batch in plan.epoch(0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


def test_collate_by_hand():
    dataset = make([3, 2, 4], masked=[6])
    batch = collate(dataset, [[0, 1], [2]], pad_id=99, pad_to_multiple=4)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, 99, 99, 99],
        [6, 7, 8, 9, 99, 99, 99, 99],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    none = -100
    assert batch.labels.tolist() == [
        [none, 2, 3, none, 5, none, none, none],
        [none, none, 8, 9, none, none, none, none],
    ]
    assert batch.num_supervised == 5
    assert [str(origin) for origin in batch.rows] == ["a:1", "a:2", "a:3"]
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.labels)} == {torch.int64}


def test_the_first_token_of_a_document_is_never_a_label():
    dataset = make([3, 2])
    dataset.supervised[:] = True
    assert collate(dataset, [[0, 1]], pad_id=0).labels.tolist() == [[-100, 2, 3, -100, 5]]


def test_documents_of_a_pack_do_not_see_each_other():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    dataset = make([7, 5, 9, 4])
    packed = collate(dataset, [[0, 1, 2], [3]], pad_id=0, pad_to_multiple=8)
    with torch.no_grad():
        together = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
        ).logits
        for line, at, index in ((0, 0, 0), (0, 7, 1), (0, 12, 2), (1, 0, 3)):
            alone = torch.as_tensor(dataset[index].input_ids, dtype=torch.int64)[None]
            apart = model(input_ids=alone, use_cache=False).logits[0]
            piece = together[line, at : at + len(apart)]
            torch.testing.assert_close(piece, apart, atol=1e-5, rtol=1e-5)
