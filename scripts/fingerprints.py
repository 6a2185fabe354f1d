"""Fingerprints of what a change of the code's form must leave as it is, bit by bit.

Caches, trained weights, metrics and masks of drawn scenes, each as a line ``name  sha256``:

    python scripts/fingerprints.py --out before.txt
    python scripts/fingerprints.py --compare before.txt    # exits 1, naming the lines that differ

Everything goes through the command line, so that modules may move. One thread computes: sums then
have one order, and two runs on one machine agree. Another machine, or another torch, has other
numbers; compare runs of the same one.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# One thread each, no GPU, and MKL's choice of code must not follow where an array lies in memory.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "MKL_DYNAMIC": "FALSE",
    "MKL_CBWR": "AUTO,STRICT",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
TRAIN_SCENES, VAL_SCENES, FIRST_VAL_SEED = 16, 6, 10_000
LONG_STEPS, SHORT_STEPS = 100, 5
SMALL = ("hidden_dim=16", "roi_size=16", "box_layers=1", "fine_size=0")
# Short trainings from the int8 cache: what is changed about a recipe, for each part of a head.
SHORT: dict[str, tuple[str, tuple[str, ...]]] = {
    "deformable": ("fast", ("image_layers=2", "box_layers=2")),
    "swin": ("fast", ("image_block=swin", "image_layers=2", "box_block=swin", "box_layers=2")),
    "convnext": ("fast", ("image_block=convnext", "box_block=convnext")),
    "no layers": ("fast", ("image_layers=0", "box_layers=0")),
    "segmenter": ("fast", ("mask_predictor=segmenter",)),
    "finer grid": ("fast", ("fine_size=32", "coarse_weight=1")),
    "fcn": ("fcn", ("box_layers=0",)),
    "ffn": ("ffn", ("box_layers=0",)),
    "embedding": ("istr", ("box_layers=0", "mask_embedding_dim=16")),
    "no c1": ("fast", ("use_c1=false",)),
    "no c1, up-sampled": ("fast", ("use_c1=false", "upsample_without_c1=true")),
    "fuse_stride 16": ("fast", ("fuse_stride=16",)),
    "o2o": ("fast", ("query_o2o=true",)),
    "no query encoder": ("fast", ("query_ffn=false", "query_b2o=false")),
    "mask scoring": ("fast", ("mask_scoring=true",)),
    "hungarian": ("fast", ("match=hungarian", "min_match_iou=0")),
    "adamw": ("fast", ("optimiser=adamw", "schedule=step", "ema_decay=0")),
    "jittered boxes": ("fast", ("gt_box_share=0.5", "box_jitter=0.1")),
    "grid points": ("fast", ("points=grid",)),
    "bf16 in pieces": ("fast", ("amp=bf16", "accumulate=2")),
    "parts of the cache": ("fast", ("shuffle=parts", "views=base", "label_fraction=0.7")),
    "held out": ("fast", ("held_out=1,2",)),
}

# What a run's configuration says about the machine and the place, and the hash over all of it.
NOT_KEPT = ("command", "versions", "val_cache", "sha256")

Lines = Iterator[tuple[str, str]]


def main() -> None:
    """Compute, print, and write or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="lines of another run")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder to work in and keep")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # Libraries look once, when they are loaded.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})
    before = None if args.compare is None else read_lines(args.compare)
    import torch

    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in fingerprints(folder):
            found[name] = digest
            print(f"{name}  {digest}", flush=True)
    if args.out is not None:
        args.out.write_text("".join(f"{name}  {digest}\n" for name, digest in found.items()))
    if before is not None:
        sys.exit(report_differences(before, found))


def read_lines(path: Path) -> dict[str, str]:
    """Names and fingerprints that another run wrote."""
    pairs = (line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {name.strip(): digest for name, digest in pairs}


def report_differences(before: dict[str, str], now: dict[str, str]) -> int:
    """Say which lines differ, are gone or are new; 1 if there is one of the first two, else 0."""
    differ = [name for name in before if name in now and now[name] != before[name]]
    gone = [name for name in before if name not in now]
    for what, names in (("differs", differ), ("gone", gone), ("new", [*now.keys() - before])):
        for name in sorted(names):
            print(f"{what}: {name}", file=sys.stderr)
    same = len(before) - len(differ) - len(gone)
    print(f"{same} of {len(before)} lines are the same", file=sys.stderr)
    return int(bool(differ or gone))


def fingerprints(folder: Path) -> Lines:
    """Run everything."""
    from mfdetr_cache.coco.synthetic import write_synthetic_split

    write_synthetic_split(folder, "train", 0, TRAIN_SCENES)
    write_synthetic_split(folder, "val", FIRST_VAL_SEED, VAL_SCENES)
    for split in ("train", "val"):
        yield f"scenes {split}", hash_files(folder / split, folder / f"instances_{split}.json")
    yield from cache_lines(folder)
    yield from long_trainings(folder)
    yield from short_trainings(folder)
    yield from joint_training(folder)
    yield from other_commands(folder)


def cache_lines(folder: Path) -> Lines:
    """Caches of every preset, with views, and with crops of C1."""
    few = ("--limit", "4")
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {
        "fp16": ("train", ("--dtype", "fp16")),
        "int8": ("train", ("--dtype", "int8", "--views", "1")),
        "roi": ("train", ("--dtype", "int8", "--c1", "roi", "--roi-size", "16")),
        "jitter": (
            "train",
            ("--views", "2", "--view-policy", "large-scale-jitter", "--c1", "none", *few),
        ),
        "int8-small": ("train", ("--dtype", "int8-small", *few)),
        "int4": ("train", ("--dtype", "int4", "--compression", "raw", *few)),
        "queries": ("train", ("--num-queries", "20", "--encoder-layer", "1", *few)),
        "val": ("val", ()),
    }
    for name, (split, options) in wanted.items():
        cache = cache_of(folder, name)
        where = ("--weights", str(detector()), "--images", str(folder / split))
        truth = ("--annotations", str(folder / f"instances_{split}.json"))
        mfdetr("extract", *where, *truth, "--cache", str(cache), *options)
        yield f"cache {name}", hash_files(cache)


def long_trainings(folder: Path) -> Lines:
    """A hundred steps of the two main recipes, and what evaluate measures."""
    for recipe, cache, settings in (("fast", "int8", ()), ("paper", "fp16", ("hidden_dim=32",))):
        out = train_head(folder, recipe, cache, LONG_STEPS, settings)
        yield f"head {recipe}, {LONG_STEPS} steps", hash_weights(out)
        yield f"head {recipe}, config", hash_json(kept_of_config(out))
        yield from evaluation(folder, out, recipe)


def evaluation(folder: Path, head: Path, name: str) -> Lines:
    """What evaluate and predict say about a head."""
    report, results = folder / f"{name}.json", folder / f"{name}-results.json"
    common = ("evaluate", "--cache", str(cache_of(folder, "val")), "--head", str(head))
    mfdetr(*common, "--oracles", "--json", str(report), "--save-results", str(results))
    document = json.loads(report.read_text())
    wanted = ("mask", "box", "floor", "ceiling", "boundary", "details", "oracles")
    counted = ("num_images", "parameters", "macs")
    yield (
        f"evaluate {name}, metrics",
        hash_json({key: document[key] for key in (*wanted, *counted)}),
    )
    yield f"evaluate {name}, results", hash_files(results)
    out = folder / f"{name}-pictures"
    options = ("--weights", str(detector()), "--head", str(head), "--out", str(out))
    mfdetr("predict", str(folder / "val"), *options, "--threshold", "0.05")
    found = json.loads((out / "predictions.json").read_text())
    for result in found:
        result["file_name"] = Path(result["file_name"]).name
    yield f"predict {name}, masks", hash_json(found)
    yield f"predict {name}, pictures", hash_files(*sorted(out.glob("*.png")))


def short_trainings(folder: Path) -> Lines:
    """A few steps of each kind of head and of each way to train."""
    for name, (recipe, changes) in SHORT.items():
        out = train_head(folder, recipe, "int8", SHORT_STEPS, (*SMALL, *changes), name)
        yield f"head {name}", hash_weights(out)
    # Crops fit Hungarian matching, their own size and base views only.
    crops = ("match=hungarian", "min_match_iou=0", "roi_sampling_ratio=0", *SMALL)
    out = train_head(folder, "fast", "roi", SHORT_STEPS, crops, "crops of c1")
    yield "head crops of c1", hash_weights(out)
    options = ("--val-cache", str(cache_of(folder, "val")), "--val-every", "3")
    out = train_head(folder, "fast", "int8", 6, SMALL, "validated", options)
    yield "head validated", hash_weights(out)
    yield "head validated, best", hash_weights(out, "*best*.safetensors")
    split = ("val_split=4", *SMALL)
    out = train_head(folder, "fast", "int8", 6, split, "split", ("--val-every", "3"))
    yield "head split, best", hash_weights(out, "*best*.safetensors")


def joint_training(folder: Path) -> Lines:
    """A few steps of head and detector together."""
    for tune, augment in (
        ("nothing", "none"),
        ("encoder-decoder", "deformable-detr"),
        ("all", "large-scale-jitter"),
    ):
        out = folder / f"joint-{tune}"
        what = ("--detector", "hf", "--weights", str(detector()), "--out", str(out))
        data = ("--images", str(folder / "train"))
        truth = ("--annotations", str(folder / "instances_train.json"))
        how = ("--tune", tune, "--augment", augment, "--max-steps", str(SHORT_STEPS), *sets(SMALL))
        mfdetr("train-joint", *what, *data, *truth, *how)
        yield f"joint {tune}, head", hash_weights(out)
        if tune != "nothing":
            yield f"joint {tune}, detector", hash_weights(out / "detector")


def other_commands(folder: Path) -> Lines:
    """Heads trained side by side, counted costs, and a pasted dataset."""
    out = folder / "ablation"
    caches = (
        "--cache",
        str(cache_of(folder, "int8")),
        "--val-cache",
        str(cache_of(folder, "val")),
    )
    recipes = ("--recipe", "fast", "--recipe", "istr", "--baseline", "ellipse")
    report = folder / "ablation.json"
    length = ("--max-steps", str(SHORT_STEPS), *sets(SMALL[:2]))
    mfdetr("ablate", *recipes, *caches, *length, "--out", str(out), "--json", str(report))
    timed = ("train_seconds", "images_per_second", "head_ms", "total_hours")
    rows = json.loads(report.read_text())["rows"]
    yield "ablate, metrics", hash_json([{k: r[k] for k in r if k not in timed} for r in rows])
    for run in sorted(p.parent for p in out.rglob("head.safetensors")):
        yield f"ablate {run.relative_to(out).as_posix()}", hash_weights(run)
    for table in (1, 2, 3, 5, 6, 12):
        report = folder / f"table-{table}.json"
        mfdetr("ablate", "--table", str(table), "--dry-run", "--json", str(report))
        rows = json.loads(report.read_text())["rows"]
        yield f"costs of table {table}", hash_json(rows)
    pasted = folder / "pasted"
    data = ("--images", str(folder / "train"))
    truth = ("--annotations", str(folder / "instances_train.json"))
    mfdetr("copy-paste", *data, *truth, "--out", str(pasted), "--copies", "1")
    yield "copy-paste", hash_files(pasted)


def detector() -> Path:
    """The folder of the detector that comes with the package."""
    from mfdetr_cache.demo import demo_detector

    return demo_detector()


def cache_of(folder: Path, name: str) -> Path:
    """Where a cache is."""
    return folder / f"{name}.zarr"


def train_head(
    folder: Path,
    recipe: str,
    cache: str,
    steps: int,
    settings: Sequence[str],
    name: str = "",
    options: Sequence[str] = (),
) -> Path:
    """Train a head on the CPU."""
    out = folder / "heads" / (name or recipe).replace(" ", "-")
    where = ("--cache", str(cache_of(folder, cache)), "--out", str(out))
    how = ("--recipe", recipe, "--max-steps", str(steps), "--track", "none", "--device", "cpu")
    mfdetr("train-head", *where, *how, *sets(settings), *options)
    return out


def sets(settings: Sequence[str]) -> list[str]:
    """Settings as options."""
    return [part for setting in settings for part in ("--set", setting)]


def mfdetr(*arguments: str) -> None:
    """Run the command line in this process, which has loaded torch; SystemExit if it fails."""
    said = io.StringIO()
    typed, sys.argv = sys.argv, ["mfdetr", *arguments]
    started = time.perf_counter()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("mfdetr_cli", run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = typed
    if code:
        print(said.getvalue(), file=sys.stderr)
        sys.exit(f"mfdetr {' '.join(arguments)} ended with {code}")
    print(f"{time.perf_counter() - started:6.1f} s  mfdetr {arguments[0]}", file=sys.stderr)


def kept_of_config(run: Path) -> dict[str, Any]:
    """What a run's configuration says without paths, versions and the command."""
    document = json.loads((run / "config.json").read_text())
    return {k: v for k, v in document.items() if k not in NOT_KEPT} | {
        "cache": {k: v for k, v in document["cache"].items() if k != "path"}
    }


def hash_weights(folder: Path, pattern: str = "*.safetensors") -> str:
    """Fingerprint of all tensors of a file: names, types, shapes and bytes, sorted by name.

    The file is the only one of its pattern but for the weights of the best validation.
    """
    from safetensors.torch import load_file

    files = [f for f in sorted(folder.glob(pattern)) if "best" in pattern or "best" not in f.name]
    if len(files) != 1:
        sys.exit(f"{folder} has {len(files)} files {pattern}, not one")
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(files[0]).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().numpy().tobytes())
    return total.hexdigest()


def hash_files(*places: Path) -> str:
    """Fingerprint of files, but locks, with their paths inside the folders that are given."""
    total = hashlib.sha256()
    for place in places:
        files = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
        named = {
            p.relative_to(place if place.is_dir() else place.parent).as_posix(): p for p in files
        }
        for name in sorted(n for n in named if not n.endswith(".lock")):
            content = named[name].read_bytes()
            total.update(f"{name} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()


def hash_json(document: object) -> str:
    """Fingerprint of plain values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
