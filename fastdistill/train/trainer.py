"""The one training loop of the project. A method says what to learn (`train.method`); the loop does
the rest.

Every step draws its batch and its noise from generators seeded by `(seed, step)`, as dropout does.
A run that is killed and started again therefore repeats the same bits from its last checkpoint,
without a snapshot of any generator.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastdistill.errors import UserError
from fastdistill.run.files import read_json
from fastdistill.run.lock import Lock
from fastdistill.run.packages import require_package
from fastdistill.run.signals import held_back, stop_if_asked
from fastdistill.train import checkpoint, optim, parallel
from fastdistill.train.config import TrainConfig
from fastdistill.train.ema import EMA
from fastdistill.train.learning_rate import learning_rate
from fastdistill.train.log import Log
from fastdistill.train.method import BeforeStep, Method, Stateful, give_turn
from fastdistill.train.restorable import check_restorable
from fastdistill.train.watch import Best, Evaluation, Observer

# Generators take 32 bits of a seed; multiples of the golden ratio of 2^32 stay far apart for as
# many parts as a batch may have.
GOLDEN = 0x9E3779B1
# Checkpoints by the clock take a tenth of the time at most.
SAVE_SHARE = 10

BatchSource = Callable[[int, torch.Generator], Any]
"""`(step, generator) -> batch`; all randomness from the generator. Of `micro_batches` the batch has
a length and takes slices."""


class Diverged(UserError):
    """The loss or a gradient is no longer finite."""


class Trainer:
    """Trains `method` on `batches` in the folder `run`, from its newest checkpoint if it has one.

    Inside `processes` under torchrun, the method's networks are sharded from here on.

    Args:
        observers: called every so many steps with the averaged weights in the student.
        evaluation: decides which averaged weights are kept as `run/best`, and may end the run.

    Raises:
        UserError: the configuration does not fit the method or the number of processes, a package
            is missing, or what the student learns would be lost when it is saved.
    """

    def __init__(
        self,
        method: Method,
        batches: BatchSource,
        config: TrainConfig,
        run: Path,
        observers: Sequence[Observer] = (),
        evaluation: Evaluation | None = None,
    ) -> None:
        config.check_roles(method.trains)
        if config.micro_batches % parallel.world_size():
            raise UserError(
                f"{parallel.world_size()} processes cannot share {config.micro_batches} micro-batches evenly: "
                f"set micro_batches to {parallel.world_size()} or a multiple of it"
            )
        if config.tensorboard:
            require_package("tensorboard", "tensorboard=True")
        if "student" in method.trains:
            check_restorable(method.networks["student"])
        self.method, self.batches, self.config, self.run = method, batches, config, run
        self.observers, self.evaluation = observers, evaluation
        for role, network in method.networks.items():
            network.requires_grad_(role in method.trains)
            parallel.shard(network)
        self.parameters = {
            role: [p for p in method.networks[role].parameters() if p.requires_grad] for role in method.trains
        }
        self.optimizers = {
            role: optim.build(parameters, config.of(role)) for role, parameters in self.parameters.items()
        }
        decays = {role: config.of(role).ema_decay for role in method.trains}
        self.emas = {role: EMA(method.networks[role], decay) for role, decay in decays.items() if decay is not None}
        self.best = None if evaluation is None else Best(evaluation)
        self.device = next(iter(self.parameters[method.trains[0]])).device
        self.step = 0
        self.logs: dict[str, float] = {}
        """Latest values; of a role that has no turn in a step, those of its last turn."""
        self._mid_step = False
        self._unwatched = False
        """Whether observers and evaluation have not seen the last step, nor the log."""
        self._since = 0
        """Step at which the learning rate was warmed up last."""
        self._saved, self._save_seconds = time.monotonic(), 0.0

    def fit(self, describe: str = "train", console: Console | None = None) -> None:
        """Run to `config.steps`; called again after an interruption, from the newest checkpoint.

        A run that has ended is trained on if `config.steps` is larger now.

        Ctrl-C saves a checkpoint first, after the step that is being done. The progress is shown on
        `console`, by default on standard error.

        Raises:
            UserError: another process trains in the folder.
        """
        with ExitStack() as stack:
            if parallel.rank() == 0:
                stack.callback(Lock(self.run).release)
            parallel.wait()
            self._resume()
            log = stack.enter_context(
                Log(
                    self.run,
                    describe,
                    start=self.step - self._unwatched,
                    total=self.config.steps,
                    tensorboard=self.config.tensorboard,
                    console=console,
                    silent=parallel.rank() > 0,
                )
            )
            try:
                if self._unwatched:
                    self._end_step(log)
                while not self._finished():
                    stop_if_asked()
                    self._advance()
                    self._end_step(log)
                    if self._checkpoint_due() and not self._finished():
                        self.save()
            except KeyboardInterrupt:
                # Within a step there is no state to go on from once a role has been updated, and
                # processes are not interrupted at the same step.
                if not self._mid_step and parallel.world_size() == 1:
                    self.save()
                raise
            self.save()

    def save(self) -> Path:
        state = {
            "config": dataclasses.asdict(self.config),
            "best": self.best.record() if self.best else None,
            "logs": self.logs,
            "unwatched": self._unwatched,
            "since": self._since,
            "exhausted": self.best is not None and self.best.exhausted,
        }
        began = time.monotonic()
        path = checkpoint.save(self.run, self.step, self._trained(), state, keep=self.config.keep_checkpoints)
        self._saved, self._save_seconds = time.monotonic(), time.monotonic() - began
        return path

    def take_best(self) -> None:
        """Give the student the weights that are the result of the run: the best evaluated, else the
        averaged, else as they are."""
        student = self.method.networks["student"]
        if self.best and self.best.value is not None:
            checkpoint.restore(student.state_dict(), self.run / "best" / "student.safetensors")
        elif "student" in self.emas:
            self.emas["student"].copy_to(student)

    def _trained(self) -> checkpoint.Trained:
        return checkpoint.Trained(
            networks=self.method.networks,
            optimizers=self.optimizers,
            emas=self.emas,
            method_state=self.method.state_dict() if isinstance(self.method, Stateful) else {},
        )

    def _advance(self) -> None:
        """One step, which is done whole once its first role is updated, whatever signal comes."""
        began = time.perf_counter()
        shared = self._generator(stream=0)
        parts = self._split(self.batches(self.step, shared))
        if isinstance(self.method, BeforeStep):
            self.method.before_step(self.step, shared)
        rngs = {part: self._generator(stream=1, part=part) for part in parts}
        logs: dict[str, Tensor] = {}
        with ExitStack() as whole:
            for role in self.method.turns(self.step):
                prefix = f"{role}/" if len(self.method.trains) > 1 else ""
                logs |= {f"{prefix}{name}": value for name, value in self._update(role, parts, rngs, whole).items()}
            self.method.after_step(self.step)
            rates = self._learning_rates()
            self.step += 1
            self.logs |= parallel.averaged(logs) | rates | {"seconds": time.perf_counter() - began}
            self._mid_step, self._unwatched = False, True

    def _end_step(self, log: Log) -> None:
        """Measure and log the step that was done."""
        measured = self._watch(log)
        write = bool(measured) or self.step % self.config.log_every == 0 or self._finished()
        log.advance(self.step, self.logs | measured, write=write)
        self._unwatched = False

    def _checkpoint_due(self) -> bool:
        config = self.config
        if self.step % config.checkpoint_every == 0:
            return True
        wait = max(60 * config.checkpoint_minutes, SAVE_SHARE * self._save_seconds)
        return config.checkpoint_minutes > 0 and parallel.agreed(time.monotonic() - self._saved >= wait)

    def _update(
        self, role: str, parts: dict[int, Any], rngs: dict[int, torch.Generator], whole: ExitStack
    ) -> dict[str, Tensor]:
        """One optimizer step of `role`; from here on signals wait until `whole` is left."""
        config, optimizer = self.config.of(role), self.optimizers[role]
        logs: dict[str, Tensor] = {}
        give_turn(role, self.parameters)
        for part, batch in parts.items():
            with self._seeded(part):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                    loss = self.method.loss(role, batch, rngs[part])
                (loss.total / len(parts)).backward()
            for name, value in {"loss": loss.total, **loss.logs}.items():
                mean = value.detach() / len(parts)
                logs[name] = logs[name] + mean if name in logs else mean
        gradients = [parameter.grad for parameter in self.parameters[role] if parameter.grad is not None]
        norm = parallel.full(nn.utils.get_total_norm(gradients))
        # Adam would carry one bad gradient into every later step, so it is better not to take it at
        # all.
        if not torch.isfinite(norm):
            raise Diverged(
                f"step {self.step}: the gradient of {role!r} is not finite. "
                f"Lower the learning rate, or check the data; {self.run} holds the last good checkpoint"
            )
        nn.utils.clip_grads_with_norm_(self.parameters[role], config.clip_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.config.steps, self._since)
        if not self._mid_step:
            whole.enter_context(held_back())
            self._mid_step = True
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role in self.emas:
            self.emas[role].update(self.method.networks[role])
        return {**logs, "gradient_norm": norm}

    def _watch(self, log: Log) -> dict[str, float]:
        """Call the observers and the evaluation that are due; return what the latter measured."""
        due = [observer for observer in self.observers if self._due(observer.every)]
        evaluation = self.evaluation if self.evaluation and self._due(self.evaluation.every) else None
        if not due and evaluation is None:
            return {}
        with self._seeded(part=0), torch.no_grad(), self._averaged_student():
            for observer in due:
                observer(self.step, log)
            if evaluation is None or self.best is None:
                return {}
            measured = parallel.averaged(
                {name: torch.tensor(value, dtype=torch.float64) for name, value in evaluation.evaluate().items()}
            )
            if self.best.judge(self.step, measured):
                record = {"step": self.step, **measured}
                checkpoint.write(
                    self.run / "best", {"student": self.method.networks["student"].state_dict()}, {"best": record}
                )
        return {f"evaluation/{name}": value for name, value in measured.items()}

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _finished(self) -> bool:
        return self.step >= self.config.steps or (self.best is not None and self.best.exhausted)

    @contextmanager
    def _averaged_student(self) -> Iterator[None]:
        student = self.method.networks["student"]
        training = {
            module: module.training for network in self.method.networks.values() for module in network.modules()
        }
        for network in self.method.networks.values():
            network.eval()
        try:
            with self.emas["student"].applied(student) if "student" in self.emas else nullcontext():
                yield
        finally:
            for module, was in training.items():
                module.training = was

    def _split(self, batch: Any) -> dict[int, Any]:
        """Parts of a batch that this process computes, by number."""
        count = self.config.micro_batches
        if count == 1:
            return {0: batch}
        if len(batch) % count:
            raise UserError(
                f"a batch of {len(batch)} cannot be cut into {count} equal micro-batches: change one of them"
            )
        size = len(batch) // count
        mine = range(parallel.rank(), count, parallel.world_size())
        return {part: batch[part * size : (part + 1) * size] for part in mine}

    def _learning_rates(self) -> dict[str, float]:
        """Learning rates by role, where roles have settings of their own."""
        steps, since, config = self.config.steps, self._since, self.config
        rates = {
            f"{role}/learning_rate": learning_rate(config.of(role), self.step, steps, since) for role in config.roles
        }
        return {"learning_rate": learning_rate(config, self.step, steps, since), **rates}

    def _generator(self, stream: int, part: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(stream, part))

    def _seed(self, stream: int, part: int) -> int:
        # A large odd stride keeps the seeds of different runs and streams apart.
        return (self.config.seed * 1_000_003 + self.step) * 2 + stream + part * GOLDEN

    @contextmanager
    def _seeded(self, part: int) -> Iterator[None]:
        """Seeds the default generators, from which dropout draws and whatever forgets to take
        another."""
        seed, on_gpu = self._seed(stream=0, part=part + 1), self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            # torch.manual_seed would seed every kind of accelerator there is, which takes longer
            # than a small network's step.
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(seed)
            yield

    def _resume(self) -> None:
        path = checkpoint.latest(self.run)
        if path is None:
            return
        state = read_json(path / "state.json")
        recorded, current = state["config"], json.loads(json.dumps(dataclasses.asdict(self.config)))
        free = self.config.free(self.method.trains)
        ended = state["step"] >= recorded["steps"] or state.get("exhausted", False)
        trained_on = ended and recorded["steps"] < self.config.steps
        if trained_on:
            free.add("steps")
            # A longer run may be warmed up for longer.
            for settings in (recorded, current, *recorded["roles"].values(), *current["roles"].values()):
                del settings["warmup_steps"]
        changed = {name for name in current if name not in free and recorded.get(name) != current[name]}
        if changed:
            raise UserError(
                f"{path} was written with another {', '.join(sorted(changed))}: "
                "use the recorded values to continue it, or another folder for a new run"
            )
        self.step = checkpoint.load(path, self._trained())["step"]
        if isinstance(self.method, Stateful):
            self.method.load_state_dict(checkpoint.load_method_state(path, self.method.state_dict()))
        if self.best and state["best"]:
            self.best.continue_from(state["best"])
        self.logs, self._unwatched = state["logs"], state.get("unwatched", False)
        self._since = state.get("since", 0)
        if trained_on:
            self._since = self.step
            if self.best:
                self.best.failures = 0
