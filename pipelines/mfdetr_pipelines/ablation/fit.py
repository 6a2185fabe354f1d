"""Adaptation of the paper's rows to other detectors."""

from dataclasses import replace

from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.types import DetectorSpec
from mfdetr_pipelines.ablation.rows import AblationRow


def fit_row(row: AblationRow, spec: DetectorSpec) -> AblationRow:
    """A row of the paper with the widths of another detector, and a note of what changed.

    It gets the detector's width where it asks for that, and a neck where C1 and the encoder differ
    in width. HeadError if a training-free row would need weights with this detector.
    """
    head, notes = row.recipe.head, []
    c1 = next((m.channels for m in spec.maps if m.role == "c1"), None)
    width = max((m.channels for m in spec.maps if m.role == "encoder"), default=0)
    untrained = row.own_width and _has_no_part_to_train(head)
    if row.own_width and width and head.hidden_dim != width:
        head = replace(head, hidden_dim=width)
        notes.append(f"d={width}, the detector's own width")
    if untrained and head.use_c1 and c1 not in (None, width):
        raise HeadError(
            f"there is nothing to train in this row, but C1 has {c1} channels and the encoder "
            f"{width}: adding them takes a neck"
        )
    if untrained and spec.query_dim != width:
        raise HeadError(
            f"there is nothing to train in this row, but queries have {spec.query_dim} channels "
            f"and the encoder {width}: comparing them takes a mapper"
        )
    if untrained and any(m.role == "backbone" for m in spec.maps):
        # Backbone levels need a projection, and without an image encoder nothing reads them.
        head = replace(head, use_backbone_levels=False)
    if head.use_c1 and not head.neck and c1 not in (None, width):
        head = replace(head, neck=True)
        notes.append(f"neck added: C1 has {c1} channels, the encoder {width}")
    return replace(row, recipe=replace(row.recipe, head=head), note="; ".join(notes))


def _has_no_part_to_train(head: HeadConfig) -> bool:
    parts = (
        head.image_layers, head.box_layers, head.query_ffn, head.query_o2o, head.query_b2o,
        head.mask_scoring, head.neck and head.use_c1, head.mask_predictor != "dot",
    )  # fmt: skip
    return not any(parts)
