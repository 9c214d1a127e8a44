"""Window, sinks and retained pairs, no memory: the control without pairs, and the pairs-only variant with
them.
"""

from replace.mixer import VARIANTS, BlockMixer


@VARIANTS.register("sliding_window")
class SlidingWindow(BlockMixer):
    """softmax over the exact part.

    An untrained swap is near the teacher on text and has no recall beyond what is retained.
    """
