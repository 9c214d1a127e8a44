"""Replace softmax attention in a pretrained decoder LLM, and know what was kept and what was lost."""
