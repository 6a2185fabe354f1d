"""Any bytes in any file that a command is given: read, or refused in one line, or a bug.

``MFDETR_FUZZ=10000`` tries so many mutations of each kind; the suite tries some dozen.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from mfdetr_pipelines.ablation.rows import rows_of_file
from PIL import Image

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.options import parse_map
from mfdetr_cache.coco.results import load_results
from mfdetr_cache.coco.yolo import DataYaml, read_yolo
from mfdetr_cache.config import to_dict
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.options import names_in_file
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import MfdetrError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import RunRecord, load_head, save_head, save_run_config
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.run import Run
from mfdetr_cache.training.run_folder import load_checkpoint, save_checkpoint
from tests.support import small_checkpoints
from tests.support.caches import document_paths, require_one_line, with_value
from tests.support.images import make_spec
from tests.support.mutations import HOSTILE, mutated_bytes, mutated_json

EXAMPLES = int(os.environ.get("MFDETR_FUZZ", "25"))
HEAD = HeadConfig(hidden_dim=8, roi_size=8, image_layers=1, box_layers=1, use_c1=False)


def fuzz(
    try_one: Callable[[Random], object], *refusals: type[Exception], count: int = EXAMPLES
) -> None:
    """Anything but a result or a refusal of one line is raised, with the seed that gave it."""
    for seed in range(count):
        try:
            try_one(Random(seed))
        except (MfdetrError, *refusals) as error:
            require_one_line(error)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def fuzz_file(
    path: Path,
    read: Callable[[], object],
    *refusals: type[Exception],
    is_json: bool = False,
    count: int = EXAMPLES,
) -> None:
    """Read mutations of a file that is there; it is put back afterwards."""
    data = path.read_bytes()

    def try_one(random: Random) -> None:
        both = is_json and random.random() < 0.7
        path.write_bytes(
            mutated_json(json.loads(data), random) if both else mutated_bytes(data, random)
        )
        read()

    fuzz(try_one, *refusals, count=count)
    path.write_bytes(data)


def annotations() -> dict[str, Any]:
    square = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]
    shapes = [[square], {"size": [16, 24], "counts": [50, 20, 314]}]
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 16, "width": 24} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1 + i % 2,
                "category_id": 1,
                "bbox": [2, 2, 10, 10],
                "area": 100,
                "iscrowd": int(isinstance(shape, dict)),
                "segmentation": shape,
            }
            for i, shape in enumerate(shapes)
        ],
    }


def test_annotation_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(annotations()))
    fuzz_file(path, lambda: load_coco_split(path), is_json=True)
    fuzz_file(path, lambda: load_coco_split(path, on_bad="skip"), is_json=True)


def test_results_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(annotations()))
    split = load_coco_split(path)
    found = [
        {"image_id": 1, "category_id": 1, "score": 0.5, **what}
        for what in (
            {"bbox": [1.0, 2.0, 5.0, 6.0]},
            {"segmentation": {"size": [16, 24], "counts": [50, 20, 314]}},
        )
    ]
    results = tmp_path / "r.json"
    results.write_text(json.dumps(found))
    fuzz_file(results, lambda: load_results(results, split), is_json=True)
    fuzz_file(results, lambda: load_results(results, split, "skip"), is_json=True)


def test_heads(tmp_path: Path) -> None:
    """As they are written, where no change is read, and with a configuration without a hash."""
    spec = make_spec(width=8, c1_channels=8, strides=(8, 16), num_queries=6)
    save_run_config(tmp_path, HEAD, RunRecord(detector=detector_identity(spec)))
    save_head(tmp_path, build_head(HEAD, spec).state_dict())

    def refused() -> None:
        with pytest.raises(MfdetrError) as caught:
            load_head(tmp_path)
        require_one_line(caught.value)

    for name in ("config.json", "head.safetensors"):
        fuzz_file(tmp_path / name, refused)
    document = json.loads((tmp_path / "config.json").read_bytes())
    del document["sha256"], document["run"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_head(tmp_path, build_head(HEAD, spec).state_dict())
    fuzz_file(tmp_path / "config.json", lambda: load_head(tmp_path), is_json=True)


def test_checkpoints(tmp_path: Path) -> None:
    spec = make_spec(width=8, c1_channels=8, strides=(8, 16), num_queries=6)
    train = build_recipe("demo", {"steps": "4"}).train
    made = build_learner(train, lambda: build_head(HEAD, spec), torch.device("cpu"))
    state = copy.deepcopy(made.state())
    save_checkpoint(tmp_path, state)
    fuzz_file(tmp_path / "checkpoint.pt", lambda: load_checkpoint(tmp_path))
    hostile = [None, -5, 10**9, "x", [], {}, float("nan"), torch.zeros(3), [None]]

    def try_one(random: Random) -> None:
        key, value = random.choice([*state, ""]), random.choice(hostile)
        save_checkpoint(tmp_path, {**state, key: value} if key else value)
        Run(made, tmp_path, resume=True)

    fuzz(try_one)


def test_files_of_names_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "images").mkdir()
    path.write_text('[[row]]\nname = "a"\nrecipe = "fast"\nset = { lr = 0.1, hidden_dim = 64 }\n')
    fuzz_file(path, lambda: rows_of_file(path))
    path.write_text("cat=dog\n# more\na=b\n")
    fuzz_file(path, lambda: parse_map([str(path)]), ValueError)
    path.write_text("cat\ndog\n")
    fuzz_file(path, lambda: names_in_file(str(path)), ValueError)
    path.write_text("path: .\ntrain: images\nnames:\n  0: cat\n  1: dog\n")
    fuzz_file(path, lambda: DataYaml(path).folders())
    fuzz_file(path, lambda: read_yolo(path, tmp_path / "images"))
    # JSON is YAML too. A name that is too long is refused by the command line.
    path.write_text(
        '{"path": ".", "train": ["images"], "nc": 2, "names": {"0": "cat", "1": "dog"}}'
    )
    fuzz_file(path, lambda: DataYaml(path).folders(), OSError, is_json=True)
    fuzz_file(path, lambda: read_yolo(path, tmp_path / "images"), OSError, is_json=True)


def test_files_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    recipe = build_recipe("fast", {})
    path.write_text(json.dumps({"recipe": "fast", **to_dict(recipe)}))
    fuzz_file(path, lambda: build_recipe("fast", {}, path), is_json=True)
    rows = [{"name": "a", "recipe": "fast", "set": {"lr": 0.1}, "extract": {"views": 2}}]

    def read_rows(random: Random) -> None:
        document = with_value(rows, random.choice(document_paths(rows)[1:]), random.choice(HOSTILE))
        path.write_text(f"row = {as_toml(document)}")
        rows_of_file(path)

    fuzz(read_rows)


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items())
        return f"{{{items}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return {"NaN": "nan", "Infinity": "inf", "null": '"null"'}.get(text := json.dumps(value), text)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "gif", "tif", "ppm"])
def test_images(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((24, 16), 50).convert("RGB").save(path)
    fuzz_file(path, lambda: load_image(path))


@pytest.mark.parametrize("name", ["rt-detr", "rf-detr"])
def test_checkpoints_of_authors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pth"
    small_checkpoints.write_small(path, name)
    fuzz_file(path, lambda: load_detector("auto", str(path)), count=-(-EXAMPLES // 5))
    weights = small_checkpoints.state_dict(name)
    odd = [torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4, 5), None, "x", 7, ...]

    def try_one(random: Random) -> None:
        changed = {**weights, random.choice(list(weights)): random.choice(odd)}
        torch.save({k: v for k, v in changed.items() if v is not ...}, path)
        load_detector(name, str(path))

    fuzz(try_one, count=-(-EXAMPLES // 5))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_folders_of_transformers(tmp_path: Path, rtdetr_folder: Path, name: str) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(rtdetr_folder, folder)
    fuzz_file(
        folder / name,
        lambda: load_detector("hf", str(folder)),
        is_json=name.endswith("json"),
        count=-(-EXAMPLES // 5),
    )
