"""The built-in world: sonified scenes, an oracle that reads them back, evaluation, report and demo."""

from unitok.lazy import attach

__getattr__, __all__ = attach(__name__, {"SceneSamples": "watch"})
