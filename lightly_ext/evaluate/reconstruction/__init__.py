"""Images back from frozen latents, and how good they are."""
