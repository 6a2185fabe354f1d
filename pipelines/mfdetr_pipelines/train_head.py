"""Train a mask network from a cache; the detector is never built."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.evaluation.overlap import tell_images_in_both
from mfdetr_cache.head.folder import HeadFolder, load_head
from mfdetr_cache.ops.devices import keep_no_kernels, torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.auto_recipe import fitted_recipe
from mfdetr_cache.training.config import Length, TrainConfig
from mfdetr_cache.training.distributed import training_processes
from mfdetr_cache.training.initial_head import new_head, with_weights_of
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import train_alone
from mfdetr_cache.training.order import chosen_views, trainable_rows
from mfdetr_cache.training.recipes import AUTO, Recipe
from mfdetr_cache.training.run import Validation, begin_run
from mfdetr_cache.training.run_folder import owned_run, record_of_cache
from mfdetr_cache.training.run_log import require_trackers
from mfdetr_cache.training.settings import (
    category_ids,
    open_validation,
    require_c1,
    require_validation,
    training_device,
    with_batch_size,
    with_length,
)
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.pages.chart import write_curves

if TYPE_CHECKING:
    from mfdetr_cache.evaluation.measure import EvaluateSummary


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """Result of a training.

    Attributes:
        steps: Optimiser steps, including those before a resume.
        seconds: Time of the steps, including those before a resume.
        loss: Mean total loss of the last 50 steps.
    """

    out: str
    recipe: str
    parameters: int
    steps: int
    epochs: float
    seconds: float
    waiting_seconds: float
    images_per_second: float
    loss: float
    validation: "EvaluateSummary | None"
    best_AP: float | None
    best_step: int | None


def run_train_head(
    config: TrainHeadConfig, reporter: Reporter, on_step: Callable[[int], None] | None = None
) -> TrainSummary:
    """Train a head, or resume its training; works under ``torchrun``.

    Raises CacheError (missing, unfinished or damaged), IdentityError (caches of different
    detectors), HeadError (run folder in use, or nothing to resume), TrainingError (no objects, or a
    loss that is not finite) or StoppedError (stopped by a signal; can be resumed).
    """
    before, wanted = config.local_cache.before, config.validation
    cache = FeatureCache.open(before(config.cache))
    cache.require_complete()
    recipe, why = _fitted(config, cache)
    location = None if wanted.val_cache is None else before(wanted.val_cache)
    val_split = recipe.train.val_split
    val_cache = open_validation(cache, location, val_split, recipe.head)
    require_validation(wanted.val_every, "--val-cache, or --set val_split=N", val_cache)
    require_trackers(config.track)
    train = _settled(config, recipe, cache)
    initial = None if config.from_head is None else load_head(config.from_head)
    if initial is not None:
        _require_unseen(initial, cache, train, val_cache)
    device = training_device(config.device, train.amp)
    keep_no_kernels()
    with training_processes(device) as processes, owned_run(config.out, processes):
        if not processes.is_first:
            reporter = SilentReporter()
        learner = build_learner(
            train,
            lambda: with_weights_of(new_head(recipe.head, cache, train), initial),
            device,
            processes,
        )
        require_c1(cache, learner.head, train)
        source = CacheSource(cache, [learner], processes)

        validation = None
        if val_cache is not None:
            validation = Validation.on_cache(val_cache, device, wanted.val_every, wanted.early_stop)
        run = begin_run(
            learner,
            config.out,
            record_of_cache(recipe.name, train, cache, val_cache, initial),
            processes,
            track=config.track,
            validation=validation,
            resume="longer" if config.resume and config.length != Length() else config.resume,
        )
        if val_cache is not None and location is not None:
            tell_images_in_both(val_cache, cache, reporter)
        if why:
            reporter.say("recipe auto: " + "; ".join(why))
        parameters = sum(p.numel() for p in learner.head.parameters())
        order = source.order
        reporter.say(
            f"recipe {recipe.name}: {parameters / 1e6:.2f} M parameters, {train.steps} "
            f"steps of {train.batch_size} images ({train.steps / order.steps_per_epoch:.1f} epochs "
            f"of {len(order.rows)} images with objects), {_augmentation(cache, train)}"
        )
        is_auto = config.batch_size == "auto"
        train_alone(source, run, reporter, processes, split_when_full=is_auto, on_step=on_step)
        measured = run.end(reporter, processes)
        if processes.is_first:
            write_curves(config.out)
    return TrainSummary(
        out=str(config.out),
        recipe=recipe.name,
        parameters=parameters,
        steps=learner.step,
        epochs=learner.step / order.steps_per_epoch,
        seconds=learner.seconds,
        waiting_seconds=learner.waiting_seconds,
        images_per_second=learner.images_per_second,
        loss=learner.recent_loss(),
        validation=measured,
        best_AP=run.best_ap,
        best_step=run.best_step,
    )


def _augmentation(cache: FeatureCache, train: TrainConfig) -> str:
    views = chosen_views(cache.layout.views, train.views)
    if len(views) > 1:
        return f"in {len(views)} views"
    return "not augmented: it sees one view of each (extract --views N makes more)"


def _fitted(config: TrainHeadConfig, cache: FeatureCache) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, and what ``auto`` chose."""
    asked = config.recipe
    if asked.name != AUTO:
        return asked, ()
    given = dict(asked.given)
    if isinstance(config.batch_size, int):
        given["batch_size"] = str(config.batch_size)
    device, has_length = torch_device(config.device), config.length != Length()
    return fitted_recipe(cache, given, device, has_length=has_length)


def _settled(config: TrainHeadConfig, recipe: Recipe, cache: FeatureCache) -> TrainConfig:
    train = with_batch_size(recipe.train, config.batch_size)
    if config.hold_out:
        train = replace(train, held_out=category_ids(config.hold_out, cache.categories))
    num_rows = 0 if config.length.epochs is None else len(trainable_rows(cache, train))
    return with_length(train, config.length, num_rows)


def _require_unseen(
    initial: HeadFolder, cache: FeatureCache, train: TrainConfig, val_cache: FeatureCache | None
) -> None:
    """Refuse to measure on images that the initial head has learned from."""
    if val_cache is None or val_cache.cache_id not in initial.run.learned_from:
        return
    left_out = initial.run.learned_from[val_cache.cache_id]
    if val_cache.cache_id != cache.cache_id or left_out != train.val_split:
        raise TrainingError(
            f"--from-head {initial.path} has learned from images of {val_cache.path} that would be "
            "measured on; give another --val-cache, or the val_split that it was trained with"
        )
