"""The miniature: the small drawn world in which the embedded default model was trained."""
