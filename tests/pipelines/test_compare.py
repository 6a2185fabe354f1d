import json
import re
from pathlib import Path

import pytest
from mfdetr_pipelines.compare import run_compare
from mfdetr_pipelines.config.compare import CompareConfig, Pictures
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError, ConfigError, OutputError
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from tests.support.training import small_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, drawn_cache: Path) -> tuple[Path, Path]:
    """Two heads of three and eight steps."""
    folder = tmp_path_factory.mktemp("compared")
    for steps in (3, 8):
        config = TrainHeadConfig(
            drawn_cache, folder / str(steps), small_recipe(), length=Length(steps)
        )
        run_train_head(config, SilentReporter())
    return folder / "3", folder / "8"


def test_runs_and_files_have_the_numbers_of_evaluate(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, runs: tuple[Path, Path]
) -> None:
    files = tmp_path / "first.json", tmp_path / "second.json"
    wanted = [
        run_evaluate(
            EvaluateConfig(drawn_cache, run, save_results=file, extras=frozenset({"boundary"})),
            SilentReporter(),
        )
        for run, file in zip(runs, files, strict=True)
    ]
    page = tmp_path / "page.html"
    found = run_compare(
        CompareConfig(
            (*runs, files[1]),
            cache=(str(drawn_cache),),
            annotations=scenes_folder / "instances.json",
            samples=20,
            pictures=Pictures(page, scenes_folder / "images", objects=2),
        ),
        SilentReporter(),
    )
    first, second, file = found.subjects
    assert found.num_images == 8
    for subject, summary in ((first, wanted[0]), (second, wanted[1]), (file, wanted[1])):
        assert (subject.mask, subject.boundary) == (summary.mask, summary.boundary)
    shown = re.findall(r'alt="([^"]+)"', page.read_text())
    assert shown[:2] == ["image", "annotation"]
    assert [re.sub(r"\d+$", "N", title) for title in shown[2:5]] == [
        *("3, IoU N", "8, IoU N", "second.json, IoU N"),
    ]
    assert first.against_first is None
    assert second.against_first == file.against_first
    assert second.against_first is not None
    assert second.against_first.difference == pytest.approx(
        wanted[1].mask.AP - wanted[0].mask.AP, abs=1e-12
    )


def test_a_file_without_a_result_has_an_ap_of_nothing(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path
) -> None:
    truth = ground_truth_of(FeatureCache.open(drawn_cache))
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "score": 1.0,
            "segmentation": {**a["segmentation"], "counts": a["segmentation"]["counts"].decode()},
        }
        for a in truth.dataset["annotations"]
    ]
    files = tmp_path / "perfect.json", tmp_path / "empty.json"
    for file, results in zip(files, (perfect, []), strict=True):
        file.write_text(json.dumps(results))
    config = CompareConfig(files, annotations=scenes_folder / "instances.json", samples=5)
    best, nothing = run_compare(config, SilentReporter()).subjects
    assert (pytest.approx(1.0), 0.0) == (best.mask.AP, nothing.mask.AP)
    assert nothing.against_first is not None
    assert nothing.against_first.high == pytest.approx(-1.0)


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, runs: tuple[Path, Path]
) -> None:
    results, cache = tmp_path / "results.json", (str(drawn_cache),)
    results.write_text("[]")
    with pytest.raises(ConfigError, match="two or more"):
        CompareConfig((runs[0], runs[0]), cache=cache)
    with pytest.raises(ConfigError, match="no such run folder"):
        CompareConfig((runs[0], tmp_path / "none"), cache=cache)
    with pytest.raises(ConfigError, match="--cache is given 0 times for 2 run folders"):
        CompareConfig(runs)
    with pytest.raises(ConfigError, match="--page and --images go together"):
        Pictures(tmp_path / "page.html")
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    config = CompareConfig(runs, cache=cache, pictures=Pictures(mine, scenes_folder))
    with pytest.raises(OutputError, match="--page"):
        run_compare(config, SilentReporter())
    with pytest.raises(ConfigError, match="results files need --annotations"):
        CompareConfig((runs[0], results), cache=cache)
    other = tmp_path / "instances.json"
    other.write_text((scenes_folder / "instances.json").read_text() + "\n")
    with pytest.raises(CacheError, match="has other annotations than"):
        run_compare(CompareConfig(runs, cache=cache, annotations=other), SilentReporter())
