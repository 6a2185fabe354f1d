"""Every row of the paper's tables learns from the features of real images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from mfdetr_pipelines.ablation.comparison import PAPER_TABLES
from mfdetr_pipelines.ablation.plan import fit_row
from mfdetr_pipelines.ablation.rows import AblationRow
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.head.build import build_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.learner import build_learner
from tests.support.batches import batch_of

pytestmark = pytest.mark.slow

STEPS = 12
# By settings: a row that stands in several tables is trained once, in the last of them.
ROWS = {
    (row.recipe.head, row.recipe.train): pytest.param(
        row, n == 4, id=f"table {n} {row.recipe.name}"
    )
    for n in (2, 3, 5, 6, 9, 12, 15, 4)
    for row in PAPER_TABLES[n].rows
    if row.paper.params_m != 0  # the others have nothing to train
}


@pytest.fixture(scope="module")
def cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    path = tmp_path_factory.mktemp("real") / "train2017.zarr"
    config = ExtractConfig(
        str(shared / "detectors/deimv2-femto-coco"),
        path,
        images=shared / "coco-mini/train2017",
        annotations=shared / "coco-mini/annotations/instances_train2017.json",
        limit=2,
    )
    run_extract(config, SilentReporter())
    return FeatureCache.open(path)


@pytest.mark.parametrize(("row", "about_width"), ROWS.values())
def test_a_row_learns_from_real_features(
    cache: FeatureCache, row: AblationRow, about_width: bool
) -> None:
    """The same image again and again: the loss must fall to less than nine tenths."""
    recipe = fit_row(row, cache.spec).recipe
    # Rows that are not about the width are trained narrower; their blocks stay what they are.
    width = recipe.head.hidden_dim if about_width else 64
    head = dataclasses.replace(recipe.head, hidden_dim=width)
    train = dataclasses.replace(recipe.train, steps=STEPS, lr=3e-4, clip_norm=1.0, num_threads=1)
    learner = build_learner(train, lambda: build_head(head, cache.spec), torch.device("cpu"))
    # The second image has two objects, which is quick.
    batch = batch_of([cache.read(1, learner.head.map_names)], learner.head, train)
    assert len(batch.labels) == 2
    learner.head.train()
    losses = [learner.learn([batch], 0, len(batch.labels)).loss for _ in range(STEPS)]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
