"""Mask AP against masks drawn: images that ``cache suggest`` names, and images at random.

python benchmarks/suggest_curve.py --cache C --annotations JSON --val-cache C --out FOLDER

Both begin with the same random images of a seed and draw as many more in every round; all other
images have boxes only. Each round trains the recipe from nothing. What is there already is not done
again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.cache.suggest import run_suggest
from mfdetr_pipelines.config.cache import RelabelConfig, SuggestConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import build_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--val-cache", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=30, help="drawn at first and in every round")
    parser.add_argument("--rounds", type=int, default=2, help="after the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    document = json.loads(options.annotations.read_text())
    names = {i["id"]: i["file_name"] for i in document["images"]}
    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(list(names)).tolist()
        for way in ("suggest", "random"):
            drawn = order[: options.images]
            for number in range(options.rounds + 1):
                run = options.out / (f"{seed}-0" if number == 0 else f"{seed}-{way}-{number}")
                found = measured(options, document, drawn, run, seed)
                print(
                    json.dumps({"seed": seed, "way": way, "images": len(drawn), **found}),
                    flush=True,
                )
                if number == options.rounds:
                    break
                more = [i for i in order if i not in drawn][: options.images]
                if way == "suggest":
                    config = SuggestConfig(found["cache"], run / "head", options.images)
                    named = run_suggest(config, SilentReporter())
                    more = [i.image_id for i in named.images]
                drawn = drawn + more


def measured(
    options: argparse.Namespace, document: dict[str, Any], drawn: list[int], run: Path, seed: int
) -> dict[str, Any]:
    """Masks of some images alone beside the features, a head learned from them, and its AP."""
    result = run / "result.json"
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    run.mkdir(parents=True, exist_ok=True)
    kept = set(drawn)
    annotations = [
        a if a["image_id"] in kept else {**a, "segmentation": None} for a in document["annotations"]
    ]
    labels = run / "labels.json"
    labels.write_text(json.dumps({**document, "annotations": annotations}))
    version = run_relabel(RelabelConfig(options.cache, labels), SilentReporter()).version
    cache = f"{options.cache}@{version}"
    recipe = build_recipe("fast", {"seed": str(seed)})
    length = Length(max_steps=options.steps)
    run_train_head(TrainHeadConfig(cache, run / "head", recipe, length=length), SilentReporter())
    evaluate = EvaluateConfig(options.val_cache, run / "head", extras=())
    summary = run_evaluate(evaluate, SilentReporter())
    masks = sum(a["image_id"] in kept and not a["iscrowd"] for a in document["annotations"])
    found = {"cache": cache, "masks": masks, "AP": summary.mask.AP, "AP50": summary.mask.AP50}
    result.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
