"""Scores of generated pictures, each named for what it is, by a small classifier fitted here.

The classifier is scikit-learn's perceptron on the real training pixels, so no figure of this module
can be compared with a published FID, and none is called so.

    scores = evaluate_samples(train, train_labels, held, held_labels, samples, asked, seed=0)
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[np.float64]
Pixels = NDArray[Any] | Tensor  # images, or their labels

_SIDE = 32  # pixels; larger images are averaged down to it before the classifier
_MOST = 20_000  # training images; more take longer and gain little
_BATCH = 200  # images an update
_EPOCHS = 15  # enough for 20 000 images
_UPDATES = 500  # at least so many Adam updates, for small sets


class EvaluationError(ValueError):
    """What a person asked to be scored cannot be."""


@dataclass(frozen=True)
class Scores:
    """What a set of generated pictures is worth."""

    classifier_accuracy: float  # of the classifier on held-out real images
    class_agreement: float  # share of samples that it gives the class they were asked for
    frechet: float  # Fréchet distance on the classifier's features, samples to training images
    frechet_of_class_means: float  # the same for one average picture a class, repeated
    frechet_ratio: float  # frechet / frechet_of_class_means; 0 is best, 1 is "average pictures"
    within_class_std: float  # of a pixel among samples of one class, in pixel values
    within_class_std_real: float  # the same among training images of these classes
    std_ratio: float  # within_class_std / within_class_std_real; 1 is as varied as the data
    n: int  # samples


class Classifier:
    """A perceptron (pixels, 256, 64, classes) on centred pixels; the 64 are the features."""

    def __init__(self, images: Pixels, labels: Pixels, seed: int) -> None:
        """images: (N, c, H, W), any real type; labels: (N,) integers. Fitted at once.

        At most 20 000 images are used, chosen by the seed.
        Raises EvaluationError if there are fewer than two classes.
        """
        pixels, asked = _pixels(images), _labels(labels, len(images))
        if len(np.unique(asked)) < 2:
            raise EvaluationError(
                f"{len(asked)} training images of one class came; a classifier needs two or more"
            )
        order = np.random.default_rng(seed).permutation(len(pixels))[:_MOST]
        pixels, asked = pixels[order], asked[order]
        self._mean = pixels.mean(axis=0)
        # why: one scale for all pixels. A border pixel is constant in the data, and dividing by its
        # own deviation would make the faintest trace in a sample outweigh the drawing.
        self._std = float(pixels.std()) or 1.0
        from sklearn.exceptions import ConvergenceWarning

        batch = min(_BATCH, len(pixels))
        epochs = max(_EPOCHS, math.ceil(_UPDATES * batch / len(pixels)))
        self._net = _perceptron(batch, epochs, seed)
        with _one_thread(), warnings.catch_warnings():
            # why: the number of updates is fixed on purpose; not having converged is no news.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._net.fit(self._scaled(pixels), asked)

    def predict(self, images: Pixels) -> NDArray[np.int64]:
        """images: (N, c, H, W) -> (N,) labels."""
        with _one_thread():
            return self._net.predict(self._scaled(_pixels(images)))

    def accuracy(self, images: Pixels, labels: Pixels) -> float:
        """Share of images that are given their own label."""
        return float((self.predict(images) == _labels(labels, len(images))).mean())

    def features(self, images: Pixels) -> Array:
        """images: (N, c, H, W) -> (N, 64), the last hidden layer after its ReLU."""
        hidden = self._scaled(_pixels(images))
        layers = list(zip(self._net.coefs_, self._net.intercepts_, strict=True))
        with _one_thread():
            for weight, bias in layers[:-1]:
                hidden = np.maximum(hidden @ weight + bias, 0.0)
        return hidden.astype(np.float64)

    def _scaled(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return (pixels - self._mean) / np.float32(self._std)


def frechet(features_a: NDArray[Any], features_b: NDArray[Any]) -> float:
    """Fréchet distance between the normals with the mean and covariance of two sets (N, d).

    Raises EvaluationError for sets of fewer than two.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(a), len(b)) < 2:
        raise EvaluationError(
            f"a Fréchet distance of {len(a)} against {len(b)} pictures was asked; give 2 or more"
        )
    return frechet_of_normals(
        a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False)
    )


def frechet_of_normals(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); mean: (d,), cov: (d, d).

    Source: Dowson and Landau 1982, Eq. 16.
    """
    # why: the trace of the last root is the sum of the singular values of B^1/2 A^1/2. Rooting the
    # eigenvalues of A^1/2 B A^1/2 would halve the digits where a covariance is singular.
    shared = np.linalg.svd(
        _root(np.atleast_2d(cov_b)) @ _root(np.atleast_2d(cov_a)), compute_uv=False
    )
    apart = float(np.square(np.asarray(mean_a) - np.asarray(mean_b)).sum())
    spread = float(np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)))
    return max(0.0, apart + spread - 2.0 * float(shared.sum()))


def class_agreement(classifier: Classifier, images: Pixels, labels: Pixels) -> float:
    """Share of generated images that the classifier gives the class they were asked for."""
    return classifier.accuracy(images, labels)


def class_means(images: Pixels, labels: Pixels) -> dict[int, Array]:
    """Label -> the average image (c, H, W) of its class."""
    pixels, asked = _array(images), _labels(labels, len(images))
    return {
        int(label): pixels[asked == label].mean(axis=0, dtype=np.float64)
        for label in np.unique(asked)
    }


def within_class_std(images: Pixels, labels: Pixels) -> float:
    """Root of the variance of a pixel within its class, averaged over classes and pixels.

    A class of one image has no variance and is left out; raises EvaluationError if all are so.
    """
    pixels, asked = _array(images), _labels(labels, len(images))
    found, times = np.unique(asked, return_counts=True)
    variances = [
        pixels[asked == label].astype(np.float64).var(axis=0, ddof=1).mean()
        for label in found[times > 1]
    ]
    if not variances:
        raise EvaluationError(
            f"{len(asked)} images came, no two of one class; give more samples a class"
        )
    return float(np.sqrt(np.mean(variances)))


def evaluate_samples(
    train_images: Pixels,
    train_labels: Pixels,
    held_images: Pixels,
    held_labels: Pixels,
    samples: Pixels,
    sample_labels: Pixels,
    seed: int,
) -> Scores:
    """Fits the classifier on the training images and scores the samples with it; see `score`."""
    classifier = Classifier(train_images, train_labels, seed)
    accuracy = classifier.accuracy(held_images, held_labels)
    return score(classifier, accuracy, train_images, train_labels, samples, sample_labels)


def score(
    classifier: Classifier,
    classifier_accuracy: float,
    train_images: Pixels,
    train_labels: Pixels,
    samples: Pixels,
    sample_labels: Pixels,
) -> Scores:
    """Asks the classifier about the samples and holds them against the training images.

    Images: (N, c, H, W) in the same pixel units; labels: (N,). Only training images of the classes
    that were asked for are looked at. Raises EvaluationError if a sample was asked of a class that
    no training image has, or the training images of each class are all alike.
    """
    train, labels = _array(train_images), _labels(train_labels, len(train_images))
    asked = _labels(sample_labels, len(samples))
    unknown = np.setdiff1d(asked, labels)
    if len(unknown):
        raise EvaluationError(
            f"samples of class {unknown[0]} came; the training images have classes "
            f"{labels.min()}..{labels.max()}"
        )
    same = np.isin(labels, asked)
    train, labels = train[same], labels[same]
    spread, spread_real = within_class_std(samples, asked), within_class_std(train, labels)
    means = class_means(train, labels)
    averages = np.stack([means[int(label)] for label in asked])
    real = classifier.features(train)
    distance = frechet(classifier.features(samples), real)
    distance_of_means = frechet(classifier.features(averages), real)
    if not spread_real or not distance_of_means:
        raise EvaluationError("the training images of each class are all alike: nothing to compare")
    return Scores(
        classifier_accuracy=classifier_accuracy,
        class_agreement=class_agreement(classifier, samples, asked),
        frechet=distance,
        frechet_of_class_means=distance_of_means,
        frechet_ratio=distance / distance_of_means,
        within_class_std=spread,
        within_class_std_real=spread_real,
        std_ratio=spread / spread_real,
        n=len(asked),
    )


def _perceptron(batch: int, epochs: int, seed: int) -> Any:
    # perf: scikit-learn takes 2 s to import, and every rank of a training imports this module.
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(
        hidden_layer_sizes=(256, 64),
        batch_size=batch,
        max_iter=epochs,
        n_iter_no_change=epochs,
        random_state=seed % 2**32,
    )


def _one_thread() -> threadpool_limits:
    # perf: these products are small. On two busy cores a second BLAS thread made the fit 8 times
    # slower (48 s for 6 s, 1437 digits of 16 x 16); and sums depend on the number of threads.
    return threadpool_limits(limits=1, user_api="blas")


def _root(cov: Array) -> Array:
    """Symmetric root of a covariance; eigenvalues below 0 are rounding and become 0."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _array(images: Pixels) -> NDArray[np.generic]:
    pixels = (
        images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    )
    if pixels.ndim != 4 or not len(pixels):
        raise EvaluationError(f"images of shape {pixels.shape} came; expected (N, c, H, W), N >= 1")
    return pixels


def _pixels(images: Pixels) -> NDArray[np.float32]:
    """(N, c, H, W) -> (N, pixels), averaged down to at most 32 x 32."""
    pixels = _array(images).astype(np.float32)
    height, width = pixels.shape[2:]
    if max(height, width) > _SIDE:
        small = (min(height, _SIDE), min(width, _SIDE))
        pixels = F.adaptive_avg_pool2d(torch.from_numpy(pixels), small).numpy()
    return pixels.reshape(len(pixels), -1)


def _labels(labels: Pixels, n: int) -> NDArray[np.int64]:
    asked = (
        labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    )
    if asked.shape != (n,):
        raise EvaluationError(f"labels of shape {asked.shape} came for {n} images; expected ({n},)")
    return asked.astype(np.int64)
