"""Scores on real digits, Fréchet distances against closed forms, and the picture grid."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pretrain import evaluate, pictures
from pretrain.evaluate import (
    Classifier,
    EvaluationError,
    class_agreement,
    class_means,
    evaluate_samples,
    frechet,
    frechet_of_normals,
    score,
    within_class_std,
)

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    """Real digits, 16 x 16, four fifths to train on and the others held out."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear")
    pixels = images.round().clamp(0, 255).byte().numpy()
    order = np.random.default_rng(0).permutation(len(pixels))
    train, held = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (pixels[train], found.target[train]), (pixels[held], found.target[held])


@pytest.fixture(scope="module")
def classifier(digits: tuple[Split, Split]) -> Classifier:
    return Classifier(*digits[0], seed=0)


def normal(n: int, mean: NDArray, cov: NDArray, seed: int) -> NDArray:
    """n points whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(seed).normal(size=(n, len(mean)))
    points -= points.mean(axis=0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return white @ np.linalg.cholesky(cov).T + mean


def test_frechet_is_the_closed_form_for_commuting_covariances() -> None:
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.25])
    var_a, var_b = np.array([4.0, 0.25, 1.0]), np.array([1.0, 9.0, 1e-4])
    a = normal(50, mean_a, np.diag(var_a), 0)
    b = normal(70, mean_b, np.diag(var_b), 1)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    assert frechet(a, b) == pytest.approx(expected, abs=1e-6)


def test_frechet_is_the_closed_form_for_two_by_two() -> None:
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root_trace = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 4.0 + np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_of_normals(np.zeros(2), a, np.array([0.0, 2.0]), b) == (
        pytest.approx(expected, abs=1e-9)
    )


def test_frechet_is_stable_where_covariances_are_singular() -> None:
    make = np.random.default_rng(0)
    few = make.normal(size=(5, 64)) * 100
    assert frechet(few, few) < 1e-6
    assert frechet(few, few + 3.0) == pytest.approx(64 * 9.0, rel=1e-9)
    flat = np.zeros((10, 4))
    line = np.zeros((10, 4))
    line[:, 0] = normal(10, np.zeros(2), np.eye(2) * 4, 0)[:, 0]
    assert frechet(flat, line) == pytest.approx(4.0, abs=1e-6)
    assert frechet(line, np.roll(line, 1, axis=1)) == pytest.approx(8.0, abs=1e-6)


def test_classifier_knows_held_out_digits(
    digits: tuple[Split, Split], classifier: Classifier
) -> None:
    assert classifier.accuracy(*digits[1]) >= 0.95
    images, labels = torch.from_numpy(digits[1][0]), torch.from_numpy(digits[1][1])
    assert class_agreement(classifier, images, labels) == classifier.accuracy(*digits[1])


def test_features_are_what_the_last_layer_sees(
    digits: tuple[Split, Split], classifier: Classifier
) -> None:
    images = digits[1][0][:20]
    features = classifier.features(images)
    assert features.shape == (20, 64)
    assert features.min() == 0.0
    logits = features @ classifier._net.coefs_[-1] + classifier._net.intercepts_[-1]
    assert np.array_equal(logits.argmax(axis=1), classifier.predict(images))


def test_real_digits_score_well_and_average_pictures_do_not(
    digits: tuple[Split, Split], classifier: Classifier
) -> None:
    (train, labels), (held, held_labels) = digits
    accuracy = classifier.accuracy(held, held_labels)
    real = score(classifier, accuracy, train, labels, held, held_labels)
    assert real.class_agreement >= 0.95
    assert real.frechet_ratio < 0.2
    assert real.std_ratio == pytest.approx(1, abs=0.1)
    means = class_means(train, labels)
    averages = np.stack([means[int(label)] for label in held_labels])
    fake = score(classifier, accuracy, train, labels, averages, held_labels)
    assert fake.class_agreement >= 0.95
    assert fake.frechet_ratio == pytest.approx(1.0)
    assert fake.std_ratio < 1e-9
    swapped = score(classifier, accuracy, train, labels, held, (held_labels + 1) % 10)
    assert swapped.class_agreement < 0.1


def test_same_seed_gives_the_same_scores(
    digits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_UPDATES", 20)
    (train, labels), (held, held_labels) = digits
    sets = (train[:300, :, ::2, ::2], labels[:300], held[:, :, ::2, ::2], held_labels)
    sets += (train[300:400, :, ::2, ::2], labels[300:400])
    first = evaluate_samples(*sets, seed=3)
    assert first == evaluate_samples(*sets, seed=3)
    assert first.n == 100


def test_within_class_std_by_hand() -> None:
    images = np.array([0, 2, 10, 16, 99], dtype=np.uint8).reshape(5, 1, 1, 1)
    labels = np.array([0, 0, 1, 1, 2])
    assert within_class_std(images, labels) == pytest.approx(math.sqrt((2 + 18) / 2))
    with pytest.raises(EvaluationError, match="no two of one class"):
        within_class_std(images[:2], np.array([0, 1]))


def test_large_images_are_averaged_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_UPDATES", 20)
    make = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = make.integers(0, 100, (40, 3, 64, 80)) + 100 * labels[:, None, None, None]
    large = Classifier(images.astype(np.uint8), labels, seed=0)
    assert large.accuracy(images, labels) == 1.0
    assert large._net.coefs_[0].shape[0] == 3 * 32 * 32


def test_what_cannot_be_scored_is_refused(classifier: Classifier) -> None:
    images = np.zeros((4, 1, 16, 16), np.uint8)
    with pytest.raises(EvaluationError, match="one class"):
        Classifier(images, np.zeros(4, int), seed=0)
    with pytest.raises(EvaluationError, match=r"labels of shape \(3,\) came for 4 images"):
        Classifier(images, np.zeros(3, int), seed=0)
    with pytest.raises(EvaluationError, match="samples of class 7 came"):
        score(classifier, 1.0, images, np.array([0, 0, 1, 1]), images, np.array([7, 7, 0, 0]))
    with pytest.raises(EvaluationError, match="all alike"):
        score(classifier, 1.0, images, np.array([0, 0, 1, 1]), images, np.array([0, 0, 1, 1]))
    with pytest.raises(EvaluationError, match="1 against 4"):
        frechet(np.zeros((1, 2)), np.zeros((4, 2)))


def test_grid_shows_each_image_in_its_place(tmp_path: Path) -> None:
    images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = torch.arange(5, dtype=torch.uint8)[:, None, None] * 50
    path = pictures.save(tmp_path / "deep" / "grid.png", images, columns=3)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 66, 2 + i % 3 * 66
        assert (picture[top : top + 64, left : left + 64] == [i * 50, 0, 0]).all()
    assert (picture[68:, 134:] == 255).all()


def test_grid_takes_grey_and_large_images_and_refuses_others() -> None:
    grey = np.full((1, 1, 100, 80), 7, np.uint8)
    assert np.asarray(Image.open(io.BytesIO(pictures.grid(grey, 9)))).shape == (104, 84, 3)
    for wrong in (grey.astype(np.float32), grey[0], np.zeros((1, 4, 8, 8), np.uint8), grey[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            pictures.grid(wrong, 1)
