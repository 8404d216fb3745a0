"""The training loop: embed, loss against batch and memory, step; now and then measure, and write a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, compiling, features, heap, kinds, loading, terminal
from .augment import TrainingBatches, evaluation_view, training_view
from .averaged import Averaged
from .best import Best
from .config import Config
from .data import Dataset
from .drift import DriftMeter, Staleness, probes
from .evaluate import Scores
from .journal import Journal
from .making import limit_gradient, make_criterion, make_optimizer, make_sampler, set_learning_rates
from .model import Embedder
from .oracle import Oracle
from .ranks import ALONE, Ranks
from .scoring import TEST, VALIDATION, Scoring
from .scoring import TrainingError as TrainingError
from .streams import Stream, torch_seeds

MAX_BAD_STEPS = 10
"""Steps in a row without a finite loss after which training gives up."""
Batch = tuple[Tensor, Tensor]
"""Images uint8 [B, 3, H, W], or features [B, F], with labels int64 [B]."""


class Interrupted(Exception):
    """The run was asked to stop, and did so after writing a checkpoint."""


class Trainer:
    """One run. Everything that a continued run needs is in ``state_dict``.

    Args:
        inputs: ``data`` with features in place of images, where they are frozen and at hand already.
        ranks: the processes that do this run, each with a part of every batch and of the test images. All of them call
            every method, and come to the same numbers.
    """

    def __init__(
        self,
        config: Config,
        model: Embedder,
        data: Dataset,
        device: torch.device,
        inputs: Dataset | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.data, self.device, self.ranks = config, data, device, ranks
        frozen = config.features == "frozen"
        seen = evaluation_view(config.image_size, config.augment, config.interpolation)
        sampler = make_sampler(config, data.train.labels)
        view = training_view(config.image_size, data.mirror, config.augment, config.interpolation)
        workers = loading.workers(config.workers, data.train.images, device, ranks.local_size)
        if frozen:
            inputs = inputs or features.of(data, model, seen, device, workers, ranks)
            view = seen = features.as_they_are
        self.inputs = inputs or data
        self.workers = loading.workers(config.workers, self.inputs.train.images, device, ranks.local_size)
        self.scoring = Scoring(data, self.inputs, seen, device, self.workers, ranks)
        self.rates = loading.Rates(config.batch_size * config.accumulate, self.workers)
        own = ranks.part(config.batch_size)
        self.batches = TrainingBatches(self.inputs.train, sampler, view, config.seed, own)
        self.model = model.to(device)
        if not frozen and model.normalises_by_batch():
            model.backbone = ranks.synchronized(model.backbone)
        self.forward = compiling.compiled(self.model) if config.compile else self.model
        self.average = Averaged(self.model, config.ema) if config.ema else None
        self.criterion = make_criterion(config, ranks).to(device)
        self.optimizer = make_optimizer(config, model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.drift = DriftMeter(config.memory_size, config.batch_size, probes(frozen), ranks, config.accumulate)
        self._probe: tuple[int, Tensor, Tensor] | None = None
        self.oracle = Oracle(config.memory_size, device) if config.method == "oracle" else None
        self.step, self.seconds, self.bad_steps = 0, 0.0, 0
        self.journal = Journal(config, data, list(self.criterion.stats()))
        self.before: dict[str, Any] = {}
        self.best = None if data.validation is None else Best(config.best)
        self.best_saved: int | None = None

    @property
    def network(self) -> Embedder:
        """What is tested and kept: the network, or with --ema the one with averaged weights."""
        return self.model if self.average is None else self.average.network

    @property
    def history(self) -> dict[str, list[dict[str, float]]]:
        """What has been noted so far: losses, scores, drift, and what the criterion says of its memory."""
        return self.journal.history

    @property
    def _parts(self) -> list[str]:
        """Those with a state; some runs lack the last three."""
        names = ("model", "criterion", "optimizer", "scaler", "drift", "best", "average", "oracle")
        return [name for name in names if getattr(self, name) is not None]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only."""
        return {
            "config": self.config.settings(),
            "data": self.data.fingerprint,
            "step": self.step,
            "bad_steps": self.bad_steps,
            "seconds": self.seconds,
            "before": self.before,
            **self.journal.state_dict(),
            "start": self.model.start(),
            **{name: getattr(self, name).state_dict() for name in self._parts},  # the scaler has some in float16 only
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; raises ValueError and the like if it is not one of such a run."""
        kinds.require(state, self.journal.kinds(state))
        self.step, self.seconds, self.before = state["step"], state["seconds"], state["before"]
        self.bad_steps = state.get("bad_steps", 0)  # older checkpoints lack it
        self.journal.load_state_dict(state)
        for name in self._parts:
            getattr(self, name).load_state_dict(state[name])
        if self.step > self.bad_steps and not self.scaler.is_enabled() and not self.optimizer.state:
            raise ValueError("the optimizer's state is missing")

    def save(self) -> None:
        """Write the checkpoint. Nothing in it is of one process, so that any number of them can go on."""
        state = self.state_dict()

        def write() -> None:
            checkpoint.save(self.config.folder / checkpoint.CHECKPOINT, state)
            self.save_best()

        self.ranks.leader(write)

    def save_best(self) -> None:
        """Write the best weights, if there are new ones. The checkpoint has them, too: of a run that was killed before
        they were written, what goes on writes them."""
        if self.best is None or self.best.step in (None, self.best_saved):
            return
        about = {"config": self.config.settings(), "data": self.data.fingerprint, "start": self.model.start()}
        checkpoint.save(self.config.folder / checkpoint.BEST, about | self.best.state_dict())
        self.best_saved = self.best.step

    @loading.plain_errors()
    def run(self, asked_to_stop: Callable[[], bool] = lambda: False, *, quiet: bool = False) -> Tensor:
        """Train to the end and return the embeddings [N, D] of the test images, by the best weights if some are kept.

        Args:
            asked_to_stop: asked after each step but the last; if one process is asked to, all stop.
            quiet: no bar, no logs, and scores at the end only; checkpoints as ever.

        Raises:
            ConfigError: a checkpoint or the log cannot be written.
            DataError: an image cannot be read, or the system has ended a process that reads them.
            Interrupted: ``asked_to_stop`` said so after a step; a checkpoint has been written.
            TrainingError: the loss stopped being a number.
            Elsewhere: another process of this run has raised one of these.
        """
        ranks = self.ranks
        silent = quiet or not ranks.leads
        began = time.perf_counter()
        with ranks.together():
            self.journal.begin(self.step, silent=silent)
        with self.journal.logs:
            ranks.leader(self.save_best)
            if not self.before and not quiet:
                self.before = self.scoring.before(self.model)
                self.seconds = time.perf_counter() - began
                self.save()
            embeddings = self._train(asked_to_stop, quiet=quiet)
            with ranks.together():
                self.journal.logs.close()
        if not silent and self.rates.words():
            terminal.say(self.rates.words())
        return self.final_embeddings() if embeddings is None else embeddings

    def _train(self, asked_to_stop: Callable[[], bool], *, quiet: bool) -> Tensor | None:
        """All steps to come; the embeddings of the last evaluation, None if there was none."""
        config, ranks = self.config, self.ranks
        started = time.perf_counter() - self.seconds
        silent = quiet or not ranks.leads
        embeddings: Tensor | None = None
        batches = self._batches()
        bar = tqdm(total=config.steps, initial=self.step, desc=config.method, unit=" steps", disable=silent or None)
        with bar:
            while self.step < config.steps:
                began = time.perf_counter()
                loss = self.train_step(islice(batches, config.accumulate))
                self.rates.step(time.perf_counter() - began)
                speeds = f"{self.rates.network:.0f} images/s, {self.rates.loading:.0f} prepared"
                bar.set_postfix_str(f"loss {loss:.3f}, {speeds}", refresh=False)
                bar.update()
                self.seconds = time.perf_counter() - started
                drift = self.measure_drift()
                with ranks.together():
                    self.note_step(loss, drift)
                last = self.step == config.steps
                due = bool(config.eval_every) and self.step % config.eval_every == 0
                if last or (due and not quiet):
                    self.validate(quiet=quiet)
                    if last or self.best is None:
                        embeddings = self.evaluate(quiet=quiet)
                    self.seconds = time.perf_counter() - started
                with ranks.together():
                    self.journal.end(self.step)
                heap.trim(self.step)
                stop = not last and ranks.any_says(asked_to_stop())
                if last or due or stop:
                    self.save()
                if stop:
                    raise Interrupted
        return embeddings

    def _batches(self) -> Iterator[Batch]:
        """This process's part of the batches of the steps to come."""
        first, last = (step * self.config.accumulate for step in (self.step, self.config.steps))
        prepared = self.batches.prepared(first, last, workers=self.workers, pin=self.device.type == "cuda")
        for _ in range(first, last):
            began = time.perf_counter()
            with self.ranks.together(), loading.plain_errors():
                images, labels, seconds = next(prepared)
            self.rates.prepared(seconds, time.perf_counter() - began)
            yield images, labels

    def train_step(self, batches: Iterable[Batch]) -> float:
        """One step of the optimizer, after as many batches as --accumulate says; returns the mean of their losses.

        Of several processes each has some of the images; the losses are those of them all.

        Args:
            batches: images uint8 [B, 3, H, W], or features [B, F], with labels int64 [B].
        """
        self.model.train()
        set_learning_rates(self.optimizer, self.config, self.step)
        self.optimizer.zero_grad()
        values = [self._train_batch(number, *batch) for number, batch in enumerate(batches)]
        value = sum(values) / len(values)
        self.ranks.add_up([parameter for group in self.optimizer.param_groups for parameter in group["params"]])
        # The memory itself keeps rows that are not finite out.
        if math.isfinite(value) and limit_gradient(self.optimizer, self.scaler, self.config.clip_grad):
            self.scaler.step(self.optimizer)  # not where gradients overflow: their scale is halved then
            self.scaler.update()
            if self.average is not None:
                self.average.update(self.model)
            self.bad_steps = 0
            if self._probe is not None:
                self.drift.record(self.step, *self._probe)
        else:
            self.bad_steps += 1
            if self.bad_steps == MAX_BAD_STEPS:
                found = "the gradient was not finite" if math.isfinite(value) else f"the loss was {value}"
                raise TrainingError(
                    f"{found} in each of the {MAX_BAD_STEPS} steps up to step {self.step}: "
                    "lower --lr or --backbone-lr, or lengthen --lr-warmup"
                )
        self.step += 1
        return value

    def _train_batch(self, number: int, images: Tensor, labels: Tensor) -> float:
        """Rank a batch, the one of this number in the step, store it and add its part to the gradient; its loss."""
        config, ranks = self.config, self.ranks
        # For dropout, which alone draws from the global generators: a stream for each process.
        seeds = torch_seeds(config.seed, Stream.DROPOUT, self.step * config.accumulate + number, ranks.size)
        torch.manual_seed(seeds[ranks.rank])
        images = images.to(self.device, non_blocking=True)
        # Of the last batch of a step: those before it may leave the memory before the step ends.
        probe = number + 1 == config.accumulate and self.drift.wants(self.step)
        head = int(self.criterion.head) if probe else 0
        with compiling.plain_errors():
            embeddings = self.forward(images)
            if self.oracle is not None:
                self.oracle.before_step(self.model, self.criterion, images, embeddings)
            loss = self.criterion(embeddings, labels.to(self.device, non_blocking=True))
            # The criterion's gradient is as many times the own part of the loss's as there are processes, for
            # averaging. Here parts are added up, and are no larger in 16 bits than those of one process.
            self.scaler.scale(loss / (ranks.size * config.accumulate)).backward()
        self._probe = (head, images, embeddings.detach()) if probe else None
        return float(loss.detach())

    def measure_drift(self) -> list[Staleness]:
        """The memory's drift, at times fixed by the number of steps alone."""
        if self.step % self.drift.every(self.config.steps):
            return []
        return self.drift.measure(self.step, self.model, self.criterion.embedding_memory)

    def note_step(self, loss: float, drift: list[Staleness]) -> None:
        """Note the loss, how fast it went and the drift; now and then what the criterion says of its memory."""
        if self.journal.loss(self.step, loss, self.optimizer.param_groups[0]["lr"], self.rates, self.seconds):
            stats = {name: float(number) for name, number in self.criterion.stats().items()}
            stats["age"] /= self.config.accumulate  # of batches
            self.journal.memory(self.step, stats)
        self.journal.drift(self.step, drift)

    def validate(self, *, quiet: bool = False) -> None:
        """Score the held-out training classes, say so, and keep the weights if they are the best so far."""
        if self.best is None:
            return
        scores = self.scoring.of(self.scoring.embeddings(self.network, VALIDATION), VALIDATION, self.step)
        better = self.best.offer(self.step, scores, self.network)
        self.note(VALIDATION, self.step, scores, None if quiet else ", the best so far" * better)

    def evaluate(self, *, quiet: bool = False) -> Tensor:
        """Score the test images, if there are some, and say so; returns their embeddings [N, D].

        Where the best weights are kept, it is done by them, and by the last ones for information.
        """
        embeddings = self.final_embeddings()
        comment = None if quiet else ""
        if self.data.tested:
            step = self.step if self.best is None or self.best.step is None else self.best.step
            scores = self.scores(embeddings)
            self.note(TEST, step, scores, comment)
            if step != self.step:
                self.note(TEST, self.step, self.scores(self.test_embeddings()), comment)
            if self.best is not None:
                self.journal.best(step, scores)
        return embeddings

    def note(self, part: str, step: int, scores: Scores, comment: str | None) -> None:
        """Note scores of a part after so many steps; say so, with a comment, unless that is None."""
        with self.ranks.together():
            self.journal.scores(part, step, self.seconds, scores)
        if comment is not None:
            which = "" if self.best is None else f"{part} "
            found = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
            terminal.say(f"step {step:5d}: {which}{found}{comment}")

    def test_embeddings(self) -> Tensor:
        """The test images' embeddings [N, D] as the network is now."""
        return self.scoring.embeddings(self.network, TEST)

    def final_embeddings(self) -> Tensor:
        """The same by the best weights, if some are kept."""
        if self.best is None or self.best.step is None:
            return self.test_embeddings()
        with self.best.used(self.network):
            return self.test_embeddings()

    def scores(self, embeddings: Tensor) -> Scores:
        """Scores of embeddings [N, *] of the test images; raises TrainingError if they cannot be computed."""
        return self.scoring.of(embeddings, TEST, self.step)
