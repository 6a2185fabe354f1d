"""What a user may choose about a detector."""

from dataclasses import dataclass

from mfdetr_cache.identity import Identity


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


def options_of(identity: Identity) -> DetectorOptions:
    """The options a cache or a head was made with.

    Args:
        identity: The detector identity kept with it.

    Returns:
        Options that give the same queries and maps.
    """
    settings = identity["settings"]
    return DetectorOptions(
        num_queries=identity["num_queries"],
        encoder_layer=settings.get("encoder_layer"),
        backbone_stride8=any(m["name"] == "backbone8" for m in identity["maps"]),
    )
