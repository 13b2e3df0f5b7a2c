"""Export formats, one per file, and the gate that every export passes."""
