"""The built-in world: sonified scenes, an oracle that reads them back, evaluation, report and demo."""

from unitok.lazy import attach

__getattr__, __all__ = attach(__name__, {"SceneSamples": "watch"})

#: Sampling parameters for models of scenes, by modality (docs/notes.md). The demo writes them into its bundle.
SAMPLING: dict[str, dict[str, float]] = {
    "text": {"temperature": 0.0},
    "image": {"temperature": 0.4, "top_p": 0.95, "guidance_scale": 1.5},
    "audio": {"temperature": 0.4, "top_p": 0.95},
}

#: Of boxes and points, where a bundle has them.
LOCATING: dict[str, dict[str, float]] = {"box": {"temperature": 0.0}, "point": {"temperature": 0.0}}

#: Of images that are edited, over those of images.
EDITING: dict[str, float] = {"temperature": 0.2, "guidance_scale": 1.5}
