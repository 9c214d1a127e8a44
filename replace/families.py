"""Families that cannot be captured, whatever their config says."""

# Not through transformers' attention interface, or with tables or masks of their own (design 01).
NOT_CAPTURED = ("bloom", "deepseek_v3", "doge", "falcon", "gptj", "minimax", "youtu")
