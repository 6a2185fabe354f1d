import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from mfdetr_pipelines.cache.view import principal_colours, run_view
from mfdetr_pipelines.config.cache import ViewConfig
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError, ConfigError
from mfdetr_cache.reporter import SilentReporter
from tests.support.browser import require_readable


def test_regions_of_different_features_get_different_colours() -> None:
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((32, 4)))[0].T
    quarter = np.kron(np.array([[0, 1], [2, 3]]), np.ones((8, 8), int))
    features = 5 * directions[quarter] + random.normal(0, 0.1, (16, 16, 32))
    colours = principal_colours(features.astype(np.float32)).astype(int)
    means = np.array([colours[quarter == q].mean(axis=0) for q in range(4)])
    within = max(colours[quarter == q].std(axis=0).max() for q in range(4))
    between = min(np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a))
    assert between > 4 * within
    assert principal_colours(features[..., :2].astype(np.float32)).shape == (16, 16, 3)


def test_the_page_shows_every_map_of_some_images(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path
) -> None:
    page = tmp_path / "page.html"
    images = scenes_folder / "images"
    summary = run_view(ViewConfig(drawn_cache, page, images, 3), SilentReporter())
    assert summary.images == 3
    text = page.read_text()
    pictures = re.findall(r'data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', text)
    titles = [title for _, title in pictures]
    per_image = len(FeatureCache.open(drawn_cache).spec.maps) + 1
    assert len(titles) == 3 * per_image
    assert titles[::per_image] == ["detections"] * 3
    sizes = {Image.open(io.BytesIO(base64.b64decode(p))).size for p, _ in pictures[:per_image]}
    # A map is shown as large as the image it is of.
    assert len(sizes) == 1
    assert text.count("<svg") >= 4
    assert "encoder" in text
    require_readable(text, tmp_path)
    without = run_view(ViewConfig(drawn_cache, tmp_path / "b.html", None, 1), SilentReporter())
    assert without.images == 1
    with pytest.raises(ConfigError, match="--count 0: give 1 or more"):
        run_view(ViewConfig(drawn_cache, page, None, 0), SilentReporter())
    with pytest.raises(CacheError, match="does not exist"):
        run_view(ViewConfig(tmp_path / "absent", page, None, 1), SilentReporter())
