"""Training drafters for speculative decoding, and measuring what they gain."""
