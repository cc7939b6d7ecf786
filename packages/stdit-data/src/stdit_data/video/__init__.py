"""From encoded bytes to frames and back."""
