"""Where the target's text comes from."""
