"""Learn semantic tokens for frozen text-to-image diffusion models."""
