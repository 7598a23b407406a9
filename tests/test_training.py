import math
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lednet import LEDNet, UserError
from lednet.data.transforms import Augmentation
from lednet.training.distributed import EachOnceSampler, ShuffledSampler, World, choose_device
from lednet.training.engine import Trainer, step_generator
from lednet.training.loss import (
    RELEASED_WEIGHTS,
    WEIGHT_OFFSETS,
    WeightedCrossEntropy,
    class_weights,
    resize_target,
)
from lednet.training.schedule import poly_factor

CPU = torch.device("cpu")


def test_both_released_weight_lists_follow_from_one_list_of_shares():
    shares = np.exp(1 / np.array(RELEASED_WEIGHTS["decoder"])) - WEIGHT_OFFSETS["decoder"]
    assert 0.8 < shares.sum() < 1.0  # the rest is void
    for stage, offset in WEIGHT_OFFSETS.items():
        derived = class_weights(shares, offset)
        np.testing.assert_allclose(derived, RELEASED_WEIGHTS[stage], rtol=0.01)


def test_rare_classes_weigh_more():
    weights = class_weights([0.0, 0.1, 0.9], 1.10)
    assert weights.tolist() == pytest.approx(
        [1 / math.log(1.1), 1 / math.log(1.2), 1 / math.log(2)]
    )


def test_loss_is_pytorchs_weighted_mean_without_void():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(0, 3, (2, 5, 6))
    target[0, :2] = 255
    total, weight = WeightedCrossEntropy([1.0, 2.0, 5.0], 4)(logits, target)
    expected = F.cross_entropy(logits, target, torch.tensor([1.0, 2, 5, 0]), ignore_index=255)
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)


def test_targets_shrink_to_the_centre_of_each_cell():
    target = torch.arange(16 * 24).view(1, 16, 24) % 251
    small = resize_target(target, (2, 3))
    assert torch.equal(small, target[:, 4::8, 4::8])
    assert resize_target(torch.full((1, 97, 131), 255), (13, 17)).unique().tolist() == [255]


def test_poly_schedule():
    assert poly_factor(1, 300) == 1.0
    assert poly_factor(151, 300) == pytest.approx(0.5**0.9)
    assert poly_factor(300, 300) == pytest.approx((1 / 300) ** 0.9)


@pytest.mark.parametrize(("length", "size"), [(10, 1), (10, 3), (2, 3)])
def test_samplers_deal_out_every_image(length, size):
    worlds = [World(rank, size, CPU) for rank in range(size)]
    once = [list(EachOnceSampler(length, world)) for world in worlds]
    assert sorted(chain(*once)) == list(range(length))
    shuffled = [list(ShuffledSampler(length, world, seed=1)) for world in worlds]
    assert len({len(part) for part in shuffled}) == 1
    dealt = list(chain(*shuffled))
    assert set(dealt) == set(range(length)) and len(dealt) < length + size


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShuffledSampler(50, World(0, 1, CPU), seed)
        sampler.epoch = epoch
        return list(sampler)

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*key)) for key in ((1, 1), (1, 2), (2, 1))}) == 3


def test_absent_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda")


KEYS = (1, 0, 1)


def small_trainer(augmentation: Augmentation | None = None, **options) -> Trainer:
    torch.manual_seed(0)
    net, criterion = LEDNet(4).encoder_stage(), WeightedCrossEntropy([1.0] * 3, 4)
    augmentation = augmentation or Augmentation()
    return Trainer(net, criterion, augmentation, 3, 10, World(0, 1, CPU), **options)


def batches(count: int, size: int = 2) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 3, (size, 32, 32), dtype=torch.uint8, generator=generator),
        )
        for _ in range(count)
    ]


class Loader(list):
    """Batches with the one attribute that the progress bar asks for."""

    @property
    def sampler(self):
        return range(sum(len(images) for images, _ in self))


def test_not_finite_loss_stops_with_a_sentence():
    trainer = small_trainer()
    next(trainer.model.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match=r"the loss is nan .*lower --lr"):
        trainer.train_one_epoch(Loader(batches(1)), "encoder 1/1", KEYS)


def test_training_lowers_the_loss_and_counts_every_image():
    trainer = small_trainer(lr=1e-3)
    loader = Loader([*batches(2), (*[x[:1] for x in batches(1)[0]],)])
    first = trainer.train_one_epoch(loader, "first", KEYS)
    for _ in range(8):
        last = trainer.train_one_epoch(loader, "later", KEYS)
    assert last["loss"] < 0.8 * first["loss"]
    result = trainer.evaluate(loader, "val")
    assert 0 <= result["miou"] <= 1 and len(result["class_iou"]) == 3


def test_bf16_trains():
    trainer = small_trainer(precision="bf16")
    assert math.isfinite(trainer.train_one_epoch(Loader(batches(1)), "bf16", KEYS)["loss"])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        small_trainer(precision="fp16").train_one_epoch(Loader(batches(1)), "fp16", KEYS)


class Watched(Augmentation):
    """Notes the seed of every change."""

    def forward(self, images, labels, generator):
        self.seeds = [*getattr(self, "seeds", []), generator.initial_seed()]
        return super().forward(images, labels, generator)


def test_each_step_draws_from_its_own_place_in_the_run():
    def seeds(seed: int, stage: int, epoch: int) -> list[int]:
        augmentation = Watched()
        trainer, loader = small_trainer(augmentation), Loader(batches(3))
        trainer.train_one_epoch(loader, "title", (seed, stage, epoch))
        trainer.evaluate(loader, "val")  # draws nothing
        return augmentation.seeds

    first = seeds(1, 0, 1)
    assert first == [step_generator(1, 0, 1, step, 0).initial_seed() for step in range(3)]
    others = [seeds(2, 0, 1), seeds(1, 1, 1), seeds(1, 0, 2)]
    others.append([step_generator(1, 0, 1, step, 1).initial_seed() for step in range(3)])
    assert len({*first, *(seed for run in others for seed in run)}) == 15


def test_scores_do_not_depend_on_the_augmentation():
    loader = Loader(batches(2))
    results = [small_trainer(Augmentation(p)).evaluate(loader, "val") for p in ("paper", "modern")]
    assert results[0] == results[1]
