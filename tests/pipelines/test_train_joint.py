import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mfdetr_pipelines import train_joint as module
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.train_head import run_train_head
from mfdetr_pipelines.train_joint import run_train_joint

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.detectors.protocol import TunableDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import (
    ConfigError,
    DatasetError,
    HeadError,
    IdentityError,
    ImageError,
    StoppedError,
    TrainingError,
)
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.detector_tuner import JointLearner
from mfdetr_cache.training.input.live import LiveImages, LiveSource
from mfdetr_cache.training.recipes import Recipe, build_recipe
from tests.support import detectors, scenes
from tests.support.configs import changed
from tests.support.official import SMALL, write_checkpoint
from tests.support.signals import stop_after
from tests.support.small_checkpoints import write_small


def recipe(**changes: Any) -> Recipe:
    small = {"hidden_dim": 16, "roi_size": 8, "steps": 4, "batch_size": 3, "min_match_iou": 0}
    small["fine_size"] = 0
    settings = {**small, "lr": 1e-3, **changes}
    return build_recipe("fast", {k: str(v) for k, v in settings.items()})


def config(folder: Path, weights: Path | str, out: Path, **changes: Any) -> TrainJointConfig:
    settings: dict[str, Any] = {
        "detector": "hf",
        "weights": str(weights),
        "images": folder / "images",
        "annotations": folder / "instances.json",
        "out": out,
        "recipe": recipe(),
    }
    return changed(TrainJointConfig(**settings), **changes)


def state_of(weights: str, detector: str = "hf") -> dict[str, torch.Tensor]:
    loaded: Any = load_detector(detector, weights)
    return dict(loaded.model.state_dict())


@pytest.mark.parametrize("o2o", ["false", "true"])
def test_a_frozen_detector_gives_the_losses_of_a_cache(
    o2o: str, tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path
) -> None:
    """Live and cached are the same training but for float16 in the cache."""
    chosen = recipe(query_o2o=o2o)
    live = run_train_joint(
        config(scenes_folder, rtdetr_folder, tmp_path / "live", tune="nothing", recipe=chosen),
        SilentReporter(),
    )
    cached = run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "cached", chosen), SilentReporter()
    )
    # Maps rounded to 11 bits, seen through four steps of a loss near 6.
    assert live.mask_loss == pytest.approx(cached.loss, rel=2e-3)
    assert live.weights == str(rtdetr_folder)
    assert live.box_loss == 0
    assert live.tuned_parameters == 0
    first, second = load_head(tmp_path / "live"), load_head(tmp_path / "cached")
    assert first.detector == second.detector
    found = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "live"), SilentReporter())
    assert found.num_images == 8


@pytest.mark.parametrize("tune", ["encoder-decoder", "all"])
def test_what_is_tuned_moves_and_nothing_else(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path, tune: str
) -> None:
    out = tmp_path / "run"
    summary = run_train_joint(
        config(
            scenes_folder,
            rtdetr_folder,
            out,
            tune=tune,
            val_images=scenes_folder / "images",
            val_annotations=scenes_folder / "instances.json",
        ),
        SilentReporter(),
    )
    before, after = state_of(str(rtdetr_folder)), state_of(summary.weights)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder" in n and "backbone" not in n for n in moved)
    assert any("decoder" in n for n in moved)
    assert any("backbone" in n for n in moved) == (tune == "all")
    # Batch norms keep their statistics: the detector is in evaluation mode throughout.
    assert not any("running" in n for n in moved)
    largest = max(float((after[n].float() - before[n].float()).abs().max()) for n in moved)
    # AdamW moves a weight by its learning rate per step at most, and a little by decay.
    assert largest < 1.1 * 4 * 1e-4
    assert summary.validation is not None
    assert summary.box_loss > 0
    again = run_evaluate(EvaluateConfig(out / "val.zarr", out), SilentReporter())
    assert again.mask == summary.validation.mask
    with pytest.raises(IdentityError, match="weights_sha256"):
        run_evaluate(EvaluateConfig(drawn_cache, out), SilentReporter())


def test_both_losses_reach_the_detector(scenes_folder: Path, rtdetr_folder: Path) -> None:
    """The backbone hears of the masks too, not only of the boxes."""
    gradients = {}
    for name, weight in (("boxes", 0.0), ("both", 1.0)):
        changes = {"bce_weight": 5 * weight, "dice_weight": 5 * weight}
        settings = config(scenes_folder, rtdetr_folder, Path("x"), recipe=recipe(**changes))
        split = load_coco_split(settings.annotations)
        detector: Any = load_detector("hf", str(rtdetr_folder))
        train = settings.recipe.train
        images = LiveImages(split, settings.images, detector, train, None)
        torch.manual_seed(0)
        head = images.new_head(settings.recipe.head)
        learner = JointLearner(head, train, detector, "all", 0.1)
        source = LiveSource(images, detector, learner, is_tuned=True)
        (step,) = source.steps(range(1))
        step.prepare(1)
        learner.learn(step.batches(learner.regions), 0, step.counts[learner.regions])
        found = {n: p.grad for n, p in detector.model.named_parameters() if p.grad is not None}
        gradients[name] = next(g for n, g in found.items() if "backbone" in n)
    assert not torch.allclose(gradients["boxes"], gradients["both"], rtol=1e-3)


def test_tuning_teaches_the_detector(tmp_path: Path, scenes_folder: Path) -> None:
    detectors.save_rtdetr(tmp_path / "detector", seed=1)
    losses = []
    for steps in (3, 60):
        summary = run_train_joint(
            config(
                scenes_folder,
                tmp_path / "detector",
                tmp_path / f"run-{steps}",
                tune="all",
                detector_lr=1.0,
                recipe=recipe(steps=steps),
            ),
            SilentReporter(),
        )
        losses.append(summary.box_loss)
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_checkpoint_that_finds_no_room_costs_no_training(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    settings = config(scenes_folder, rtdetr_folder, tmp_path / "run")

    def fill_the_disk(_done: int) -> None:
        partial = settings.out / "checkpoint.pt.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to("/dev/full")

    reporter = SilentReporter()
    assert run_train_joint(settings, reporter, fill_the_disk).steps == 4
    assert any("checkpoint.pt cannot be written, the disk" in m for m in reporter.messages)
    assert not (settings.out / "checkpoint.pt").exists()
    assert load_head(settings.out).head is not None


def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    whole = config(scenes_folder, rtdetr_folder, tmp_path / "whole", augment="deformable-detr")
    run_train_joint(whole, SilentReporter())
    parted = dataclasses.replace(whole, out=tmp_path / "parted")
    with pytest.raises(StoppedError, match="at step 2"):
        run_train_joint(parted, SilentReporter(), stop_after(2))
    with pytest.raises(HeadError, match=r"joint.tune was 'encoder-decoder' and is 'all' now"):
        run_train_joint(dataclasses.replace(parted, resume=True, tune="all"), SilentReporter())
    run_train_joint(dataclasses.replace(parted, resume=True), SilentReporter())
    first, second = load_head(whole.out).head.state_dict(), load_head(parted.out).head.state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    theirs, ours = state_of(str(whole.out / "detector")), state_of(str(parted.out / "detector"))
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs)
    lines = [json.loads(t) for t in (parted.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_a_step_in_micro_batches_trains_what_a_whole_one_trains(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """With a tuned detector every image then goes through it twice, with the same result."""
    for name, accumulate in (("whole", 1), ("parts", 3)):
        run_train_joint(
            config(
                scenes_folder,
                rtdetr_folder,
                tmp_path / name,
                tune="all",
                recipe=recipe(accumulate=accumulate, steps=2),
            ),
            SilentReporter(),
        )
    first, second = (load_head(tmp_path / n).head.state_dict() for n in ("whole", "parts"))
    for name, value in first.items():
        # Sums in another order: an entry whose gradient is near zero may move by lr = 1e-3 a step
        # in either direction; nearly all are far closer.
        assert float((value - second[name]).abs().max()) <= 2 * 2e-3
        assert float((value - second[name]).abs().mean()) <= 2e-5, name
    theirs, ours = (state_of(str(tmp_path / n / "detector")) for n in ("whole", "parts"))
    for name, value in theirs.items():
        assert float((value.float() - ours[name].float()).abs().max()) <= 2 * 2e-4


def test_a_gpu_that_is_full_splits_the_step(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of one image fit the memory, the detector's outputs of three do not."""
    detect = LiveSource.detect

    def small_memory(self: Any, images: Any, *, gradients: bool) -> Any:
        if gradients and len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return detect(self, images, gradients=gradients)

    monkeypatch.setattr(LiveSource, "detect", small_memory)
    settings = config(scenes_folder, rtdetr_folder, tmp_path / "full", tune="all")
    with pytest.raises(TrainingError, match="does not hold 3 images .*--batch-size auto"):
        run_train_joint(settings, SilentReporter())
    reporter = SilentReporter()
    settings = dataclasses.replace(settings, out=tmp_path / "split", batch_size="auto")
    split = run_train_joint(settings, reporter)
    assert any("computing each step in 4 micro-batches" in m for m in reporter.messages)
    monkeypatch.undo()
    whole = run_train_joint(dataclasses.replace(settings, out=tmp_path / "whole"), SilentReporter())
    assert split.mask_loss == pytest.approx(whole.mask_loss, rel=1e-3)
    assert split.box_loss == pytest.approx(whole.box_loss, rel=1e-3)


def test_validation_on_the_way_changes_nothing(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    scenes.write_scenes(tmp_path / "val", count=2, seed=1)
    validation = {
        "val_images": tmp_path / "val/images",
        "val_annotations": tmp_path / "val/instances.json",
        "val_every": 2,
    }
    for tune in ("nothing", "all"):
        plain = config(scenes_folder, rtdetr_folder, tmp_path / f"{tune}-plain", tune=tune)
        measured = changed(plain, out=tmp_path / tune, **validation)
        run_train_joint(plain, SilentReporter())
        summary = run_train_joint(measured, SilentReporter())
        first, second = (load_head(c.out).head.state_dict() for c in (plain, measured))
        assert all(torch.equal(first[n], second[n]) for n in first)
        lines = [json.loads(t) for t in (measured.out / "metrics.jsonl").read_text().splitlines()]
        found = {s["step"]: s["validation"]["mask"]["AP"] for s in lines if "validation" in s}
        assert sorted(found) == [2, 4]
        assert summary.best_AP == max(found.values())
        # Of a detector that goes on changing, an earlier head would be of no use.
        assert (measured.out / "head-best.safetensors").exists() == (tune == "nothing")


def test_official_detectors_are_tuned_and_saved_in_their_own_form(
    tmp_path: Path, scenes_folder: Path
) -> None:
    architecture = dataclasses.replace(SMALL["h-detr-swin-t"], num_labels=3)
    write_checkpoint(tmp_path / "h.pth", architecture)
    summary = run_train_joint(
        config(
            scenes_folder,
            tmp_path / "h.pth",
            tmp_path / "run",
            detector="h-detr",
            recipe=recipe(steps=1, batch_size=1),
        ),
        SilentReporter(),
    )
    before = state_of(str(tmp_path / "h.pth"), "h-detr")
    after = state_of(summary.weights, "h-detr")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("transformer.encoder" in n for n in moved)
    assert any("transformer.decoder" in n for n in moved)
    assert not any("backbone" in n for n in moved)


def test_labels_that_are_held_back_are_not_seen(scenes_folder: Path, rtdetr_folder: Path) -> None:
    detector = load_detector("hf", str(rtdetr_folder))
    split = load_coco_split(scenes_folder / "instances.json")
    train = recipe().train

    def rows(**changes: Any) -> list[int]:
        seen = dataclasses.replace(train, **changes)
        return LiveImages(split, scenes_folder / "images", detector, seen, None).rows

    few, some = rows(label_fraction=0.25), rows(label_fraction=0.5)
    assert set(few) < set(some) < set(rows())
    ids = [c.category_id for c in split.categories]
    without = rows(held_out=ids[:1])
    of = {e.image_id: set() for e in split.images}
    document = json.loads((scenes_folder / "instances.json").read_text())
    for annotation in document["annotations"]:
        of[annotation["image_id"]].add(annotation["category_id"])
    assert without == [i for i in rows() if of[split.images[i].image_id] - {ids[0]}]
    with pytest.raises(TrainingError, match="no image"):
        rows(held_out=ids)


def test_the_basis_of_an_embedding_is_learned_first(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path
) -> None:
    """The same masks as from a cache give the same basis."""
    settings = {"hidden_dim": "16", "roi_size": "8", "steps": "1", "batch_size": "2"}
    istr = build_recipe("istr", {**settings, "mask_embedding_dim": "8", "min_match_iou": "0"})
    live = config(scenes_folder, rtdetr_folder, tmp_path / "live", tune="nothing", recipe=istr)
    run_train_joint(live, SilentReporter())
    run_train_head(TrainHeadConfig(drawn_cache, tmp_path / "cached", istr), SilentReporter())
    first, second = load_head(tmp_path / "live").head, load_head(tmp_path / "cached").head
    assert first.codec is not None
    assert second.codec is not None
    for name, value in first.codec.state_dict().items():
        assert torch.equal(value, second.codec.state_dict()[name])
    assert first.codec.state_dict()["basis"].abs().sum() > 0


def test_bad_input_gets_one_line(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = config(scenes_folder, rtdetr_folder, tmp_path / "run")
    wrong = [
        ({"val_images": tmp_path}, "go together"),
        ({"detector_lr": 0.0}, "--detector-lr 0.0"),
        ({"max_steps": 0}, "--max-steps must be 1 or more"),
        ({"max_steps": 2, "epochs": 1.0}, "not both"),
        ({"recipe": recipe(amp="fp16")}, "amp=bf16"),
        ({"recipe": recipe(views="base")}, "views=base does nothing without a cache"),
        ({"recipe": recipe(val_split=4)}, "val_split=4 does nothing without a cache"),
        ({"recipe": recipe(amp="fp16"), "tune": "nothing"}, "needs a GPU"),
        ({"val_every": 2}, "--val-every needs --val-images"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"track": ("mlflow",)}, "--track mlflow: the package is not installed"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            run_train_joint(changed(good, **changes), SilentReporter())
    validation = {"val_annotations": good.annotations, "val_images": tmp_path}
    with pytest.raises(ImageError, match="check --val-images"):
        run_train_joint(changed(good, **validation), SilentReporter())
    document = scenes.load_annotations(scenes_folder)
    document["annotations"][2]["segmentation"] = None
    (tmp_path / "bad.json").write_text(json.dumps(document))
    bad = changed(good, annotations=tmp_path / "bad.json", max_steps=1)
    with pytest.raises(DatasetError, match="--on-bad-annotation skip leaves them out"):
        run_train_joint(bad, SilentReporter())
    reporter = SilentReporter()
    run_train_joint(
        changed(bad, out=tmp_path / "skipped", on_bad_annotation="skip", track=()), reporter
    )
    assert any("left out: 1 of 16 annotations" in m for m in reporter.messages)
    real = load_detector("hf", str(rtdetr_folder))
    assert isinstance(real, TunableDetector)

    class Sealed:
        """A third-party detector without the two methods."""

        spec, input_geometry, preprocess = real.spec, real.input_geometry, real.preprocess
        forward = real.forward

        def to(self, _device: object) -> "Sealed":
            return self

    monkeypatch.setattr(module, "load_detector", lambda *_: Sealed())
    with pytest.raises(ConfigError, match="cannot be tuned"):
        run_train_joint(good, SilentReporter())
    assert not (tmp_path / "run").exists()


def test_an_authors_checkpoint_is_tuned_and_stays_one(tmp_path: Path, scenes_folder: Path) -> None:
    """Which detector it is stands in the weights, before and after."""
    write_small(tmp_path / "best.pth", "deimv2")
    settings = config(
        scenes_folder, tmp_path / "best.pth", tmp_path / "run", detector="auto", tune="all", limit=3
    )
    summary = run_train_joint(settings, SilentReporter())
    before = load_detector("deimv2", str(tmp_path / "best.pth"))
    after = load_detector("auto", summary.weights)
    assert after.spec.name == "deimv2"
    assert after.spec.weights_sha256 != before.spec.weights_sha256
    assert after.spec.label_names == before.spec.label_names
