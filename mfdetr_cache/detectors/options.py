"""What a user may choose about a detector."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """Choices that change what is computed; all of them end up in a cache's identity.

    Attributes:
        num_queries: Queries per image. The official detectors then run so many, as their own code
            does; of a transformers detector those with the highest class score are kept. None is
            the detector's own number.
        encoder_layer: Which encoder layer supplies the encoder maps, counted from 1, where the
            encoder is a stack of layers (Table 14; the paper takes the fourth of six); None is 4
            or the last. Encoders that end in a feature pyramid give their final maps.
        backbone_stride8: Also give the backbone's stride-8 map when the encoder has none.
    """

    num_queries: int | None = None
    encoder_layer: int | None = None
    backbone_stride8: bool = True
