"""The last stage: adapters on the whole student, trained on chats or on text, then merged.

It runs in the process of the stages before it, on the model that they trained: an adapter that is read back
between two phases can come back without a gradient.

The loop, its checkpoints and its rows are this project's own and not TRL's SFTTrainer, for four reasons: the
Trainer's checkpoints unpickle optimizer and random state, and here nothing is unpickled and a resumed run is
equal bit for bit; its assistant-only loss needs templates with `{% generation %}` marks, which most models'
templates (the default's too) do not have; its packing keeps documents apart under FlashAttention alone, and
here each begins with fresh masks and memory states on any machine; and the loop counts what a replaced layer
clamps and skips what is not finite.
"""
