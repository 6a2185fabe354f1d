"""Frozen detectors; ``registry.load_detector`` is the one door to all of them."""
