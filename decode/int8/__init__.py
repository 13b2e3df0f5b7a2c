"""Linear layers in eight bits on the CPU, exact row by row."""
