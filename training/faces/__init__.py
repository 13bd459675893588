"""The second miniature: SDXL's architecture at toy size over a world of portraits."""
