"""The forms in which the outcome of a gate is told, one per file: `render(outcome)`."""
