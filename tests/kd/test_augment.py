"""Changes of batches: the same whatever the process, against slow and plain versions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kd import recipes
from kd.data import augment, batching
from kd.data.batching import Batch
from kd.models.networks import Classifier
from kd.objectives import terms
from kd.objectives.step_outputs import StepOutputs
from kd.recipe import Recipe


def batch(n: int = 6, size: int = 5, first: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 2, size, size, generator=generator)
    return Batch(images, torch.arange(n) % 3, index=torch.arange(first, first + n))


def part(whole: Batch, rows: np.ndarray) -> Batch:
    keep = torch.from_numpy(rows)
    assert whole.index is not None
    return replace(
        whole,
        inputs=whole.images[keep],
        labels=whole.labels[keep],
        index=whole.index[keep],
        total_images=len(whole),
    )


def test_shifts_and_flips_move_pixels_and_nothing_else() -> None:
    whole = batch(200)
    changed = augment.crop_flip(whole, 7, padding=2, hflip=0.5)
    draws = augment.row_uniforms(np.arange(10, 210), 7)
    for i in range(200):
        padded = np.pad(whole.images[i].numpy(), [(0, 0), (2, 2), (2, 2)])
        top, left = (int(draws[i, j] * 5) for j in (0, 1))
        expected = padded[:, top : top + 5, left : left + 5]
        if draws[i, 2] < 0.5:
            expected = expected[:, :, ::-1]
        assert np.array_equal(changed.images[i].numpy(), expected)


def test_draws_are_uniform_and_belong_to_the_row() -> None:
    rows = np.arange(20_000)
    draws = augment.row_uniforms(rows, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(np.histogram(draws[:, 0], 10, (0, 1))[0], 2000, atol=200)  # 4.7 deviations
    assert abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
    assert np.array_equal(augment.row_uniforms(rows[5:8], 3), draws[5:8])
    assert not np.array_equal(augment.row_uniforms(rows, 4), draws)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_a_batch_change_it_as_one_does(world: int) -> None:
    recipe = replace(recipes.CIFAR, mixup=0.4, cutmix=1.0, batch_size=12)
    mixer = augment._timm_mixup(recipe, 3)
    whole = batch(13)

    def changed(some: Batch, seed: int) -> Batch:
        return augment.mix_images(
            augment.crop_flip(some, seed, padding=1, hflip=0.5), seed, mixer=mixer
        )

    for seed in range(6):  # both kinds of mixing come up
        alone = changed(whole, seed)
        assert alone.class_shares is not None
        for rank in range(world):
            rows = batching.share_positions(13, rank, world)
            shared = changed(part(whole, rows), seed)
            assert torch.equal(shared.images, alone.images[rows])
            assert torch.equal(shared.class_shares, alone.class_shares[rows])


def test_mixup_by_hand_and_numpys_generator_is_left_alone() -> None:
    recipe = replace(recipes.REAL, mixup=0.4, label_smoothing=0.0)
    mixer = augment._timm_mixup(recipe, 3)
    whole = batch(6)
    before = whole.images.clone()
    np.random.seed(5)  # noqa: NPY002
    expected_state = np.random.get_state()[1]  # noqa: NPY002
    changed = augment.mix_images(whole, 11, mixer=mixer)
    assert np.array_equal(np.random.get_state()[1], expected_state)  # noqa: NPY002
    assert torch.equal(whole.images, before)
    assert changed.class_shares is not None
    # Labels 0 1 2 0 1 2 against 2 1 0 2 1 0: the first image's share of class 0 is lambda.
    share = changed.class_shares[0, 0].item()
    assert 0 < share < 1
    mixed = share * before + (1 - share) * before.flip(0)
    assert torch.allclose(changed.images, mixed, atol=1e-6)
    assert torch.allclose(changed.class_shares.sum(1), torch.ones(6))


def test_the_middle_of_an_odd_batch_stays() -> None:
    mixer = augment._timm_mixup(replace(recipes.REAL, mixup=1.0), 3)
    whole = batch(5)
    changed = augment.mix_images(whole, 2, mixer=mixer)
    assert changed.class_shares is not None
    assert torch.allclose(changed.images[2], whole.images[2], atol=1e-6)
    assert changed.class_shares[2].tolist() == pytest.approx([0, 0, 1])
    assert not torch.allclose(changed.images[0], whole.images[0], atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_labels_of_mixed_images_are_smoothed_once_as_timm_smooths_them(options) -> None:
    from timm.data.mixup import Mixup
    from timm.loss import SoftTargetCrossEntropy

    k, smoothing = 10, 0.1
    recipe = Recipe(epochs=1, label_smoothing=smoothing, **options)
    whole = Batch(torch.rand(8, 3, 6, 6), torch.arange(8))
    logits = 3 * torch.randn(8, k, generator=torch.Generator().manual_seed(0))
    mixed = augment.mix_images(whole, 5, mixer=augment._timm_mixup(recipe, k))
    specs = terms.parse("ce:1")
    (ce,) = terms.build(specs, Classifier(torch.nn.Identity()), smoothing=recipe.label_smoothing)
    given = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix}
    mixer = Mixup(**given, label_smoothing=smoothing, num_classes=k)
    with augment.temporary_numpy_seed(5):
        images, targets = mixer(whole.images.clone(), whole.labels)
    assert torch.equal(images, mixed.images)
    expected = SoftTargetCrossEntropy()(logits, targets)
    assert ce(StepOutputs(mixed, logits, ())).item() == pytest.approx(expected.item(), rel=1e-6)


def test_specaugment_shifts_hides_and_nothing_else() -> None:
    images = torch.rand(100, 1, 10, 20, generator=torch.Generator().manual_seed(0)) + 1
    whole = Batch(images, torch.zeros(100, dtype=torch.long), index=torch.arange(100))
    silence = torch.full((1, 10, 20), -3.0)
    options = {"shift": 0.2, "bands": 0.3, "time": 0.25, "silence": [silence]}
    changed = augment.specaugment(whole, 5, **options).images
    draws = augment.row_uniforms(np.arange(100), 5, draws=5)
    for i in range(100):
        moved = int(draws[i, 0] * 9) - 4
        expected = np.full((10, 20), -3.0, np.float32)
        for x in range(20):
            if 0 <= x + moved < 20:
                expected[:, x] = images[i, 0, :, x + moved]
        bands, frames = int(draws[i, 1] * 4), int(draws[i, 3] * 6)
        top, left = int(draws[i, 2] * (11 - bands)), int(draws[i, 4] * (21 - frames))
        expected[top : top + bands] = 0
        expected[:, left : left + frames] = 0
        np.testing.assert_array_equal(changed[i, 0], expected)
    nothing = {"shift": 0.0, "bands": 0.0, "time": 0.0, "silence": [silence]}
    assert torch.equal(augment.specaugment(whole, 5, **nothing).images, images)


def test_processes_that_share_recordings_change_them_as_one_does() -> None:
    whole = batch(12)
    options = {"shift": 0.4, "bands": 0.4, "time": 0.4, "silence": [torch.zeros(2, 5, 5)]}
    together = augment.specaugment(whole, 9, **options).images
    rows = batching.share_positions(12, 1, 2)
    apart = augment.specaugment(part(whole, rows), 9, **options).images
    assert torch.equal(apart, together[torch.from_numpy(rows)])
    assert not torch.equal(together, augment.specaugment(whole, 10, **options).images)
