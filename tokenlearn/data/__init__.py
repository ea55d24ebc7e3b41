"""What methods learn from: streams of prompts and seeds, and the bundled world."""

from tokenlearn.data.prompts import PromptBatch, PromptDataModule, PromptList, PromptStream

__all__ = ["PromptBatch", "PromptDataModule", "PromptList", "PromptStream"]
