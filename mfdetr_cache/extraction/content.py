"""Content of a cache that is known before the detector runs."""

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import BASE_VIEW, FORMAT_VERSION, C1RoiLayout, plan_layout
from mfdetr_cache.coco.augmentation import (
    identity_transform,
    sample_transform,
    transform_ground_truth,
)
from mfdetr_cache.coco.labelled import LabelledSplit
from mfdetr_cache.detectors.protocol import Detector, fixed_input_hw
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.identity import detector_identity, images_identity
from mfdetr_cache.matching.objects import trainable_objects


def plan_cache(
    labelled: LabelledSplit, detector: Detector, maps: MapOptions, views: ViewOptions
) -> CacheContent:
    """Identity, layout and ground truth of a cache, before the detector runs."""
    spec, split = detector.spec, labelled.split
    transforms = {BASE_VIEW: [identity_transform(e.size_hw) for e in split.images]}
    # A detector with one input size sees scales only through the window that is cut out.
    fixed = fixed_input_hw(detector) is not None
    for number in range(views.count):
        name = f"{views.policy}-{number}"
        transforms[name] = [
            sample_transform(views.policy, views.seed, name, e.image_id, e.size_hw, fixed=fixed)
            for e in split.images
        ]
    truth = [labelled.objects_of(entry) for entry in split.images]
    objects = {
        view: [
            transform_ground_truth(objects, entry.size_hw, transform)
            for objects, entry, transform in zip(truth, split.images, of_rows, strict=True)
        ]
        for view, of_rows in transforms.items()
    }
    sizes = {
        detector.input_geometry(t.size_hw, t.shortest_edge).input_hw
        for of_rows in transforms.values()
        for t in of_rows
    }
    c1_roi = None
    if maps.c1 == "roi":
        most = max(len(trainable_objects(t)) for of_rows in objects.values() for t in of_rows)
        c1_roi = C1RoiLayout(maps.roi_size, maps.roi_sampling_ratio, most)
    layout = plan_layout(
        spec,
        sizes,
        len(split.images),
        maps.preset,
        maps.compression,
        tuple(transforms),
        maps.c1,
        c1_roi,
    )
    identity = {
        "format_version": FORMAT_VERSION,
        "detector": detector_identity(spec),
        "images": images_identity((e.image_id, e.file_name, e.size_hw) for e in split.images),
        "views": list(transforms),
        "view_seed": views.seed if views.count else None,
        "preset": layout.preset,
        "compression": layout.compression,
        "c1": layout.c1,
        "c1_roi": None
        if c1_roi is None
        else {"roi_size": c1_roi.roi_size, "sampling_ratio": c1_roi.sampling_ratio},
    }
    labels = AnnotationContent(*labelled.header(), objects)
    return CacheContent(Root(identity, spec, layout), split.images, transforms, labels)


def choices_of(root: Root) -> tuple[MapOptions, ViewOptions]:
    """What was chosen when a cache was made."""
    layout, extra = root.layout, root.layout.views[1:]
    roi = layout.c1_roi
    crops = () if roi is None else (roi.roi_size, roi.sampling_ratio)
    maps = MapOptions(layout.preset, layout.compression, layout.c1, *crops)
    if not extra:
        return maps, ViewOptions()
    policy = extra[0].rsplit("-", 1)[0]
    return maps, ViewOptions(len(extra), policy, root.identity["view_seed"])  # type: ignore[arg-type]
