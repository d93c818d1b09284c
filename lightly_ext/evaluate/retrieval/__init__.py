"""Images that find images, by everything that may stand for an image."""
