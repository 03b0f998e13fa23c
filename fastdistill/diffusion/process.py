"""Forward processes `x_t = alpha(t) x_0 + sigma(t) eps`, from data at `t = 0` to noise at `t = 1`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastdistill.diffusion.timesteps import TimeDistribution


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Times `t` (B,) in float64 with trailing dimensions to broadcast against `like` (B, ...).

    Schedules are evaluated in float64, as their ends cancel. It costs nothing for one number per
    sample.

    Raises:
        ValueError: `t` is not one time per sample.
    """
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t must have shape ({like.shape[0]},), one time per sample, got {tuple(t.shape)}")
    return t.view(-1, *[1] * (like.ndim - 1)).double()


def repeat_time(t: Tensor, like: Tensor) -> Tensor:
    """Repeat one time `t` () for all samples of `like` (B, ...): (B,), on the device of `like`.

    The dtype is that of `like`, but float32 at least.
    """
    return t.to(like.device, torch.promote_types(like.dtype, torch.float32)).expand(like.shape[0])


def noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and dtype and on the device of `x`.

    It is drawn on the device of `rng`: the same bits wherever `x` lives.
    """
    return torch.randn(x.shape, generator=rng, device=rng.device).to(x)


class Process(ABC):
    """Schedule `alpha(t), sigma(t)` with its derivatives, and what follows from them.

    The functions of `t` work on tensors of any shape and keep their dtype. As an SDE the process is
    `dx = f(t) x dt + g(t) dw` (Song et al. 2021, equation 5), with the marginals above if (Kingma
    et al. 2021):

        f = alpha' / alpha          g^2 = 2 sigma sigma' - 2 f sigma^2 = -sigma^2 d(log_snr)/dt
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Derivative `d alpha / dt`."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Derivative `d sigma / dt`."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`; outside [0, 1] for a ratio that the process does not reach."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Log of the signal-to-noise ratio `alpha^2 / sigma^2`, falling in `t`.

        It is infinite where `sigma` or `alpha` is zero.
        """
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def drift(self, t: Tensor) -> Tensor:
        """Drift `f(t)` of the SDE; minus infinity where `alpha` is zero."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """Squared diffusion `g(t)^2` of the SDE; infinite where `alpha` is zero."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.sigma_dot(t) - self.drift(t) * sigma)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy point `x_t` (B, ...) in the dtype of `x_0`, for `t` (B,).

        Raises:
            ValueError: `t` is not one time per sample.
        """
        time = expand_time(t, x_0)
        return self.alpha(time).to(x_0.dtype) * x_0 + self.sigma(time).to(x_0.dtype) * noise

    def ddim_step(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """DDIM's step from `t` (B,) to `s` (B,) (Song et al. 2020).

        The result is `alpha_s x_0 + sigma_s eps` (B, ...) with the `eps` of `x_t` given `x_0`. The
        probability-flow ODE goes there from `t` to `s` as long as it sees the same `x_0`. On
        rectified flow this is Euler's step `x_t + (s - t) v`, which
        `FlowMatchEulerDiscreteScheduler` takes.
        """
        t, s = expand_time(t, x_t), expand_time(s, x_t)
        of_x_t = self.sigma(s) / self.sigma(t)
        of_x_0 = self.alpha(s) - of_x_t * self.alpha(t)
        return of_x_t.to(x_t.dtype) * x_t + of_x_0.to(x_t.dtype) * x_0

    def ddim_data(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Data `x_0` (B, ...) with which `ddim_step` goes from `x_t` to `x_s`.

        (Salimans & Ho 2022, algorithm 2.)
        """
        t, s = expand_time(t, x_t), expand_time(s, x_t)
        of_x_t = self.sigma(s) / self.sigma(t)
        of_x_0 = self.alpha(s) - of_x_t * self.alpha(t)
        return (x_s - of_x_t.to(x_t.dtype) * x_t) / of_x_0.to(x_t.dtype)

    def draw(self, x_0: Tensor, times: TimeDistribution, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a training point `(x_t, t, noise)` for each `x_0` (B, ...), with `t` (B,) of
        `times`.
        """
        noise = noise_like(x_0, rng)
        t = times(x_0.shape[0], rng).to(x_0.device)
        return self.add_noise(x_0, noise, t), t, noise

    def log_snr_times(self, steps: int, *, low: float = -10.0, high: float = 10.0) -> Tensor:
        """Falling times (steps,), evenly spaced in `log_snr` from `low` to `high`.

        The times go as far as the process does. At this spacing the linear part of the reverse SDE
        is equally stiff everywhere (`g^2 dt = sigma^2 |d log_snr|`). The bounds keep clear of the
        ends, where some processes are singular. At 10, `sigma / alpha` is 0.7 %.
        """
        first, last = self.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).clamp(low, high).tolist()
        return self.time_of_log_snr(torch.linspace(first, last, steps, dtype=torch.float64)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Process):
    """Straight paths, `alpha = 1 - t` and `sigma = t`: FLUX's process (Liu et al. 2022, equation
    1).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


class VariancePreserving(Process):
    """Processes with `alpha^2 + sigma^2 = 1`: a schedule is its `alpha`.

    (Ho et al. 2020; Song et al. 2021, equation 11.) `sigma` starts like `sqrt(t)` unless a schedule
    says otherwise: `sigma_dot`, and the velocity with it, is infinite at `t = 0`.
    """

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """Squared diffusion `beta(t) = -2 alpha' / alpha`, finite where `sigma_dot` is not."""
        return -2 * self.drift(t)


@dataclass(frozen=True, kw_only=True)
class LinearVariancePreserving(VariancePreserving):
    """DDPM's process: `beta(t)` is linear from `beta_min` to `beta_max`.

    `alpha = exp(-1/2 int_0^t beta)` (Song et al. 2021, equation 33). It is the limit of DDPM's `N`
    betas from `beta_min / N` to `beta_max / N`. Row `i` of diffusers' `alphas_cumprod` with
    `beta_schedule="linear"` belongs to `t = (i + 1) / N`; at `N = 1000` the row differs from
    `alpha(t)^2` by less than 1e-3, and the time of its signal-to-noise ratio differs from `t` by
    less than 4e-3.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -(self.beta_min + t * (self.beta_max - self.beta_min)) / 2 * self.alpha(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        integral = softplus(-log_snr)
        return (
            2
            * integral
            / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral))
        )

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)


@dataclass(frozen=True, kw_only=True)
class CosineVariancePreserving(VariancePreserving):
    """Cosine schedule: `alpha = cos(theta(t)) / cos(theta(0))`, `theta = pi/2 (t + s) / (1 + s)`.

    (Nichol & Dhariwal 2021, equation 17.)

    Row `i` of diffusers' `alphas_cumprod` with `beta_schedule="squaredcos_cap_v2"` is
    `alpha((i + 1) / N)^2` up to rounding, but for the last: there `alpha(1) = 0`, and diffusers
    keeps its betas at or below 0.999.
    """

    offset: float = 0.008

    def alpha(self, t: Tensor) -> Tensor:
        # As a sine, which is exactly 0 at t = 1.
        return torch.sin((1 - t) * self._rate) / math.cos(self._start)

    def sigma(self, t: Tensor) -> Tensor:
        # cos(a)^2 - cos(b)^2 as a product, which does not cancel near t = 0.
        angle = t * self._rate
        return torch.sqrt(torch.sin(angle) * torch.sin(angle + 2 * self._start)) / math.cos(self._start)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self._rate * torch.cos((1 - t) * self._rate) / math.cos(self._start)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        cos = math.cos(self._start) * torch.sigmoid(log_snr).sqrt()
        sin = torch.sqrt(math.sin(self._start) ** 2 + math.cos(self._start) ** 2 * torch.sigmoid(-log_snr))
        return torch.atan2(sin, cos) / self._rate - self.offset

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    @property
    def _start(self) -> float:
        return self._rate * self.offset


@dataclass(frozen=True, kw_only=True)
class TrigFlow(VariancePreserving):
    """TrigFlow: `alpha = cos(pi t / 2)` and `sigma = sin(pi t / 2)`.

    (sCM, Lu & Song 2024, whose time is the angle.) The data has unit standard deviation: sCM scales
    both data and noise by `sigma_d`. A derivative by the angle, which is v, is `2 / pi` of a
    derivative by `t`.
    """

    def alpha(self, t: Tensor) -> Tensor:
        # As a sine, which is exactly 0 at t = 1.
        return torch.sin(math.pi / 2 * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) / (math.pi / 2)


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Process):
    """NCSN's process: `alpha = 1` and `sigma = sigma_min (sigma_max / sigma_min)^t`.

    (Song & Ermon 2019; Song et al. 2021, equation 30.) Noise of `sigma_min` is left at `t = 0`.
    `sigma_max` should exceed the distance of any two data points (Song & Ermon 2020, technique 1):
    through that much noise only the mean of the data is seen at `t = 1`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self._log_ratio * self.sigma(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.sigma_min)) / self._log_ratio

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)
