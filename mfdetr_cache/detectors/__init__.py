"""Frozen detectors, loaded by ``registry.load_detector``."""
