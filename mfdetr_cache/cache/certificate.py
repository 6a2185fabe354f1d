"""What a preset costs in mask AP, as it was measured and is kept in the cache."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from mfdetr_cache.cache.document import read_document
from mfdetr_cache.cache.manifest import CERTIFICATES_KEY
from mfdetr_cache.cache.storage.open import Location, open_storage
from mfdetr_cache.cache.storage.protocol import Storage, explained
from mfdetr_cache.errors import CacheError


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """Mask AP of one head on unrounded or float16 features and on a cache's own.

    Attributes:
        preset: How the cache stores its maps.
        reference: What it was compared with: ``live``, or the preset of another cache.
        head: First digits of the SHA-256 of the head's weights.
        AP_reference: Mask AP on the reference's features, in [0, 1].
        AP: Mask AP on this cache's features.
        difference: AP minus AP_reference.
        low: Lower end of the paired 95 % bootstrap interval of the difference.
        high: Its upper end.
    """

    preset: str
    reference: str
    head: str
    images: int
    AP_reference: float
    AP: float
    difference: float
    low: float
    high: float
    samples: int


def read_certificates(location: Location) -> tuple[Certificate, ...]:
    """The certificates kept in a cache; CacheError if one is damaged."""
    certificates = []
    storage = open_storage(location)
    for key in storage.sizes(CERTIFICATES_KEY):
        if not key.endswith(".json"):
            continue
        try:
            fields = read_document(storage, key)
            read: dict[Any, Callable[[str], Any]]
            read = {str: fields.text, int: fields.integer, float: fields.number}
            values = {f.name: read[f.type](f.name) for f in dataclasses.fields(Certificate)}
            certificates.append(Certificate(**values))
        except CacheError as error:
            where = f"{storage.name}/{key}"
            raise CacheError(f"{where} is damaged; remove it and certify again") from error
    return tuple(certificates)


def write_certificate(storage: Storage, certificate: Certificate) -> None:
    """Keep a certificate in a cache, in place of an older one of the same head and reference.

    CacheError if it cannot be written.
    """
    with explained(storage):
        key = f"{CERTIFICATES_KEY}/{certificate.head}-{certificate.reference}.json"
        storage.write(key, [json.dumps(dataclasses.asdict(certificate), indent=1).encode()])
