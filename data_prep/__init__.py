"""Scripts that make the bundled world's data and train the models under ``checkpoints/``; each can resume."""
