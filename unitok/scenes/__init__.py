"""The built-in world: sonified scenes, an oracle that reads them back, evaluation, report and demo."""
