"""Named configurations: one function per recipe, whose docstring names its source."""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mfdetr_cache.config import from_dict, nearest, override, to_dict
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.files import read_regular
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Recipe:
    """A head and its training settings, as named by ``--recipe``.

    Attributes:
        given: What was typed with ``--set``.
    """

    name: str
    head: HeadConfig
    train: TrainConfig
    given: Mapping[str, str] = field(default_factory=dict, compare=False)

    def changed(self, name: str, train: Mapping[str, Any] = {}, **head: Any) -> "Recipe":  # noqa: ANN401
        """Another recipe: this one with other settings of training and head."""
        return Recipe(name, replace(self.head, **head), replace(self.train, **train))


def paper() -> Recipe:
    """The paper's final model: Table 6, row 4 (82.09 G, 3.26 M, 45.7 AP with H-DETR R50).

    The paper augments every image anew in each of its six epochs: a cache with five augmented views
    beside the plain one has as many. From a cache without views nothing is augmented.
    """
    return Recipe("paper", HeadConfig(), TrainConfig())


def fast() -> Recipe:
    """A small head that trains on some hundred images within 25 minutes on two cores.

    The paper's parts at half the width after the mapper, with one image layer and four box layers
    on a 16 x 16 grid, which costs less than two of them on 32 x 32; then a finer grid of 64 x 64,
    so that edges follow the object. Batches of two and Muon for the matrices get the most out of
    the steps that fit the time. Every query with enough overlap is trained on instead of one per
    object, with averaged weights. Mask scoring is off: it has a regressor for every label, and some
    hundred images are too few for it. All chosen on a fifth of the training images (the steps,
    and what each was worth: benchmarks/history.md, docs/quality.md). Made for a cache with views.
    """
    return _coarse().changed("fast", {"num_points": 1024}, fine_size=64, roi_sampling_ratio=1)


def _coarse() -> Recipe:
    """``fast`` without the finer grid."""
    head = HeadConfig(
        hidden_dim=64,
        image_layers=1,
        box_layers=4,
        roi_size=16,
        roi_sampling_ratio=2,
        mask_scoring=False,
    )
    train = TrainConfig(
        steps=2600,
        batch_size=2,
        optimiser="muon",
        lr=3e-3,
        weight_decay=0.1,
        warmup_steps=40,
        schedule="cosine",
        ema_decay=0.997,
        clip_norm=1.0,
        match="iou",
        min_match_iou=0.5,
        max_regions=8,
        num_points=256,
        importance_sample_ratio=0.4,
    )
    return Recipe("coarse", head, train)


def fcn() -> Recipe:
    """A baseline: Mask R-CNN's FCN head on the coarse grid's features, trained as ``fast``."""
    return _coarse().changed(
        "fcn", box_layers=0, query_ffn=False, query_b2o=False, mask_predictor="fcn"
    )


def pointrend() -> Recipe:
    """A baseline: PointRend on ``fcn``'s mask, as its authors have it on Mask R-CNN's."""
    return _with_points("pointrend", fcn())


def pointrend_fast() -> Recipe:
    """PointRend in place of ``fast``'s convolutions on the finer grid."""
    return _with_points("pointrend_fast", _coarse())


def _with_points(name: str, coarse: Recipe) -> Recipe:
    """PointRend on a coarse mask: a cell of the finer grid is one sample of the fused map.

    Three hidden layers as wide as the features, 784 points per subdivision (its section 3.4). The
    mask gets 64 x 64 cells, as ``fast``'s, where PointRend goes to 224 x 224.
    """
    return coarse.changed(
        name,
        fine_size=64,
        fine_block="points",
        fine_dim=coarse.head.hidden_dim,
        fine_layers=3,
        roi_sampling_ratio=1,
    )


def ffn() -> Recipe:
    """A baseline: a two-layer FFN on the query, nothing learned inside the box (Table 5)."""
    return _coarse().changed("ffn", box_layers=0, query_ffn=True, query_b2o=False)


def istr() -> Recipe:
    """A baseline: a 64-number code of the whole mask from query and region, as ISTR predicts it."""
    return ffn().changed("istr", mask_predictor="embedding")


def istr_stages() -> Recipe:
    """ISTR whole: six stages that refine box, query and a 60-number code; matched by codes too.

    Weights of the losses are ISTR's. Its classes are the detector's, which are frozen.
    """
    losses = {"dice_weight": 2.0, "embedding_weight": 2.0, "embedding_loss": "l2"}
    head = {"roi_size": 8, "mask_predictor": "refined", "mask_embedding_dim": 60}
    return fcn().changed("istr_stages", {"match": "set", **losses}, **head)


def queryinst() -> Recipe:
    """A baseline: QueryInst's dynamic mask head on the same regions, trained as ``fast``."""
    return fcn().changed("queryinst", mask_predictor="dynamic")


def mask2former() -> Recipe:
    """A baseline: Mask2Former's branch, FFN of the query times pixel embedding over the image.

    Mask DINO's is the same. Nothing is cut out, so a mask may lie anywhere in the image; one image
    at a time.
    """
    recipe = ffn()
    return recipe.changed("mask2former", {"accumulate": recipe.train.batch_size}, roialign=False)


def demo() -> Recipe:
    """The head of ``mfdetr demo``: ``fast`` on the coarse grid alone, for scenes of 160 pixels."""
    return _coarse().changed("demo", {"steps": 900}, box_layers=2)


_BASELINES = (fcn, pointrend, pointrend_fast, ffn, queryinst, istr, istr_stages, mask2former)
RECIPES: dict[str, Callable[[], Recipe]] = {f.__name__: f for f in (paper, fast, *_BASELINES, demo)}
# Chosen when the cache is seen.
AUTO = "auto"


def build_recipe(name: str, assignments: Mapping[str, str], file: Path | None = None) -> Recipe:
    """A recipe with settings replaced by those of a file, then as typed with ``--set``.

    ConfigError if the recipe or a setting is unknown, or a value or the file cannot be used.
    """
    recipe = _named(name) if file is None else _of_file(file, name)
    head_changes, train_changes = _split(assignments)
    head = override(recipe.head, head_changes, "--set")
    train = override(recipe.train, train_changes, "--set")
    return Recipe(recipe.name, head, train, assignments)


def asked_recipe(name: str, assignments: Mapping[str, str], file: Path | None = None) -> Recipe:
    """:func:`build_recipe`, or ``AUTO`` with what was given: a cache says what becomes of it."""
    if name != AUTO:
        return build_recipe(name, assignments, file)
    if file is not None:
        raise ConfigError(f"--recipe auto: --config {file} has all settings; leave one of them out")
    return replace(build_recipe("fast", assignments), name=AUTO)


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        raise ConfigError(f"--recipe: unknown recipe {name!r}{nearest(name, list(RECIPES))}")
    return RECIPES[name]()


def _of_file(path: Path, name: str) -> Recipe:
    """``recipe``, ``head`` and ``train`` of a TOML file, or of a run's ``config.json``.

    A file may leave out the recipe, which is ``name`` then, and settings.
    """
    where = f"--config {path}"
    try:
        text = read_regular(path).decode()
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        parts = {k: dict(document.get(k, {})) for k in ("head", "train")}
        recipe = str(document.get("recipe", name))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} holds no settings ({error})") from error
    is_run = "detector" in document
    unknown = sorted(set(document) - {"recipe", "written_by", *parts})
    if unknown and not is_run:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; use recipe, head and train")
    # A run names all settings of its time; those that came later are off by default.
    base = Recipe(recipe, HeadConfig(), TrainConfig()) if is_run else _named(recipe)
    head = from_dict(HeadConfig, {**to_dict(base.head), **parts["head"]}, where)
    train = from_dict(TrainConfig, {**to_dict(base.train), **parts["train"]}, where)
    return Recipe(recipe, head, train)


def split_settings(
    assignments: Mapping[str, str], where: str = "--set"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of HeadConfig and of TrainConfig, converted, from settings as typed with ``--set``.

    ConfigError, which names ``where``, if a setting is unknown or a value cannot be used.
    """
    head, train = _split(assignments, where)
    full_head = override(HeadConfig(), head, where)
    full_train = override(TrainConfig(), train, where)
    return {n: getattr(full_head, n) for n in head}, {n: getattr(full_train, n) for n in train}


def _split(
    assignments: Mapping[str, str], where: str = "--set"
) -> tuple[dict[str, str], dict[str, str]]:
    of_head = {f.name for f in fields(HeadConfig)}
    of_train = {f.name for f in fields(TrainConfig)}
    for key in assignments:
        if key not in of_head | of_train:
            hint = nearest(key, sorted(of_head | of_train))
            raise ConfigError(f"{where}: unknown setting {key!r}{hint}")
    head = {k: v for k, v in assignments.items() if k in of_head}
    return head, {k: v for k, v in assignments.items() if k in of_train}
