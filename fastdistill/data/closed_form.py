"""Exact teachers: Gaussian mixtures, whose every prediction under any process has a closed form.

A component `N(mu, S)` becomes `N(alpha mu, C)`, `C = alpha^2 S + sigma^2 I`. With `r_k` the
posterior weight of component `k` at `x_t` (its responsibility):

    score = -sum_k r_k C_k^-1 (x_t - alpha mu_k)
    E[x_0 | x_t] = sum_k r_k (mu_k + alpha S_k C_k^-1 (x_t - alpha mu_k))          E[eps | x_t] = -sigma score
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.diffusion.guidance import guided
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import Process, expand_time


class GaussianMixture(nn.Module):
    """Mixture `sum_k w_k N(mu_k, S_k)` over vectors (B, D), with a class label for every component.

    Conditioning on a label leaves the components of that label. The null label leaves all; it is
    the number of labels, as in the label embeddings of diffusers' `DiTTransformer2DModel`.
    Computations run in the dtype of `means`; results have the dtype of the points.

    Args:
        weights: (K,), positive; scaled to sum to 1.
        means: (K, D).
        covariances: (K, D, D), symmetric and positive definite.
        labels: (K,) integers from 0 without gaps; by default every component has its own.

    Raises:
        ValueError: shapes do not fit, a weight is not positive, a covariance not symmetric and
            positive definite, or a label is missing.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor
    labels: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        components, dimensions = means.shape
        labels = torch.arange(components) if labels is None else labels
        if (
            weights.shape != (components,)
            or covariances.shape != (components, dimensions, dimensions)
            or labels.shape != (components,)
        ):
            raise ValueError(
                f"{components} components of {dimensions} dimensions need as many weights, labels and covariances, "
                f"got shapes {tuple(weights.shape)}, {tuple(labels.shape)} and {tuple(covariances.shape)}"
            )
        variances, axes = torch.linalg.eigh(covariances)
        if not bool((weights > 0).all() and (variances > 0).all()) or not torch.allclose(covariances, covariances.mT):
            raise ValueError("weights must be positive, and covariances symmetric and positive definite")
        if sorted(set(labels.tolist())) != list(range(int(labels.max()) + 1)):
            raise ValueError(f"labels must count from 0 without gaps, got {labels.tolist()}")
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(means.dtype))
        self.register_buffer("means", means)
        # S_k = axes diag(variances) axes^T: every C_k, at every time, has the same axes.
        self.register_buffer("variances", variances.to(means.dtype))
        self.register_buffer("axes", axes.to(means.dtype))
        self.register_buffer("labels", labels)

    @classmethod
    def gaussian(cls, mean: Tensor, covariance: Tensor) -> GaussianMixture:
        """Mixture of a single Gaussian with `mean` (D,) and `covariance` (D, D)."""
        return cls(mean.new_ones(1), mean[None], covariance[None])

    @property
    def null_label(self) -> int:
        """Label that leaves all components."""
        return int(self.labels.max()) + 1

    @property
    def covariances(self) -> Tensor:
        """Covariance of every component, (K, D, D)."""
        return torch.einsum("kij,kj,klj->kil", self.axes, self.variances, self.axes)

    def given(self, label: int) -> GaussianMixture:
        """Conditional distribution: the components of `label`, each with a label of its own."""
        if label == self.null_label:
            chosen = torch.ones_like(self.labels, dtype=torch.bool)
        else:
            chosen = self.labels == label
        if not bool(chosen.any()):
            raise ValueError(f"no component has label {label}")
        return GaussianMixture(self.log_weights[chosen].exp(), self.means[chosen], self.covariances[chosen])

    def mean(self) -> Tensor:
        """Mean of the mixture, (D,)."""
        return self.log_weights.exp() @ self.means

    def covariance(self) -> Tensor:
        """Covariance of the mixture (D, D), within the components and between them."""
        weights, centred = self.log_weights.exp(), self.means - self.mean()
        return torch.einsum("k,kij->ij", weights, self.covariances) + torch.einsum(
            "k,ki,kj->ij", weights, centred, centred
        )

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw `count` points (count, D) and their labels (count,)."""
        components = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=rng)
        z = torch.randn(count, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        spread = torch.einsum("bij,bj->bi", self.axes[components], self.variances[components].sqrt() * z)
        return self.means[components] + spread, self.labels[components]

    def responsibilities(self, x_0: Tensor) -> Tensor:
        """Posterior weight of each component (B, K) at points of the data (B, D)."""
        return self._posterior(
            x_0, torch.ones_like(x_0[:, :1]), torch.zeros_like(x_0[:, :1]), None
        ).responsibilities.to(x_0.dtype)

    def log_density(self, x_t: Tensor, t: Tensor, process: Process, labels: Tensor | None = None) -> Tensor:
        """Log density `log p_t(x_t | label)` (B,) in nats, for `x_t` (B, D) and `t` (B,).

        Args:
            labels: (B,); by default the null label.
        """
        alpha, sigma = self._schedule(process, t, x_t)
        return self._posterior(x_t, alpha, sigma, labels).log_density.to(x_t.dtype)

    def predict(
        self, x_t: Tensor, t: Tensor, process: Process, prediction: Prediction, labels: Tensor | None = None
    ) -> Tensor:
        """Exact conditional mean of any `prediction` (B, D).

        A network that is trained to the end returns this mean. It is defined wherever `process` and
        `prediction` are finite. So is the score at `t = 0`, unlike for a network's output.
        """
        alpha, sigma = self._schedule(process, t, x_t)
        posterior = self._posterior(x_t, alpha, sigma, labels)
        if prediction is Prediction.SCORE:
            return posterior.score.to(x_t.dtype)
        a, b = prediction.coefficients(process, expand_time(t, x_t))
        return (a * posterior.x_0 - b * sigma * posterior.score).to(x_t.dtype)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
        """Map `x_t` (B, D) by the probability-flow ODE from `t` (B,) to `s` (B,).

        For a single Gaussian, `x_s = alpha_s mu + C_s^1/2 C_t^-1/2 (x_t - alpha_t mu)`. At `s = 0`
        the map is the consistency function.

        Raises:
            ValueError: the mixture has several components, whose map has no closed form.
        """
        if len(self.means) > 1:
            raise ValueError("only the flow of a single Gaussian has a closed form")
        alpha, sigma = self._schedule(process, torch.cat([t, s]), torch.cat([x_t, x_t]))
        (alpha_t, alpha_s), (sigma_t, sigma_s) = alpha.chunk(2), sigma.chunk(2)
        gain = ((alpha_s**2 * self.variances + sigma_s**2) / (alpha_t**2 * self.variances + sigma_t**2)).sqrt()
        along = (x_t.to(self.means.dtype) - alpha_t * self.means) @ self.axes[0]
        return (alpha_s * self.means + (gain * along) @ self.axes[0].T).to(x_t.dtype)

    def _schedule(self, process: Process, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        time = expand_time(t, x_t)
        return process.alpha(time).to(self.means.dtype), process.sigma(time).to(self.means.dtype)

    def _posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> _Posterior:
        alpha, sigma = alpha[..., None], sigma[..., None]
        centred = x_t.to(self.means.dtype)[:, None] - alpha * self.means
        along = torch.einsum("kij,bki->bkj", self.axes, centred)
        variances = alpha**2 * self.variances + sigma**2
        whitened = along / variances
        log_joint = self._log_prior(labels) - (along * whitened + variances.log() + math.log(2 * math.pi)).sum(-1) / 2
        log_density = torch.logsumexp(log_joint, dim=1)
        responsibilities = torch.exp(log_joint - log_density[:, None])
        weighted = responsibilities[..., None] * whitened
        score = -torch.einsum("kij,bkj->bi", self.axes, weighted)
        x_0 = responsibilities @ self.means + torch.einsum("kij,bkj->bi", self.axes, alpha * self.variances * weighted)
        return _Posterior(log_density, responsibilities, score, x_0)

    def _log_prior(self, labels: Tensor | None) -> Tensor:
        """Log weights (B, K), or (1, K) without labels; minus infinity for other labels."""
        if labels is None:
            return self.log_weights[None]
        left = (labels[:, None] == self.labels) | (labels[:, None] == self.null_label)
        if not bool(left.any(dim=1).all()):
            raise ValueError(
                f"labels go from 0 to {self.null_label}, the null label, got {labels.min()} to {labels.max()}"
            )
        return torch.log_softmax(self.log_weights.masked_fill(~left, -math.inf), dim=1)


class _Posterior(NamedTuple):
    log_density: Tensor
    responsibilities: Tensor
    score: Tensor
    x_0: Tensor


class ExactTeacher(nn.Module):
    """Mixture in the place of the network that was trained on it to the end.

    Called with `(x_t, t, labels)`, it returns its `prediction`. It has no parameters. In a method
    it stands for the teacher, or for the critic of a student whose samples are Gaussian.
    """

    def __init__(self, mixture: GaussianMixture, process: Process, prediction: Prediction) -> None:
        super().__init__()
        self.mixture, self.process, self.prediction = mixture, process, prediction

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mixture.predict(x_t, t, self.process, self.prediction, labels)

    def predictor(self, labels: Tensor | None = None, *, scale: float | Tensor = 1.0) -> Predictor:
        """Predictor for samplers, given `labels` (B,), under classifier-free guidance of `scale`.

        A `scale` of 1 is no guidance.
        """

        def of(condition: Tensor | None) -> Predictor:
            return Predictor(
                function=lambda x_t, t: self(x_t, t, condition), process=self.process, prediction=self.prediction
            )

        if isinstance(scale, float) and scale == 1:
            return of(labels)
        return guided(of(labels), of(None), scale)
