"""What a detector gave for a batch, on its way from the device to this machine's memory."""

from collections.abc import Collection
from dataclasses import replace

from mfdetr_cache.ops.devices import start_copies_to_host
from mfdetr_cache.ops.quantisation import Encoding
from mfdetr_cache.ops.quantisation_torch import EncodedMaps, encode_maps
from mfdetr_cache.types import DetectorOutput


class HostCopy:
    """Copies a batch to the host while the device goes on with the next; ``names`` of its maps.

    A GPU quantises the maps first, so that a quarter of the bytes is copied, and no core quantises.
    """

    def __init__(self, output: DetectorOutput, names: Collection[str], encoding: Encoding) -> None:
        self._maps: dict[str, EncodedMaps] | None = None
        maps = {name: output.maps[name] for name in names}
        if output.class_logits.device.type == "cpu":
            self._output = replace(output, maps=maps)
            return
        encoded = {name: encode_maps(values, encoding) for name, values in maps.items()}
        tensors = [output.class_logits, output.boxes_cxcywh_norm, output.queries]
        for each in encoded.values():
            tensors += each.tensors
        copies, self._wait = start_copies_to_host(tensors)
        here = iter(copies)
        self._output = DetectorOutput(next(here), next(here), next(here), {})
        self._maps = {name: each.with_tensors(here) for name, each in encoded.items()}

    def of_image(self, index: int) -> tuple[DetectorOutput, dict[str, EncodedMaps] | None]:
        """The outputs of one image, in any thread; waits for them.

        Its maps are in the second where a GPU quantised them.
        """
        if self._maps is None:
            return self._output.of_image(index), None
        self._wait()
        maps = {name: each.of_image(index) for name, each in self._maps.items()}
        return self._output.of_image(index), maps
